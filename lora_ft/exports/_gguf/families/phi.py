"""Phi 3, 3.5 and 4 with plain rotary embeddings."""

from typing import Any

import gguf

from lora_ft.exports._gguf.common import decoder, each, head_dim, only, ropes, scaled_rope
from lora_ft.exports._gguf.family import Family


def _parameters(writer: Any, config: Any) -> None:
    decoder(writer, config, config.sliding_window)
    scaled_rope(writer, config)
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * head_dim(config)))
    writer.add_rope_scaling_orig_ctx_len(
        getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    )
    writer.add_sliding_window(config.sliding_window or 0)


_CANNOT = each(only(hidden_act=("silu", "swish")), ropes("default", "linear", "yarn"))
FAMILIES = (Family(("phi3",), gguf.MODEL_ARCH.PHI3, _parameters, cannot=_CANNOT),)
