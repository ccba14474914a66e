"""Rows with images and sounds become their canonical form, and a row that is wrong is named with what is wrong."""

import base64
import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from lora_ft.data import load_examples
from lora_ft.data._detect import Wanted, choose_format
from lora_ft.data._row import Row
from lora_ft.errors import DataError
from lora_ft.media import find_media, read_image
from lora_ft.registry import FORMATS

PIL = Image.new("RGB", (2, 3), (255, 0, 0))
PIXELS = np.zeros((3, 2, 3), np.uint8)


def png(colour=(255, 0, 0)):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder, rows, name="x.jsonl"):
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


DETECTED = [
    ({"image": "cat/x.png", "label": "cat"}, "labelled_image"),
    ({"file_name": "x.JPG", "labels": "a|b"}, "labelled_image"),
    ({"image_path": "x", "class": "cat"}, "labelled_image"),
    ({"images": PIXELS, "labels": np.int64(1)}, "labelled_image arrays"),
    ({"x": PIXELS, "y": np.int64(1)}, "labelled_image arrays"),
    ({"inputs": PIL, "target": 1}, "labelled_image"),
    ({"path": "x.wav", "label": "yes"}, "labelled_audio"),
    ({"file": b"RIFF....WAVE", "category": 3}, "labelled_audio"),
    ({"file": b"RIFF....WEBPVP8 ", "category": 3}, "labelled_image"),
    ({"audio": {"array": [0.0], "sampling_rate": 8000}, "label": 1}, "labelled_audio"),
    ({"audio_filepath": "x.flac", "text": "a"}, "audio_text text"),
    ({"audio": {"bytes": b"RIFF", "path": None}, "sentence": "a", "path": "y.mp3"}, "audio_text text"),
    ({"path": "x.opus", "transcription": "a"}, "audio_text"),
    ({"image": "x.png", "mask": "y.png"}, "image_mask"),
    ({"image": PIL, "annotation": PIL}, "image_mask"),
    ({"pixel_values": PIL, "label": PIL}, "image_mask labelled_image"),
    ({"image": PIL, "objects": {"bbox": [], "category": []}}, "boxes"),
    ({"image": "x.png", "bboxes": [[0, 0, 1, 1]], "category": ["a"]}, "boxes labelled_image"),
    ({"image": "x.png", "boxes": [[0, 0, 1, 1]]}, ""),
    ({"images": [{"id": 1, "file_name": "x.png"}], "annotations": [], "categories": []}, "coco"),
    ({"messages": [{"role": "user", "content": "a"}], "images": ["x.png"]}, "vision_messages openai_messages"),
    ({"image": "x.png", "question": "q", "answer": "a"}, "image_question pairs"),
    ({"images": ["x.png"], "prompt": "q", "completion": "a"}, "image_question prompt_completion"),
    ({"image": "x.png", "caption": "a"}, "image_caption"),
    ({"path": "x.png", "text": "a"}, "image_caption text"),
    ({"image": "x.png", "conversations": [{"from": "human", "value": "a"}]}, "llava sharegpt"),
    ({"path": "a.py", "text": "x", "label": "y"}, "labelled_text text"),
    ({"path": "x.bin", "label": "y"}, ""),
    ({"image": "x.png", "annotation": "what it shows"}, ""),
]


@pytest.mark.parametrize(("row", "names"), DETECTED, ids=[", ".join(row) for row, _ in DETECTED])
def test_no_layout_is_taken_for_another_whatever_kinds_a_task_takes(row, names):
    found = {}
    for kind in {f.kind for f in FORMATS.discover().values()}:
        with contextlib.suppress(DataError):  # no format of this kind has these columns
            found[kind] = choose_format([Row(row, "here")], Wanted("auto", "here", (kind,))).name
    assert sorted(found.values()) == sorted(names.split())


