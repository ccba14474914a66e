"""Gemma 1, 2 and the text models of Gemma 3; their norms multiply by 1 + weight, llama.cpp's by the weight."""

from typing import Any

import gguf
from torch import Tensor

from lora_ft.exports._gguf.common import decoder, each, head_dim, only, rope, ropes
from lora_ft.exports._gguf.family import Family


def _gemma(writer: Any, config: Any) -> None:
    decoder(writer, config)


def _gemma2(writer: Any, config: Any) -> None:
    decoder(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: Any, config: Any) -> None:
    decoder(writer, config)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    local = dict(getattr(config, "rope_parameters", None) or {}).get("sliding_attention") or {}
    writer.add_rope_freq_base_swa(local.get("rope_theta", getattr(config, "rope_local_base_freq", 10000.0)))
    if rope(config)["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope(config)["factor"])


_GELU = only(
    hidden_activation=("gelu_pytorch_tanh",), hidden_act=("gelu_pytorch_tanh", "gelu"), attention_bias=(False,)
)


def _scale(config: Any, large: int) -> str:
    """Of attention: llama.cpp has 1 / sqrt(head_dim), but for the model of 27B, which it knows by its blocks."""
    wanted = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == large else head_dim(config)
    got = config.query_pre_attn_scalar
    return f"query_pre_attn_scalar is {got}, and it computes with {wanted}" if got != wanted else ""


def _pattern(config: Any, every: int) -> str:
    """Which layers look at everything: each `every`-th."""
    whole = [kind == "full_attention" for kind in getattr(config, "layer_types", None) or ()]
    if all(is_whole == ((i + 1) % every == 0) for i, is_whole in enumerate(whole)):
        return ""
    return f"layer_types are not those of every such model: full attention in each {every}th layer"


def _soft_capped(config: Any) -> str:
    capped = config.attn_logit_softcapping and config.final_logit_softcapping
    return "" if capped else "soft caps are switched off"


def _odd2(config: Any) -> str:
    return _soft_capped(config) or _scale(config, 46) or _pattern(config, 2)


def _odd3(config: Any) -> str:
    return _scale(config, 62) or _pattern(config, 6)


def _change(name: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _undo(name: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor - 1 if name.endswith("norm.weight") else tensor


FAMILIES = (
    Family(
        ("gemma",), gguf.MODEL_ARCH.GEMMA, _gemma, _change, _undo, cannot=each(_GELU, ropes("default")), reader="table"
    ),
    Family(("gemma2",), gguf.MODEL_ARCH.GEMMA2, _gemma2, _change, _undo, cannot=each(_GELU, ropes("default"), _odd2)),
    Family(
        ("gemma3_text",),
        gguf.MODEL_ARCH.GEMMA3,
        _gemma3,
        _change,
        _undo,
        cannot=each(_GELU, ropes("default", "linear"), _odd3),
    ),
)
