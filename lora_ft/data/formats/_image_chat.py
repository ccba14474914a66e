"""Conversations with images: what the formats for image-text models share."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data._conversation import check_messages
from lora_ft.data._media_kind import kind_of
from lora_ft.data._values import absent, as_object

MARK = "<image>"  # where an image stands in the text of LLaVA's and TRL's data
COLUMNS = ("images", "image", "img", "image_path")
PICTURES = ("image", "image_url", "input_image")
TEXTS = ("text", "input_text", "output_text")
SOURCES = ("image", "path", "url", "bytes", "base64", "image_url")

Part = dict[str, Any]


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images of the row's own columns, in order; none where the row has no such column, or an empty one."""
    name = next((c for c in COLUMNS if c in row and not absent(row[c])), None)
    if name is None:
        return []
    value = row[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = as_object(value, name)
    several = isinstance(value, list | tuple) and kind_of(value) == ""  # lists of numbers are one image
    images = list(value) if several else [value]
    for number, image in enumerate(images, 1):
        if absent(image):
            raise ValueError(f"image {number} of column {name!r} is empty")
    return images


def filled(messages: Any, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages whose content is a list of parts {type: text, text} and {type: image, image}.

    Args:
        messages: with content as text or as parts; `<image>` in a text is an image part where the row has images.
        images: fill the image parts that name no image of their own, in order; where there is no image part at all,
            they stand before the first user's text.

    Raises:
        ValueError: messages that are none, an empty turn, or another number of images than of parts.
    """
    turns = messages if isinstance(messages, list) else []
    parts = [_parts(t.get("content"), n, bool(images)) for n, t in enumerate(turns, 1) if isinstance(t, Mapping)]
    if len(parts) == len(turns):
        turns = [{**t, "content": _text(p)} for t, p in zip(turns, parts, strict=True)]
    checked = check_messages(turns if isinstance(messages, list) else messages)
    _check_turns(checked, parts)
    if images and not any(p["type"] == "image" for turn in parts for p in turn):
        first = next((p for m, p in zip(checked, parts, strict=True) if m["role"] == "user"), None)
        if first is None:
            raise ValueError("there are images, but no turn of the user that they could stand in")
        first[:0] = [{"type": "image"} for _ in images]
    open_parts = [p for turn in parts for p in turn if p["type"] == "image" and "image" not in p]
    if len(open_parts) != len(images):
        raise ValueError(f"the messages have {len(open_parts)} places for images, but the row has {len(images)} images")
    for part, image in zip(open_parts, images, strict=True):
        part["image"] = image
    return [{**m, "content": p} for m, p in zip(checked, parts, strict=True)]


def _check_turns(messages: Sequence[Mapping[str, Any]], parts: Sequence[Sequence[Part]]) -> None:
    for number, (message, turn) in enumerate(zip(messages, parts, strict=True), 1):
        if not turn and not message.get("tool_calls"):
            raise ValueError(f"turn {number} is empty")
        if message["role"] == "assistant" and any(p["type"] == "image" for p in turn):
            raise ValueError(f"turn {number}: an assistant's answer can hold text only, not an image")


def _text(parts: Sequence[Part]) -> str:
    return "".join(p["text"] for p in parts if p["type"] == "text")


def _parts(content: Any, number: int, marked: bool) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return _split(content) if marked and MARK in content else [_text_part(content)] if content.strip() else []
    if not isinstance(content, list):
        raise ValueError(f"turn {number}: content must be text or a list of parts, got {type(content).__name__}")
    return [_part(p, number) for p in content if not _blank(p)]


def _split(text: str) -> list[Part]:
    """Text and image parts; line breaks beside an image belong to the mark."""
    parts: list[Part] = []
    for index, piece in enumerate(text.split(MARK)):
        parts += [{"type": "image"}] if index else []
        stripped = piece.strip("\n")
        parts += [_text_part(stripped)] if stripped.strip() else []
    return parts


def _blank(part: Any) -> bool:
    if isinstance(part, Mapping) and part.get("type", "text") in TEXTS:
        part = part.get("text")
        return part is None or (isinstance(part, str) and not part.strip())
    return isinstance(part, str) and not part.strip()


def _part(part: Any, number: int) -> Part:
    if isinstance(part, str):
        return _text_part(part)
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind in TEXTS and isinstance(part["text"], str):
        return _text_part(part["text"])
    if kind not in PICTURES:
        raise ValueError(
            f"turn {number}: a part of type {kind!r}" + (" whose text is none" if kind in TEXTS else "")
            + "; allowed: {type: text, text} and {type: image}"
        )  # fmt: skip
    source = next((part[name] for name in SOURCES if part.get(name) is not None), None)
    return {"type": "image"} if source is None else {"type": "image", "image": _source(part, source, number)}


def _text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def _source(part: Mapping[str, Any], source: Any, number: int) -> Any:
    """The image that a part names itself, with base64 text decoded."""
    if isinstance(source, Mapping) and "url" in source:
        source = source["url"]
    if not isinstance(source, str):
        return source
    encoded = source if part.get("base64") is not None else source.partition(";base64,")[2]
    if part.get("base64") is None and not source.startswith("data:"):
        return source
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"turn {number}: the image is no base64 text: {error}") from error
