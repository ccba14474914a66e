"""Mean average precision against numbers worked out by hand, and against COCO's own summary."""

import contextlib
import io

import numpy as np
import pytest

from lora_ft.errors import UsageError
from lora_ft.registry import TASKS
from lora_ft.tasks._detection_metrics import Boxes, judge_boxes

HALF = 51 / 101  # recall 0.5 is reached at 51 of COCO's 101 places


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        pytest.param(Boxes([[0, 0, 10, 10]], [0], [0.9]), Boxes([[0, 0, 10, 10]], [0]), (1, 1), id="exact"),
        pytest.param(Boxes([[0, 0, 10, 10]], [1], [0.9]), Boxes([[0, 0, 10, 10]], [0]), (0, 0), id="wrong class"),
        # overlap 0.62: right at 0.50, 0.55 and 0.60 of ten
        pytest.param(Boxes([[0, 0, 10, 6.2]], [0], [0.9]), Boxes([[0, 0, 10, 10]], [0]), (0.3, 1), id="overlap 0.62"),
        pytest.param(
            Boxes([[0, 0, 10, 10]], [0], [0.9]), Boxes([[0, 0, 10, 10], [50, 50, 9, 9]], [0, 0]), (HALF, HALF),
            id="one of two",
        ),
        # the better score is wrong, so the precision of the right one is one half
        pytest.param(
            Boxes([[50, 50, 9, 9], [0, 0, 10, 10]], [0, 0], [0.9, 0.5]), Boxes([[0, 0, 10, 10]], [0]), (0.5, 0.5),
            id="a better score beside it",
        ),
        pytest.param(
            Boxes([[0, 0, 10, 10], [0, 0, 10, 10]], [0, 0], [0.9, 0.8]), Boxes([[0, 0, 10, 10]], [0]), (1, 1),
            id="found twice after all is found",
        ),
        # what lies in a crowd is neither right nor wrong
        pytest.param(
            Boxes([[50, 50, 5, 5], [0, 0, 10, 10]], [0, 0], [0.9, 0.8]),
            Boxes([[0, 0, 10, 10], [40, 40, 40, 40]], [0, 0], crowd=[False, True]), (1, 1), id="crowd",
        ),
        pytest.param(Boxes([], [], []), Boxes([[0, 0, 10, 10]], [0]), (0, 0), id="nothing found"),
    ],
)  # fmt: skip
def test_precision_is_what_it_is_by_hand(found, wanted, expected):
    judged = judge_boxes([found], [wanted], ["a", "b"])
    assert (judged.metrics["map"], judged.metrics["map_50"]) == pytest.approx(expected, abs=1e-6)
    assert judged.tables["map_of_class"] == {"a": pytest.approx(expected[0], abs=1e-6)}


def test_boxes_count_in_their_own_picture_only():
    box = Boxes([[0, 0, 10, 10]], [0], [0.9])
    judged = judge_boxes([box, Boxes([], [])], [Boxes([], []), Boxes([[0, 0, 10, 10]], [0])], ["a"])
    assert judged.metrics["map"] == 0


def test_rows_without_any_box_have_no_precision():
    assert judge_boxes([Boxes([[0, 0, 1, 1]], [0], [0.5])], [Boxes([], [])], ["a"]).metrics == {}


def test_random_boxes_are_judged_as_cocos_own_summary_does(capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(3)
    wanted, found, document, results = [], [], {"images": [], "annotations": [], "categories": []}, []
    document["categories"] = [{"id": 10 + i, "name": str(i)} for i in range(3)]
    for picture in range(30):
        boxes = np.concatenate([rng.uniform(0, 90, (4, 2)), rng.uniform(5, 60, (4, 2))], 1)
        labels, crowd = rng.integers(0, 3, 4), rng.random(4) < 0.2
        shaken = np.maximum(boxes + rng.normal(0, 4, (4, 4)), 0.5)
        guessed, scores = np.where(rng.random(4) < 0.2, 0, labels), rng.random(4)
        wanted.append(Boxes(boxes.tolist(), labels.tolist(), crowd=crowd.tolist()))
        found.append(Boxes(shaken.tolist(), guessed.tolist(), scores.tolist()))
        document["images"].append({"id": 100 + picture})
        for box, label, many, other, guess, score in zip(boxes, labels, crowd, shaken, guessed, scores, strict=True):
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1, "image_id": 100 + picture, "category_id": 10 + int(label),
                    "bbox": box.tolist(), "area": float(box[2] * box[3]), "iscrowd": int(many),
                }
            )  # fmt: skip
            results.append([100 + picture, *other, score, 10 + guess])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = document
        truth.createIndex()
        own = COCOeval(truth, truth.loadRes(np.array(results)), "bbox")
        own.evaluate()
        own.accumulate()
        own.summarize()
    judged = judge_boxes(found, wanted, ["0", "1", "2"]).metrics
    expected = dict(zip(("map", "map_50", "map_75"), own.stats[:3], strict=True)) | {"mar_100": own.stats[8]}
    assert judged == pytest.approx(expected)
    assert 0.1 < judged["map"] < 0.9
    assert capsys.readouterr().out == ""


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(UsageError, match="pycocotools") as caught:
        TASKS.get("object-detection").configure({})
    assert "pip install 'lora-ft[vision]'" in str(caught.value)
