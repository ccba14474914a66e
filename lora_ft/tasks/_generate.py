"""Write answers in batches of similar length, and give them back in the order asked."""

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
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), options.batch_size):
        chosen = order[start : start + options.batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), pad_id)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with torch.inference_mode():
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
