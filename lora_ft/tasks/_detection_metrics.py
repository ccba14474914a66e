"""Mean average precision of boxes, as COCO's own evaluation has it."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_ft.errors import UsageError
from lora_ft.records import Judgement

Box = Sequence[float]  # x, y, width, height in pixels
EVERY, PLAIN = 0, -1  # COCO's index of areas of any size; of the largest number of boxes a picture may have


@dataclass(frozen=True)
class Boxes:
    """Boxes of one picture.

    Attributes:
        boxes: [x, y, width, height] in pixels.
        labels: the class of each, as an id.
        scores: of each, where a model found them.
        crowd: of each, whether it is a group that may be found any number of times; () when none is.
    """

    boxes: Sequence[Box]
    labels: Sequence[int]
    scores: Sequence[float] = ()
    crowd: Sequence[bool] = ()


def need_packages() -> None:
    """Raise UsageError when what matches and judges boxes is not installed."""
    for package in ("scipy", "pycocotools"):
        try:
            __import__(package)
        except ImportError as error:
            raise UsageError(
                f"object-detection needs the package {package}", fix="pip install 'lora-ft[vision]'"
            ) from error


def judge_boxes(found: Sequence[Boxes], wanted: Sequence[Boxes], labels: Sequence[str]) -> Judgement:
    """`map` over the overlaps 0.50, 0.55, ..., 0.95, `map_50` and `map_75` at one, `mar_100` the mean best recall.

    Means are over the classes that some picture has; without any box there is nothing to judge by, and no metric.

    Args:
        found: by a model, of each picture.
        wanted: of each picture.
        labels: in the order of their ids.
    """
    truth = _document(wanted, len(labels))
    if not any(not a["iscrowd"] for a in truth["annotations"]):
        return Judgement({}, [])
    evaluated = _evaluated(truth, [b for n, f in enumerate(found) for b in _rows(f, n)])
    precision, recall = evaluated["precision"], evaluated["recall"]
    overlaps = np.round(np.linspace(0.5, 0.95, 10), 2).tolist()
    metrics = {
        "map": _mean(precision[..., EVERY, PLAIN]),
        "map_50": _mean(precision[overlaps.index(0.5), ..., EVERY, PLAIN]),
        "map_75": _mean(precision[overlaps.index(0.75), ..., EVERY, PLAIN]),
        "mar_100": _mean(recall[..., EVERY, PLAIN]),
    }
    of_class = {name: _mean(precision[:, :, i, EVERY, PLAIN]) for i, name in enumerate(labels)}
    return Judgement(metrics, [], {"map_of_class": {n: v for n, v in of_class.items() if v >= 0}})


def _mean(values: Any) -> float:
    """COCO marks what has no box to be found with -1."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _document(wanted: Sequence[Boxes], classes: int) -> dict[str, Any]:
    annotations = [row for number, boxes in enumerate(wanted) for row in _rows(boxes, number)]
    return {
        "images": [{"id": n} for n in range(len(wanted))],
        "categories": [{"id": i} for i in range(classes)],
        "annotations": [{**row, "id": n} for n, row in enumerate(annotations, 1)],  # 0 would mean "none" to COCO
    }


def _rows(boxes: Boxes, picture: int) -> list[dict[str, Any]]:
    rows = []
    for n, (box, label) in enumerate(zip(boxes.boxes, boxes.labels, strict=True)):
        row: dict[str, Any] = {"image_id": picture, "category_id": int(label), "bbox": list(box)}
        row |= {"area": box[2] * box[3], "iscrowd": int(bool(boxes.crowd) and boxes.crowd[n])}
        rows.append(row | ({"score": boxes.scores[n]} if boxes.scores else {}))
    return rows


def _evaluated(truth: dict[str, Any], rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    """COCO's precision (overlaps, recalls, classes, areas, limits) and recall (overlaps, classes, areas, limits)."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        wanted, found = COCO(), COCO()
        wanted.dataset = truth
        found.dataset = {**truth, "annotations": [{**row, "id": n} for n, row in enumerate(rows, 1)]}
        wanted.createIndex()
        found.createIndex()
        judge = COCOeval(wanted, found, "bbox")
        judge.evaluate()
        judge.accumulate()
    result: Mapping[str, Any] = judge.eval
    return result
