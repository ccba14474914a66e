"""Llama, Mistral and what is built like them (SmolLM, TinyLlama)."""

from dataclasses import replace
from typing import Any

import gguf
from torch import Tensor

from lora_ft.exports._gguf.common import (
    decoder,
    each,
    halve,
    head_dim,
    interleave,
    llama3_factors,
    only,
    ropes,
    scaled_rope,
)
from lora_ft.exports._gguf.family import Family


def _parameters(writer: Any, config: Any) -> None:
    decoder(writer, config, getattr(config, "sliding_window", None))
    scaled_rope(writer, config)
    writer.add_rope_dimension_count(head_dim(config))


def _heads(name: str, config: Any) -> int:
    """Heads of a query or key projection; 0 for other tensors."""
    if name.endswith(("q_proj.weight", "q_proj.bias")):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if name.endswith(("k_proj.weight", "k_proj.bias")) else 0


def _change(name: str, tensor: Tensor, config: Any) -> Tensor:
    heads = _heads(name, config)
    return interleave(tensor, heads) if heads else tensor


def _undo(name: str, tensor: Tensor, config: Any) -> Tensor:
    heads = _heads(name, config)
    return halve(tensor, heads) if heads else tensor


SILU = only(hidden_act=("silu", "swish"))
_LLAMA = Family(("llama",), gguf.MODEL_ARCH.LLAMA, _parameters, _change, _undo, more=llama3_factors, rows=_change,
                cannot=each(SILU, ropes("default", "linear", "yarn", "llama3")))  # fmt: skip
FAMILIES = (_LLAMA, replace(_LLAMA, types=("mistral",), reader="alone",
                           cannot=each(SILU, ropes("default", "linear", "yarn"))))  # fmt: skip
