"""Write answers in batches of similar length, and give them back in the order asked."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.records import PredictOptions


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    options: PredictOptions,
    ends: list[int],
    settings: Mapping[str, Any] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """What the model writes after token prompts or, with an encoder, from token sources.

    Args:
        model: decoder, or encoder and decoder.
        tokenizer: of the model.
        prompts: token ids.
        options: length and batch size.
        ends: ids of the tokens that end an answer.
        settings: further ones for the model's `generate`; greedy without any.

    Yields:
        (index of the prompt, new token ids without the end token), in order of prompt length.
    """
    device = next(model.parameters()).device
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for chosen in batches(prompts, options.batch_size, reads_prompts(model)):
        ids, mask = _padded([prompts[i] for i in chosen], pad_id, left=not encodes)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Position ids are not supported"
            )  # none are needed without padding
            out = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=options.max_new_tokens,
                max_length=None,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends,
                pad_token_id=pad_id,
                **(settings or {}),
            )
        given = 1 if encodes else ids.shape[1]  # a decoder of its own begins with its start token
        for row, i in enumerate(chosen):
            new = out[row, given:].tolist()
            stop = next((n for n, t in enumerate(new) if t in ends), len(new))
            yield i, new[:stop]


def in_order(written: Iterable[tuple[int, list[int]]]) -> Iterator[tuple[int, list[int]]]:
    """The same by index, each as soon as all before it are there."""
    done: dict[int, list[int]] = {}
    next_up = 0
    for index, new in written:
        done[index] = new
        while next_up in done:
            yield next_up, done.pop(next_up)
            next_up += 1


def _padded(prompts: Sequence[list[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T): what a decoder goes on from ends at the right edge, what an encoder reads starts at 0."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if left else 0
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


def reads_prompts(model: Any) -> bool:
    """Whether trained tokens stand before the input: then padding between them and the input changes the answer."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def batches(prompts: Sequence[list[int]], size: int, even: bool) -> Iterator[list[int]]:
    """Indices in order of length, up to `size` at a time, of equal length when `even`."""
    chosen: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if len(chosen) == size or (chosen and even and len(prompts[i]) != len(prompts[chosen[0]])):
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen
