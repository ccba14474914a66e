"""Predictions as files: JSON lines, masks as PNG files beside them, boxes also as COCO JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_ft import runs
from lora_ft.media import write_mask
from lora_ft.records import Prediction

MASK = "mask"  # of `Prediction.details`: class ids (H, W)


def answer_rows(predictions: Sequence[Prediction], right: Sequence[bool] = ()) -> list[dict[str, Any]]:
    """Predictions as rows for a file, with the verdict where there is one; masks are left out."""
    rows = [
        {
            "where": p.where, "input": p.input, "output": p.output, "reference": p.reference,
            **{k: v for k, v in p.details.items() if not hasattr(v, "shape")},
        }
        for p in predictions
    ]  # fmt: skip
    return [{**r, "right": ok} for r, ok in zip(rows, right, strict=True)] if right else rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    runs.write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def write_predictions(output: Path, predictions: Sequence[Prediction], *, coco: bool) -> list[Path]:
    """Write them to `output`; masks go to OUTPUT.masks/, boxes also to OUTPUT.coco.json.

    Args:
        output: of the JSON lines, which name the masks.
        predictions: in the order of the rows.
        coco: whether they are boxes.

    Returns:
        What was written.
    """
    written = [output]
    folder = output.with_name(f"{output.name}.masks")
    rows = []
    for number, one in enumerate(predictions, 1):
        if MASK in one.details:
            folder.mkdir(exist_ok=True)
            path = folder / f"{number:06d}.png"
            write_mask(path, one.details[MASK])
            one = replace(one, details={**one.details, MASK: f"{folder.name}/{path.name}"})
        rows.append(one)
    if folder.is_dir():
        written.append(folder)
    write_rows(output, answer_rows(rows))
    if coco:
        path = output.with_name(f"{output.name}.coco.json")
        runs.write_text(path, json.dumps(_coco(predictions), ensure_ascii=False))
        written.append(path)
    return written


def _coco(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """A COCO document: images, categories, and a scored annotation for each box, [x, y, width, height] in pixels."""
    names = sorted({name for p in predictions for name in p.details["labels"]})
    ids = {name: i for i, name in enumerate(names, 1)}
    images: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, one in enumerate(predictions, 1):
        size = {k: one.details[k] for k in ("width", "height") if k in one.details}
        images.append({"id": number, "file_name": one.input, **size})
        for box, label, score in zip(*(one.details[k] for k in ("boxes", "labels", "scores")), strict=True):
            found.append(
                {
                    "id": len(found) + 1, "image_id": number, "category_id": ids[label], "bbox": box, "score": score,
                    "area": box[2] * box[3], "iscrowd": 0,
                }
            )  # fmt: skip
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return {"images": images, "categories": categories, "annotations": found}
