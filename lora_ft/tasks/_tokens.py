"""Text with marked spans -> token ids with labels; over-long rows; padding."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from lora_ft.records import Batch, Encoded, EncodeOptions, Sample

from ._base import IGNORE
from ._chat import Rendered


def encode_spans(rendered: Rendered, tokenizer: Any, *, special: bool) -> tuple[list[int], list[int]]:
    """Token ids, and labels that are -100 outside the spans.

    A token is labelled when it starts inside a span. After the last special token of a span (its end-of-turn), the
    template's trailing white space is not the assistant's and gets no label.

    Args:
        rendered: text and spans.
        tokenizer: with or without offsets.
        special: whether the tokenizer adds its own BOS and EOS (raw text) or the template already has (chat).
    """
    if not tokenizer.is_fast:
        return _encode_pieces(rendered, tokenizer, special)
    out = tokenizer(rendered.text, add_special_tokens=special, return_offsets_mapping=True)
    ids: list[int] = out["input_ids"]
    labels = [IGNORE] * len(ids)
    ends = special_ids(tokenizer)
    for start, end in rendered.spans:
        inside = [i for i, (a, b) in enumerate(out["offset_mapping"]) if start <= a < end and b > a]
        for i in _trim(inside, ids, ends, rendered.text, out["offset_mapping"]):
            labels[i] = ids[i]
    return ids, labels


def _trim(inside: list[int], ids: Sequence[int], ends: set[int], text: str, offsets: Sequence[Any]) -> list[int]:
    """Drop tokens of white space that follow the end token of a span."""
    last = max((n for n, i in enumerate(inside) if ids[i] in ends), default=None)
    if last is None or last + 1 == len(inside):
        return inside
    rest = text[offsets[inside[last + 1]][0] : offsets[inside[-1]][1]]
    return inside[: last + 1] if not rest.strip() else inside


def _encode_pieces(rendered: Rendered, tokenizer: Any, special: bool) -> tuple[list[int], list[int]]:
    """For tokenizers without offsets: the pieces between span borders, one by one."""
    ids: list[int] = []
    labels: list[int] = []
    cuts = sorted({0, len(rendered.text), *(c for span in rendered.spans for c in span)})
    starts = {s for s, _ in rendered.spans}
    for a, b in pairwise(cuts):
        piece = tokenizer.encode(rendered.text[a:b], add_special_tokens=special and a == 0)
        ids += piece
        labels += piece if a in starts else [IGNORE] * len(piece)
    return ids, labels


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens, also of those that have no named part (Gemma's end of turn)."""
    return {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}


def close(ids: list[int], labels: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Add a labelled end token after a final answer that has none, so that the model learns to stop."""
    if not labels or labels[-1] == IGNORE or ids[-1] in special_ids(tokenizer):
        return ids, labels
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def fit(ids: list[int], labels: list[int], options: EncodeOptions, where: str) -> Encoded:
    """One sample of at most `max_length` tokens, by the `overlong` policy; an answer is never cut.

    truncate_prompt drops tokens from the left of the prompt, but for a leading BOS-like first token.
    """
    limit = options.max_length
    if len(ids) <= limit:
        return Encoded((sample(ids, labels, where),))
    if options.overlong == "error":
        return Encoded((), "over max_length")
    first = next((i for i, x in enumerate(labels) if x != IGNORE), len(ids))
    if options.overlong == "drop" or len(ids) - first >= limit:
        return Encoded((), "dropped: longer than max_length")
    keep = limit - 1
    return Encoded((sample([ids[0], *ids[-keep:]], [labels[0], *labels[-keep:]], where),), "prompt truncated")


def pieces(ids: list[int], max_length: int, where: str) -> Encoded:
    """Raw text cut into samples of at most `max_length` tokens, all labelled."""
    parts = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    parts = [p for p in parts if len(p) > 1] or parts[:1]
    return Encoded(tuple(sample(p, p, where) for p in parts), "cut into pieces" if len(parts) > 1 else "")


def sample(ids: list[int], labels: list[int], where: str) -> Sample:
    """A sample; the first position can never be predicted, so its label does not count."""
    labelled = sum(x != IGNORE for x in labels[1:])
    return Sample({"input_ids": ids, "labels": labels}, len(ids), labelled, where)


def pad(samples: Sequence[Sample], pad_id: int) -> Batch:
    """input_ids, attention_mask and labels (B, T), padded on the right by position."""
    width = max(s.length for s in samples)
    ids = torch.full((len(samples), width), pad_id)
    labels = torch.full((len(samples), width), IGNORE)
    mask = torch.zeros((len(samples), width), dtype=torch.long)
    for row, s in enumerate(samples):
        ids[row, : s.length] = torch.tensor(s.inputs["input_ids"])
        labels[row, : s.length] = torch.tensor(s.inputs["labels"])
        mask[row, : s.length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
