"""Qwen 2 and 2.5, and Qwen 3 without experts."""

from typing import Any

import gguf

from lora_ft.exports._gguf.common import decoder, each, only, ropes, scaled_rope
from lora_ft.exports._gguf.family import Family


def _parameters(writer: Any, config: Any) -> None:
    decoder(writer, config, getattr(config, "sliding_window", None))
    scaled_rope(writer, config)


_CANNOT = each(only(hidden_act=("silu", "swish")), ropes("default", "linear", "yarn"))
FAMILIES = (
    Family(("qwen2",), gguf.MODEL_ARCH.QWEN2, _parameters, cannot=_CANNOT),
    Family(("qwen3",), gguf.MODEL_ARCH.QWEN3, _parameters, cannot=each(only(attention_bias=(False,)), _CANNOT)),
)
