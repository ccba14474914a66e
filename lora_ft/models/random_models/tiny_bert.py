"""builtin:tiny-bert."""

from pathlib import Path

from transformers import BertConfig, BertForPreTraining

from ._word_pieces import word_pieces
from ._write import write

VERSION = "1"
DESCRIPTION = "A BERT with 0.9 M RANDOM weights and a small WordPiece vocabulary, to try recipes; knows nothing."
WIDTH = 128


def build(folder: Path) -> None:
    """Three layers of width 128."""
    tokenizer = word_pieces()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=4 * WIDTH, pad_token_id=tokenizer.pad_token_id, initializer_range=0.08,
    )  # fmt: skip
    write(BertForPreTraining(config), folder, tokenizer, lambda *_: config.initializer_range)
