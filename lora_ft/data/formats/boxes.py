"""An image and the boxes of what is in it, as Hugging Face's detection sets have them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._values import absent, as_object
from lora_ft.registry import FORMATS

from ._boxes import box_fields
from ._media import NAMES, MediaFormat

BOXES = ("bbox", "bboxes", "boxes")
CLASSES = ("category", "categories", "label", "labels", "category_id")
CROWDS = ("iscrowd", "is_crowd", "crowd")
ALIASES = {"image": NAMES["image"][1:], "objects": BOXES}


class Boxes(MediaFormat):
    """Object detection, one image a row."""

    kind = "boxes"
    name = "boxes"
    description = (
        "image, objects: {bbox: [[x, y, width, height]], category: [...]} or a list of {bbox, category}; or columns "
        "boxes and labels."
    )
    required = ("image", "objects")
    answer = "objects"
    aliases = ALIASES
    medium = "image"

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """An image and objects, or boxes with a column of their classes."""
        together = "objects" in columns or not columns.isdisjoint(CLASSES)
        return together and super().matches(columns, first_rows)

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """The image, and the boxes where they are given."""
        fields: dict[str, Any] = {"image": self.medium_of(row)}
        number = row.get("image_id")
        if isinstance(number, int | str) and not absent(number):
            fields["id"] = number
        column = self.named("objects", row)
        if column is None or absent(row[column]):
            if answered:
                raise ValueError(
                    f"the boxes are missing: {'no such column' if column is None else f'{column!r} is empty'}; an "
                    "image without any has empty lists"
                )
            return fields
        objects = as_object(row["objects"], "objects") if column == "objects" else _objects_of_columns(row)
        return {**fields, **_fields(objects)}


def _objects_of_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    names = [n for n in (*BOXES, *CLASSES, *CROWDS) if not absent(row.get(n))]
    return {n: as_object(row[n], n) for n in names}


def _fields(objects: Any) -> dict[str, Any]:
    if isinstance(objects, Mapping):
        boxes, classes, crowd = (_first(objects, names) for names in (BOXES, CLASSES, CROWDS))
        if boxes is None or classes is None:
            raise ValueError(f"objects must hold bbox and category; found: {', '.join(objects) or '(nothing)'}")
        return box_fields(boxes, classes, crowd)
    if not isinstance(objects, list) or not all(isinstance(o, Mapping) for o in objects):
        raise ValueError(
            "objects must be {bbox: [...], category: [...]} or a list of {bbox, category}, got "
            f"{type(objects).__name__}"
        )
    boxes = [_needed(o, BOXES, n) for n, o in enumerate(objects, 1)]
    classes = [_needed(o, CLASSES, n) for n, o in enumerate(objects, 1)]
    return box_fields(boxes, classes, [_first(o, CROWDS) for o in objects])


def _first(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((values[n] for n in names if values.get(n) is not None), None)


def _needed(values: Mapping[str, Any], names: Sequence[str], number: int) -> Any:
    value = _first(values, names)
    if value is None:
        raise ValueError(f"object {number} has no {names[0]}; found: {', '.join(values) or '(nothing)'}")
    return value


FORMATS.register(Boxes())
