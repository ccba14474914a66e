"""BERT as an encoder of sentences (MiniLM and the like); llama.cpp has no place for a task's own head."""

from typing import Any

import gguf

from lora_ft.exports._gguf.common import only
from lora_ft.exports._gguf.family import Family


def _parameters(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_type_count(config.type_vocab_size)
    writer.add_causal_attention(False)


FAMILIES = (
    Family(
        ("bert",), gguf.MODEL_ARCH.BERT, _parameters, rename=lambda name: name.removeprefix("bert."),
        leave_out=lambda name: "pooler." in name or name.endswith("position_ids"), auto_classes=("AutoModel",),
        cannot=only(hidden_act=("gelu",), position_embedding_type=("absolute",), is_decoder=(False,)), reader="table",
    ),
)  # fmt: skip
