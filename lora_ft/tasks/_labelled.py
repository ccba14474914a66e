"""Rows of one text or two that a model reads to give one answer: encoding, and what comes back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ft.errors import DivergedError
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Sample

from ._base import Outputs, text_batch


def encode_text(
    example: Example, processor: Any, options: EncodeOptions, answer: Mapping[str, Any], label: str = ""
) -> Encoded:
    """One sample of the row's text or pair of texts; of a pair that is too long, the longer text is cut.

    Args:
        example: with `text` and maybe `text_pair`.
        processor: tokenizer.
        options: how long, and what happens to longer rows.
        answer: {"labels": ...}, or nothing where the row has none.
        label: its class, for balanced sampling.

    Raises:
        ValueError: the text gives no token.
    """
    texts = text_and_pair(example)
    out = processor(*texts, verbose=False)
    if not out["input_ids"]:
        raise ValueError("the text gives no token")
    extra: dict[str, Any] = dict(answer)
    outcome = ""
    if len(out["input_ids"]) > options.max_length:
        if options.overlong in ("drop", "error"):
            over = "over max_length" if options.overlong == "error" else "dropped: longer than max_length"
            return Encoded((), over)
        out = processor(*texts, truncation=True, max_length=options.max_length)
        extra["cut"], outcome = 1, "truncated"
    inputs = {k: out[k] for k in ("input_ids", "token_type_ids") if k in out} | extra
    return Encoded((Sample(inputs, len(out["input_ids"]), int("labels" in answer), example.where, label),), outcome)


def text_and_pair(example: Example) -> list[str]:
    """The row's text, and the second where there is one."""
    pair = example.fields.get("text_pair")
    return [example.fields["text"], *([] if pair is None else [pair])]


def shown_text(example: Example) -> str:
    """The row's text for people."""
    return "\n".join(text_and_pair(example))


def labelled_batch(samples: Sequence[Sample], processor: Any) -> Batch:
    """The padded texts; labels (B,) or (B, labels) where all samples have them."""
    batch = text_batch(samples, processor)
    if all("labels" in s.inputs for s in samples):
        batch["labels"] = torch.tensor([s.inputs["labels"] for s in samples])
    return batch


def stacked_logits(places: Sequence[str], outputs: Sequence[Outputs]) -> Tensor:
    """(rows, labels) in float64, of the rows at these places.

    Raises:
        DivergedError: some are not finite, so no metric of them means anything.
    """
    logits = torch.stack([o["logits"] for o in outputs]).double()
    bad = (~logits.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        raise DivergedError(
            f"the model's answer to {len(bad)} of {len(places)} rows is not a finite number",
            where=places[bad[0]],
            why="the weights have diverged, or the dtype is too narrow for this model",
            fix="a smaller learning rate, or --set train.dtype=float32",
        )
    return logits