@pytest.mark.parametrize(
    ("kind", "row", "fields"),
    [
        ("labelled_image", {"path": "x.png", "sentiment": "good "}, {"image": "x.png", "label": "good"}),
        ("labelled_image", {"image": "x.png", "path": "y.png", "labels": ["a", 3]},
         {"image": "x.png", "labels": ["a", "3"]}),
        ("labelled_audio", {"file": "x.wav", "score": "1.5"}, {"audio": "x.wav", "label": 1.5}),
        ("labelled_audio", {"audio": [0.0, 0.5], "sampling_rate": "8000", "label": 2},
         {"audio": {"array": [0.0, 0.5], "sampling_rate": 8000}, "label": 2}),
        ("audio_text", {"path": "x.wav", "transcript": "a b"}, {"audio": "x.wav", "text": "a b"}),
        ("image_mask", {"img": "x.png", "segmentation_map": "m.png"}, {"image": "x.png", "mask": "m.png"}),
        ("boxes", {"image": "x.png", "image_id": 7, "objects": {"bbox": [[1, 2, 3, 4.5]], "category": [2], "id": [9]}},
         {"image": "x.png", "id": 7, "boxes": [[1.0, 2.0, 3.0, 4.5]], "labels": ["2"]}),
        ("boxes", {"file_name": "x.png", "objects": [{"bbox": [1, 2, 3, 4], "category": "a", "iscrowd": 1}]},
         {"image": "x.png", "boxes": [[1.0, 2.0, 3.0, 4.0]], "labels": ["a"], "crowd": [True]}),
        ("boxes", {"image": "x.png", "boxes": "[[1,2,3,4]]", "labels": '["a"]', "crowd": "[0]"},
         {"image": "x.png", "boxes": [[1.0, 2.0, 3.0, 4.0]], "labels": ["a"]}),
        ("boxes", {"image": "x.png", "objects": []}, {"image": "x.png", "boxes": [], "labels": []}),
    ],
)  # fmt: skip
def test_rows_become_the_fields_of_their_kind(tmp_path, kind, row, fields):
    (example,), _ = load_examples(put(tmp_path, [row]), "auto", {}, kinds=(kind,))
    assert example.fields == fields
    assert example.root == str(tmp_path.resolve())


