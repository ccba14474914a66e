"""builtin:tiny-wav2vec2."""

import json
import math
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    Wav2Vec2Processor,
)

from ._write import draw, fan_in, save

VERSION = "1"
DESCRIPTION = "A wav2vec 2.0 with 0.3 M RANDOM weights that reads 16 kHz sound, to try recipes; knows nothing."
WIDTH = 96
CHANNELS = 48
LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *string.ascii_lowercase, "'")


def processor() -> Wav2Vec2Processor:
    """A feature extractor for 16 kHz, and a tokenizer of lower-case letters whose padding is CTC's blank."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(str(path))  # type: ignore[no-untyped-call]
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)  # type: ignore[no-untyped-call]
    return Wav2Vec2Processor(extractor, tokenizer)  # type: ignore[no-untyped-call]


def build(folder: Path) -> None:
    """Three convolutions where the original has seven, a position every 20 ms as there, and two layers of width 96."""
    config = Wav2Vec2Config(
        vocab_size=len(LETTERS), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=2 * WIDTH, conv_dim=(CHANNELS,) * 3, conv_kernel=(10, 16, 8), conv_stride=(5, 8, 8),
        feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, classifier_proj_size=WIDTH, pad_token_id=0, mask_time_prob=0.0,
    )  # fmt: skip
    model = Wav2Vec2Model(config)

    def spread(name: str, weight: nn.Parameter) -> float:
        """A signal keeps its size through ReLU-like convolutions; attention starts soft."""
        return fan_in(name, weight) if "conv_layers" in name else math.sqrt(1.0 / weight[0].numel())

    draw(model, spread)
    _normalise(model)
    save(model, folder, processor())


def _normalise(model: Any) -> None:
    """The gain of the weight-normalised convolution is the length of its directions, as PyTorch starts it."""
    weights = model.encoder.pos_conv_embed.conv.parametrizations.weight
    with torch.no_grad():
        direction = weights.original1
        weights.original0.copy_(direction.pow(2).sum((0, 1), keepdim=True).sqrt())
