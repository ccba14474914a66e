"""Keys that most decoders share."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import gguf
import torch
from torch import Tensor


def rope(config: Any) -> dict[str, Any]:
    """Parameters of the rotary embedding, of the layers with full attention where there are two kinds."""
    found = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    found = dict(found.get("full_attention") or found)
    found.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    found.setdefault("rope_type", "default")
    return found


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def decoder(writer: Any, config: Any, window: int | None = None) -> None:
    """Sizes, norms and rotary embedding of a decoder with gated feed-forward layers.

    Args:
        writer: of the gguf package.
        config: of Transformers.
        window: how far back a layer looks, where llama.cpp's layers of this kind look at everything: up to there the
            two are the same, so the file promises no more.
    """
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(rope(config)["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def scaled_rope(writer: Any, config: Any) -> None:
    """Linear and YaRN scaling; llama3's is in a tensor of its own."""
    found = rope(config)
    kind = found["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(found["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(found["factor"])
        writer.add_rope_scaling_orig_ctx_len(found["original_max_position_embeddings"])
        if found.get("attention_factor") is not None:  # llama.cpp multiplies its own by this
            writer.add_rope_scaling_attn_factors(
                float(found["attention_factor"]) / (0.1 * math.log(found["factor"]) + 1)
            )


def only(**allowed: tuple[Any, ...]) -> Callable[[Any], str]:
    """A reason against every config in which one of these settings, where there is one, has another value."""

    def cannot(config: Any) -> str:
        for name, values in allowed.items():
            got = getattr(config, name, None)
            if got is not None and got not in values:
                return f"{name} is {got!r}, and it computes with {' or '.join(map(repr, values))}"
        return ""

    return cannot


YARN = {"beta_fast": (32, 32.0), "beta_slow": (1, 1.0), "truncate": (True,), "mscale": (), "mscale_all_dim": ()}


def ropes(*kinds: str) -> Callable[[Any], str]:
    """A reason against rotary embeddings of another kind, or with settings that llama.cpp has fixed."""

    def cannot(config: Any) -> str:
        found = rope(config)
        if found["rope_type"] not in kinds:
            return f"rope_type is {found['rope_type']!r}, and it computes with {' or '.join(map(repr, kinds))}"
        odd = [n for n, fixed in YARN.items() if found.get(n) is not None and found[n] not in fixed]
        return f"{odd[0]} of its rotary embeddings is {found[odd[0]]!r}" if odd else ""

    return cannot


def each(*checks: Callable[[Any], str]) -> Callable[[Any], str]:
    """The first reason that any of them has."""
    return lambda config: next((reason for reason in (check(config) for check in checks) if reason), "")


def llama3_factors(config: Any) -> Iterable[tuple[str, Tensor]]:
    """Llama 3.1's slowing of low frequencies, as a divisor of each frequency (D/2,)."""
    found = rope(config)
    if found["rope_type"] != "llama3":
        return
    width = head_dim(config)
    frequencies = 1.0 / found["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    old, low, high = (found[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    divisors = []
    for frequency in frequencies.tolist():
        length = 2 * math.pi / frequency
        if length < old / high:
            divisors.append(1.0)
        elif length > old / low:
            divisors.append(float(found["factor"]))
        else:
            smooth = (old / length - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / found["factor"] + smooth))
    yield "rope_freqs.weight", torch.tensor(divisors, dtype=torch.float32)


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from Transformers' halves to llama.cpp's pairs."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def halve(weight: Tensor, heads: int) -> Tensor:
    """The way back."""
    return (
        weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )
