"""How many tokens a model can read at once."""

from typing import Any

from torch import nn

from .load import tokenizer_of


def check_lengths(model: nn.Module, max_length: int, processor: Any) -> int:
    """`max_length`, or what a model with numbered positions can read when that is less.

    Args:
        model: of Transformers; weights are not needed.
        max_length: tokens wanted in a sample.
        processor: its tokenizer may know that fewer fit.
    """
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return max_length
    tables = [m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in n]
    # RoBERTa and its kin count positions from padding_idx + 1: the first rows of their table are no token's.
    idle = [m.padding_idx + 1 for m in tables if m.num_embeddings == limit and m.padding_idx is not None]
    told = getattr(tokenizer_of(processor), "model_max_length", limit)
    return int(min(max_length, told, limit - max(idle, default=0)))
