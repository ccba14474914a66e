"""Gemma 1, 2 and the text models of Gemma 3; their norms multiply by 1 + weight, llama.cpp's by the weight."""

from typing import Any

import gguf
from torch import Tensor

from lora_ft.exports._gguf.common import decoder, rope
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


def _change(name: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _undo(name: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor - 1 if name.endswith("norm.weight") else tensor


FAMILIES = (
    Family(("gemma",), gguf.MODEL_ARCH.GEMMA, _gemma, _change, _undo, reader="table"),
    Family(("gemma2",), gguf.MODEL_ARCH.GEMMA2, _gemma2, _change, _undo),
    Family(("gemma3_text",), gguf.MODEL_ARCH.GEMMA3, _gemma3, _change, _undo),
)
