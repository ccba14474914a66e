"""Tags that mark spans (BIO, IOB, BIOES, BILOU, BMES) -> the spans."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

OUTSIDE = "O"
_INSIDE = {"I", "M", "E", "L"}  # what may continue a span
_OPEN = {"B", "I", "M"}  # what a span may go on after
_TAG = re.compile(r"([BIMELSU])-(.+)")


class Span(NamedTuple):
    """Words start to end - 1 are of this type."""

    start: int
    end: int
    type: str


def look_like_spans(tags: Iterable[str]) -> bool:
    """Whether all tags are O or a prefix, a hyphen and a type, and some are no O."""
    marks = set(tags) - {OUTSIDE}
    return bool(marks) and all(_TAG.fullmatch(t) for t in marks)


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The spans, as CoNLL's own script reads them.

    A span goes on where a continuing tag follows an open one of the same type; any other tag but O begins a new one,
    so that a wrong sequence still has a meaning.
    """
    starts = [i for i, (a, b) in enumerate(pairwise([OUTSIDE, *tags])) if b != OUTSIDE and not _continues(a, b)]
    ends = []
    for start in starts:
        end = start + 1
        while end < len(tags) and _continues(tags[end - 1], tags[end]):
            end += 1
        ends.append(end)
    return [Span(a, b, tags[a].partition("-")[2]) for a, b in zip(starts, ends, strict=True)]


def inside_of(tag: str) -> str:
    """The tag of a later part of a word with this tag."""
    return f"I-{tag[2:]}" if tag.startswith("B-") else tag


def _continues(before: str, tag: str) -> bool:
    (was, _, old), (now, _, new) = before.partition("-"), tag.partition("-")
    return now in _INSIDE and was in _OPEN and old == new
