"""A long context cut into windows that overlap, each beside the whole question; where in them an answer stands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Question and one part of the context.

    Attributes:
        inputs: what the model reads.
        offsets: characters [start, end) of the context under each token, -1 for other tokens (T, 2).
        null: the position that stands for "no answer here".
    """

    inputs: dict[str, list[int]]
    offsets: NDArray[np.int32]
    null: int


def windows_of(processor: Any, fields: Mapping[str, Any], limit: int, shared: int) -> list[Window]:
    """Question and context, the context in as many parts as it needs.

    Raises:
        ValueError: the question leaves no room for the context.
    """
    question = fields["question"].strip()
    taken = len(processor(question, add_special_tokens=False)["input_ids"])
    taken += processor.num_special_tokens_to_add(pair=True)
    if taken >= limit:
        raise ValueError(f"the question takes {taken} tokens, so max_length {limit} leaves no room for the context")
    out = processor(
        question,
        fields["context"],
        truncation="only_second",
        max_length=limit,
        stride=min(shared, (limit - taken) // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for i, ids in enumerate(out["input_ids"]):
        inputs = {name: list(out[name][i]) for name in ("input_ids", "token_type_ids") if name in out}
        pairs = zip(out["offset_mapping"][i], out.sequence_ids(i), strict=True)
        offsets = [(a, b) if part == 1 and b > a else (-1, -1) for (a, b), part in pairs]
        marks = [t for t in (processor.cls_token_id, processor.bos_token_id) if t is not None and t in ids]
        null = ids.index(marks[0]) if marks else 0
        windows.append(Window(inputs, np.asarray(offsets, dtype=np.int32).reshape(-1, 2), null))
    return windows


def spans_in(windows: Sequence[Window], answer: Mapping[str, Any]) -> list[Span | None]:
    """First and last token of the answer in each window, None where the window does not hold all of it.

    Raises:
        ValueError: no token covers any of its characters.
    """
    start, end = answer["start"], answer["start"] + len(answer["text"])
    every = np.concatenate([w.offsets for w in windows])
    inside = every[(every[:, 0] < end) & (every[:, 1] > start)]
    if not len(inside):
        raise ValueError(f"the answer {answer['text']!r} at character {start} is lost: the tokenizer drops it")
    spans: list[Span | None] = []
    for w in windows:
        first = (w.offsets[:, 0] == inside[:, 0].min()).nonzero()[0]
        last = (w.offsets[:, 1] == inside[:, 1].max()).nonzero()[0]
        spans.append((int(first[0]), int(last[-1])) if len(first) and len(last) else None)
    return spans
