"""GPT-2, whose projections are stored the other way round."""

from typing import Any

import gguf
from torch import Tensor

from lora_ft.exports._gguf.common import only
from lora_ft.exports._gguf.family import Family


def _parameters(writer: Any, config: Any) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)


def _change(name: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor.T if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else tensor


FAMILIES = (
    Family(
        ("gpt2",), gguf.MODEL_ARCH.GPT2, _parameters, _change, _change,
        leave_out=lambda name: name.endswith((".attn.bias", ".attn.masked_bias")),
        cannot=only(
            activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
        ),
    ),
)  # fmt: skip