@pytest.mark.parametrize(
    ("kind", "row", "fields"),
    [
        ("labelled_image", {"image": "x.png"}, {"image": "x.png"}),
        ("labelled_audio", {"path": "x.wav"}, {"audio": "x.wav"}),
        ("audio_text", {"audio": "x.wav", "text": ""}, {"audio": "x.wav"}),
        ("image_mask", {"image": "x.png"}, {"image": "x.png"}),
        ("boxes", {"file_name": "x.png"}, {"image": "x.png"}),
        ("image_conversation", {"image": "x.png", "question": "q"},
         {"messages": [{"role": "user", "content": [
             {"type": "image", "image": "x.png"}, {"type": "text", "text": "q"}]}]}),
        ("image_conversation", {"image": "x.png"},
         {"messages": [{"role": "user", "content": [
             {"type": "image", "image": "x.png"}, {"type": "text", "text": "Describe the image."}]}]}),
    ],
)  # fmt: skip
def test_rows_to_predict_may_lack_the_answer(tmp_path, kind, row, fields):
    (example,), _ = load_examples(put(tmp_path, [row]), "auto", {}, kinds=(kind,), answered=False)
    assert example.fields == fields


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("labelled_image", {"image": "", "label": "a"}, "column 'image' is empty"),
        ("labelled_image", {"image": "x.png", "label": None}, "'label' is empty"),
        ("labelled_image", {"image": "x.png", "label": {"bytes": "x"}}, "must hold a class or a number, got dict"),
        ("labelled_audio", {"audio": [0.0], "sampling_rate": "fast", "label": 1}, "'sampling_rate' must be a number"),
        ("audio_text", {"audio": "x.wav", "text": " "}, "'text' is empty"),
        ("audio_text", {"audio": "x.wav", "text": 3}, "'text' must be text, got int"),
        ("image_mask", {"image": "x.png", "mask": ""}, "the mask is missing: 'mask' is empty"),
        ("boxes", {"image": "x.png", "objects": None}, "'objects' is empty; an image without any has empty lists"),
        ("boxes", {"image": "x.png", "objects": {"bbox": [[0, 0, 0, 4]], "category": [1]}},
         r"box 1 is \[0, 0, 0, 4\]: its width and height .* must be above 0"),
        ("boxes", {"image": "x.png", "objects": {"bbox": [[0, 0, 4]], "category": [1]}}, "box 1 has 3 numbers"),
        ("boxes", {"image": "x.png", "objects": {"bbox": [[0, 0, "4", 4]], "category": [1]}}, "four finite numbers"),
        ("boxes", {"image": "x.png", "objects": {"bbox": [[0, 0, 1, 1]], "category": []}}, "1 boxes but 0 categories"),
        ("boxes", {"image": "x.png", "objects": {"bbox": [[0, 0, 1, 1]], "category": [None]}}, "got None"),
        ("boxes", {"image": "x.png", "objects": {"bbox": [[0, 0, 1, 1]]}}, "must hold bbox and category; found: bbox"),
        ("boxes", {"image": "x.png", "objects": {"bbox": [[0, 0, 1, 1]], "category": [1], "iscrowd": [2]}},
         "iscrowd of box 1 is 2; allowed: 0, 1"),
        ("boxes", {"image": "x.png", "objects": [{"category": 1}]}, "object 1 has no bbox; found: category"),
        ("boxes", {"image": "x.png", "objects": 3}, "objects must be .* got int"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, name, row, said):
    path = put(tmp_path, "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said) as caught:
        load_examples(path, name, {})
    assert caught.value.where == f"{path}:2"


def test_a_box_that_is_not_finite_is_refused():
    row = {"image": PIL, "objects": {"bbox": np.array([[0.0, 0.0, np.inf, 1.0]]), "category": ["a"]}}
    with pytest.raises(DataError, match="four finite numbers") as caught:
        load_examples([row], "boxes", {})
    assert caught.value.where == "data[0]"


def coco(**changes):
    images = [{"id": 5, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}, {"id": 9, "file_name": "none.png"}]
    annotations = [
        {"id": 1, "image_id": 3, "category_id": 18, "bbox": [0, 1, 2.5, 3], "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 7, "bbox": [1, 1, 2, 2]},
        {"id": 3, "image_id": 3, "category_id": 7, "bbox": [4, 4, 1, 1], "iscrowd": 1},
    ]
    categories = [{"id": 7, "name": "cat"}, {"id": 18, "name": "dog"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories, **changes}


def test_a_coco_document_gives_an_example_for_each_image_with_names_crowds_and_its_own_ids(tmp_path):
    path = put(tmp_path, json.dumps(coco()), "instances.json")
    examples, name = load_examples(path, "auto", {}, kinds=("boxes",))
    assert name == "coco"
    assert [e.fields for e in examples] == [
        {"image": "b.png", "id": 5, "boxes": [[1, 1, 2, 2]], "labels": ["cat"]},
        {"image": "a.png", "id": 3, "boxes": [[0, 1, 2.5, 3], [4, 4, 1, 1]], "labels": ["dog", "cat"],
         "crowd": [False, True]},
        {"image": "none.png", "id": 9, "boxes": [], "labels": []},
    ]  # fmt: skip
    assert [e.where for e in examples] == [f"{path} row 1 [{n}]" for n in (1, 2, 3)]
    path = put(tmp_path, json.dumps(coco(annotations=None)), "test.json")
    examples, _ = load_examples(path, "auto", {}, kinds=("boxes",), answered=False)
    assert [e.fields for e in examples][:1] == [{"image": "b.png", "id": 5}]
    with pytest.raises(DataError, match="no 'annotations'"):
        load_examples(path, "auto", {}, kinds=("boxes",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": [{"id": 4, "image_id": 6, "category_id": 7, "bbox": [0, 0, 1, 1]}]},
         r"annotation 1 \(id 4\): image_id 6 is none of the images"),
        ({"annotations": [{"image_id": 5, "category_id": 8, "bbox": [0, 0, 1, 1]}]},
         "annotation 1: category_id 8 is none of the categories; known: 7, 18"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, -1]}] * 5},
         "annotation 1: .* must be above 0; .*; and 2 more"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "caption": "a"}]}, "annotation 1: there is no bbox"),
        ({"categories": [{"id": 7, "name": "cat"}, {"id": 18, "name": "cat"}]}, "'cat' stands twice"),
        ({"images": [{"id": 5, "file_name": "b.png"}, {"id": 5, "file_name": "a.png"}]}, "the id 5 stands twice"),
        ({"images": [{"id": 5, "file_name": "b.png"}, {"id": 3}]}, "image 2 has no file_name"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_coco_document_is_named_by_its_number_and_id(tmp_path, changes, said):
    path = put(tmp_path, json.dumps(coco(**changes)), "bad.json")
    with pytest.raises(DataError, match=said) as caught:
        load_examples(path, "auto", {}, kinds=("boxes",))
    assert caught.value.where == f"{path} row 1"


def test_media_of_every_column_type_are_found_and_read_alike(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.png").write_bytes(png())
    table = pa.table(
        {"image": [{"bytes": png(), "path": "gone.png"}, {"bytes": None, "path": "p/x.png"}], "label": [0, 1]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(pa.table({"file": [png()], "label": ["a"]}), tmp_path / "b.parquet")
    np.savez(tmp_path / "c.npz", images=np.stack([np.asarray(Image.open(io.BytesIO(png())))] * 2), labels=[4, 5])
    sources = {
        "a.parquet": [0, 1],
        "b.parquet": ["a"],
        "c.npz": [4, 5],
        put(tmp_path, "image,label\np/x.png,a\n", "d.csv"): ["a"],
        put(tmp_path, [{"image": np.asarray(PIL).tolist(), "label": "a"}], "e.jsonl"): ["a"],
    }
    for source, labels in sources.items():
        examples, name = load_examples(str(tmp_path / source), "auto", {}, kinds=("labelled_image",))
        assert (name, [e.fields["label"] for e in examples]) == ("labelled_image", labels)
        assert [type(e.fields["label"]) for e in examples] == [type(label) for label in labels]
        for example in examples:
            image = read_image(find_media(example.fields["image"], "image", example.root), max_pixels=100)
            assert (image.size, image.getpixel((0, 0))) == ((2, 3), (255, 0, 0)), source


def test_rows_in_memory_and_of_a_datasets_table_are_taken_as_they_are(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}], "label": [1]}, features=features)
    for data in (table, [{"image": PIL, "label": 1}], [(PIL, 1)], (PIXELS[None], np.array([1])), [(PIXELS, 1)]):
        (example,), name = load_examples(data, "auto", {}, kinds=("labelled_image",))
        assert (name, example.fields["label"]) == ("labelled_image", 1)
        media = find_media(example.fields["image"], "image", example.root)
        assert read_image(media, max_pixels=100).size == (2, 3)


def test_base64_of_a_part_is_decoded_and_an_address_is_left_to_be_refused(tmp_path):
    text = base64.b64encode(png()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        {"type": "image", "base64": text},
        {"type": "image", "url": "https://example.org/x.png"},
    ]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}
    (example,), _ = load_examples(put(tmp_path, [row]), "auto", {}, kinds=("image_conversation",))
    values = [p["image"] for p in example.fields["messages"][0]["content"]]
    assert values == [png(), png(), "https://example.org/x.png"]
    with pytest.raises(ValueError, match="nothing is downloaded"):
        find_media(values[2], "image", example.root)
    row["messages"][0]["content"][1]["base64"] = "%%"
    with pytest.raises(DataError, match="turn 1: the image is no base64 text"):
        load_examples(put(tmp_path, [row]), "vision_messages", {})
