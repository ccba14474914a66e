"""builtin:tiny-t5."""

from pathlib import Path

from torch import nn
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from ._write import write

VERSION = "1"
DESCRIPTION = "A T5 with 1.4 M RANDOM weights that reads bytes, to try recipes; knows nothing."
WIDTH = 128


def build(folder: Path) -> None:
    """Three layers of width 128 on either side."""
    tokenizer = ByT5Tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=512, num_layers=3, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.decoder_start_token_id = tokenizer.pad_token_id

    def spread(name: str, weight: nn.Parameter) -> float:
        """T5's own: its attention does not divide by the root of the head's width, its queries do."""
        if name == "shared.weight":
            return 1.0
        if name.endswith(".q.weight"):
            return float((config.d_model * config.d_kv) ** -0.5)
        return float((config.d_model if "relative_attention_bias" in name else weight.shape[1]) ** -0.5)

    write(T5ForConditionalGeneration(config), folder, tokenizer, spread)
