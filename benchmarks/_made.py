"""Models that benchmarks make from a seed."""

from pathlib import Path
from typing import Any

import torch

LLAMA = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def make_llama(folder: Path) -> Any:
    """A Llama of 411M parameters in bfloat16, random, written to `folder` in files of 200 MB; returns it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    return model
