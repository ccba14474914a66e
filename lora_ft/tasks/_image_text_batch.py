"""Batches of token ids and images: for training, and for answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.media import Media
from lora_ft.records import Batch, PredictOptions, moved

from ._base import in_dtype_of
from ._generate import batches, generate, reads_prompts
from ._image_text import processed
from ._images import rgb


@dataclass(frozen=True, slots=True)
class Row:
    """A text with its images.

    Attributes:
        text: as the template rendered it.
        ids: of it, with expanded images.
        images: in the order of their marks.
    """

    text: str
    ids: Sequence[int]
    images: Sequence[Media]


def model_inputs(rows: Sequence[Row], processor: Any, *, left: bool = False) -> Batch:
    """All that the model takes of the rows, padded on the right or, to be continued, on the left.

    Whatever the processor gives for each token besides ids (kinds of tokens, say) is padded with 0.
    """
    tokenizer = processor.tokenizer
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    made = processed(processor, [r.text for r in rows], [[rgb(m) for m in r.images] for r in rows])
    batch: Batch = {
        "input_ids": _filled([r.ids for r in rows], pad_id, left),
        "attention_mask": _filled([[1] * len(r.ids) for r in rows], 0, left),
    }
    lengths = [len(r.ids) for r in rows]
    for name, value in made.items():
        if name in batch:
            continue
        aligned = isinstance(value, list) and [_length(v) for v in value] == lengths
        batch[name] = _filled(value, 0, left) if aligned else torch.as_tensor(value)
    return batch


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else -1


def _filled(rows: Sequence[Sequence[int]], fill: int, left: bool) -> Tensor:
    """(B, T)."""
    width = max(len(r) for r in rows)
    out = torch.full((len(rows), width), fill)
    for i, row in enumerate(rows):
        start = width - len(row) if left else 0
        out[i, start : start + len(row)] = torch.as_tensor(row)
    return out


def write_answers(
    model: nn.Module, processor: Any, rows: Sequence[Row], options: PredictOptions, ends: list[int]
) -> Iterator[tuple[int, list[int]]]:
    """As `generate`, for prompts with images; in order of prompt length."""
    device = next(model.parameters()).device
    for chosen in batches([list(r.ids) for r in rows], options.batch_size, reads_prompts(model)):
        batch = moved(in_dtype_of(model, model_inputs([rows[i] for i in chosen], processor, left=True)), device)
        seen: Mapping[str, Any] = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
        prompts = [list(rows[i].ids) for i in chosen]  # in order of length already, which `generate` keeps
        for n, new in generate(model, processor.tokenizer, prompts, options, ends, seen):
            yield chosen[n], new
