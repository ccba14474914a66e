"""What labels examples carry, whichever field holds them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.records import Example

LABELS = ("label", "labels", "tags", "answers", "target")
FREE = ("completion", "negative")
NOT_INPUT = frozenset({*LABELS, *FREE, "id", "mask", "boxes", "crowd"})
MEDIA = frozenset({"image", "audio", "mask"})
FEW = 2  # so many different labels are classes however few rows there are


def classes(examples: Sequence[Example], field: str = "label") -> list[str] | None:
    """The class of each example, or None where labels are several, missing, choices' indices, or quantities.

    Whole numbers and text are classes, unless more than half of the rows have a label of their own or text is written
    with a decimal point.
    """
    labels = [None if "choices" in e.fields else e.fields.get(field) for e in examples]
    if not labels or not all(isinstance(v, str | int) and not isinstance(v, bool) for v in labels):
        return None
    names = [str(v) for v in labels]
    different = set(names)
    own = len(different) > max(FEW, len(names) / 2)
    return None if own or _quantities(different) else names


def labels_of(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """The class of each example, its several labels, or its tags; nothing where labels are quantities."""
    for field in ("label", "target"):
        found = classes(examples, field)
        if found is not None:
            return [(name,) for name in found]
    return [tuple(e.fields.get("labels", e.fields.get("tags", ()))) for e in examples]


def _quantities(names: set[str]) -> bool:
    """Whether all are numbers and not all of them whole."""
    try:
        return not all(float(n).is_integer() and "." not in n for n in names)
    except (ValueError, OverflowError):
        return False


@dataclass(frozen=True, slots=True)
class Content:
    """What an example says, in forms that can be compared and looked up.

    Attributes:
        given: what a model is given of it.
        label: its label, whatever the form; None where there is none, and for free text, which may rightly differ.
        rest: all else but its id.
    """

    given: Any
    label: Any
    rest: Any


def content_of(example: Example) -> Content:
    """The parts of an example; a file of an image or sound stands for what is in it."""
    fields: dict[str, Any] = _with_files(example.fields, example.root)
    given = {k: v for k, v in fields.items() if k not in NOT_INPUT}
    rest = {k: v for k, v in fields.items() if k in FREE or k == "boxes"}
    messages = fields.get("messages")
    if messages and messages[-1].get("role") == "assistant":
        given["messages"], rest["answer"] = messages[:-1], messages[-1]
    label = {k: v for k, v in fields.items() if k in LABELS}
    return Content(frozen(given), frozen(label) if label else None, frozen(rest) if rest else None)


def _with_files(value: Any, root: str) -> Any:
    """The value with the digests of the files of its images and sounds, however deep."""
    if isinstance(value, Mapping):
        return {k: _read(v, root) if k in MEDIA else _with_files(v, root) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_files(v, root) for v in value]
    return value


def _read(value: Any, root: str) -> Any:
    """The digest of a file below the root, so that two files of one name are two images; all else as it is."""
    if not isinstance(value, str) or not (path := Path(root, value)).is_file():
        return value
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def frozen(value: Any) -> Any:
    """The same value, hashable; equal exactly when the values are."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return tuple(sorted((k, frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(frozen(v) for v in value)
    if hasattr(value, "getbands"):  # a PIL image
        return (value.size, value.mode, value.tobytes())
    if hasattr(value, "tobytes"):
        return (value.shape, value.dtype.str, value.tobytes())
    return value
