"""COCO's JSON for detection: one document with images, annotations and categories."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._format import RowFormat
from lora_ft.registry import FORMATS

from ._boxes import box_fields, box_of, crowd_of, joined

Objects = Mapping[Any, list[Mapping[str, Any]]]


class Coco(RowFormat):
    """One example for each image of the document, in its order; an image without annotations has no boxes."""

    kind = "boxes"
    name = "coco"
    description = (
        "a COCO JSON document: images [{id, file_name}], annotations [{image_id, category_id, bbox}], categories; "
        "file_name starts from the JSON's folder, or from data.media_root."
    )
    required = ("images", "annotations", "categories")
    answer = "annotations"

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """A list of images that have a file_name, and one of annotations."""
        images = first_rows[0].get("images") if first_rows else None
        named = (
            isinstance(images, list) and bool(images) and isinstance(images[0], Mapping) and "file_name" in images[0]
        )
        return named and "annotations" in columns

    def group_of(self, fields: Mapping[str, Any], where: str) -> str:
        """The images of a document are rows of their own."""
        return ""

    def to_examples(self, row: Mapping[str, Any], answered: bool) -> list[dict[str, Any]]:
        """The images with their boxes; raises ValueError with the first few things that are wrong."""
        problems: list[str] = []
        images = _images(row["images"], problems)
        if row.get("annotations") is None:
            if answered:
                raise ValueError("the document has no 'annotations'")
            return _checked([{"image": i["file_name"], "id": i.get("id")} for i in images], problems)
        names = _names(row.get("categories"), problems)
        objects = _objects(row["annotations"], {i.get("id") for i in images}, names, problems)
        examples = [
            {
                "image": image["file_name"],
                "id": image.get("id"),
                **box_fields(
                    [o["bbox"] for o in objects[image.get("id")]],
                    [names[o["category_id"]] for o in objects[image.get("id")]],
                    [o.get("iscrowd") for o in objects[image.get("id")]],
                ),
            }
            for image in images
        ]
        return _checked(examples, problems)


def _checked(examples: list[dict[str, Any]], problems: Sequence[str]) -> list[dict[str, Any]]:
    if problems:
        raise ValueError(joined(problems))
    return examples


def _images(given: Any, problems: list[str]) -> list[Mapping[str, Any]]:
    """Images that have a file and a number of their own."""
    images, seen = [], set()
    for number, image in enumerate(_list(given, "images"), 1):
        identity = image.get("id")
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            problems.append(f"image {number} has no file_name")
        elif isinstance(identity, bool) or not isinstance(identity, int | str):
            problems.append(f"image {number} ({image['file_name']}) has no id")
        elif identity in seen:
            problems.append(f"image {number} ({image['file_name']}): the id {identity} stands twice")
        else:
            images.append(image)
        if isinstance(identity, int | str):
            seen.add(identity)
    return images


def _names(given: Any, problems: list[str]) -> dict[Any, str]:
    """The categories' names by id."""
    names: dict[Any, str] = {}
    for number, category in enumerate(_list(given, "categories"), 1):
        identity, name = category.get("id"), category.get("name")
        if not isinstance(identity, int | str) or not isinstance(name, str) or not name.strip():
            problems.append(f"category {number} needs an id and a name, got {dict(category)!r:.80}")
        elif identity in names or name in names.values():
            problems.append(f"category {number}: the id {identity} or the name {name!r} stands twice")
        else:
            names[identity] = name
    return names


def _objects(given: Any, images: set[Any], names: Mapping[Any, str], problems: list[str]) -> Objects:
    """Annotations that are right, by the id of their image."""
    objects: defaultdict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for number, annotation in enumerate(_list(given, "annotations"), 1):
        try:
            _check(annotation, number, images, names)
            objects[annotation["image_id"]].append(annotation)
        except ValueError as error:
            identity = f" (id {annotation['id']})" if "id" in annotation else ""
            problems.append(f"annotation {number}{identity}: {error}")
    return objects


def _check(annotation: Mapping[str, Any], number: int, images: set[Any], names: Mapping[Any, str]) -> None:
    image, category = annotation.get("image_id"), annotation.get("category_id")
    if image not in images:
        raise ValueError(f"image_id {image!r} is none of the images")
    if category not in names:
        known = ", ".join(map(str, list(names)[:10])) or "(none)"
        raise ValueError(f"category_id {category!r} is none of the categories; known: {known}")
    if "bbox" not in annotation:
        raise ValueError("there is no bbox")
    box_of(annotation["bbox"], number)
    crowd_of(annotation.get("iscrowd"), number)


def _list(given: Any, what: str) -> list[Mapping[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(g, Mapping) for g in given):
        raise ValueError(f"{what!r} must be a list of objects, got {type(given).__name__}")
    return given


FORMATS.register(Coco())
