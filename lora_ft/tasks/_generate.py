"""Write answers in batches of similar length, and give them back in the order asked."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lora_ft.records import PredictOptions


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], options: PredictOptions, ends: list[int]
) -> Iterator[tuple[int, list[int]]]:
    """Greedy continuations of token prompts.

    Yields:
        (index of the prompt, new token ids without the end token), in order of prompt length.
    """
    device = next(model.parameters()).device
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for chosen in _batches(prompts, options.batch_size, _reads_prompts(model)):
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), pad_id)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Position ids are not supported"
            )  # none are needed without padding
            out = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends,
                pad_token_id=pad_id,
            )
        for row, i in enumerate(chosen):
            new = out[row, width:].tolist()
            stop = next((n for n, t in enumerate(new) if t in ends), len(new))
            yield i, new[:stop]


def _reads_prompts(model: Any) -> bool:
    """Whether trained tokens stand before the input: then padding between them and the input changes the answer."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _batches(prompts: Sequence[list[int]], size: int, even: bool) -> Iterator[list[int]]:
    """Indices in order of length, up to `size` at a time, of equal length when `even`."""
    chosen: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if len(chosen) == size or (chosen and even and len(prompts[i]) != len(prompts[chosen[0]])):
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen
