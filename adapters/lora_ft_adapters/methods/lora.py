"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): y = W x + (lora_alpha / r) B A x.

A starts Kaiming-uniform and B at zero, so a fresh adapter is a no-op. Its variants are LoRA with one option set.
"""

from typing import Any

from peft import LoraConfig

from lora_ft_adapters.registry import Method, register
from lora_ft_adapters.shapes import at_most

# r=16 with lora_alpha=32 on all linear layers: the learning rate that is best then hardly depends on r, and is about
# 10x that of full fine-tuning (Schulman et al., "LoRA without regret", 2025).
DEFAULTS = {"r": 16, "lora_alpha": 32}


def _variant(name: str, description: str, **extra: Any) -> None:
    defaults = {**DEFAULTS, **extra.pop("defaults", {})}
    extra.setdefault("targets", "body")
    register(Method(name, description, LoraConfig, defaults=defaults, family="LoRA", **extra))


_variant("lora", "Low-rank update of frozen linear, conv and embedding layers; merges into the base.")
_variant(
    "rslora",
    "LoRA scaled by lora_alpha / sqrt(r), stable at high rank (Kalajdzievski 2023, arXiv:2312.03732).",
    fixed={"use_rslora": True},
    # Scaled by sqrt(r), lora_alpha=8 gives the same strength at r=16 as plain LoRA's 32 does.
    defaults={"lora_alpha": 8},
)
_variant(
    "dora",
    "LoRA on the direction of each weight, with a trained magnitude per output (Liu et al. 2024, arXiv:2402.09353).",
    fixed={"use_dora": True},
)
_variant(
    "orthogonal",
    "LoRA whose A and B start orthogonal to each other, so that B A = 0 without zeros; r must be even.",
    fixed={"init_lora_weights": "orthogonal"},
    targets="all-linear",
)
_variant(
    "mica",
    "LoRA whose B is frozen at the least singular directions of W; only A trains (MiCA, arXiv:2604.01694).",
    fixed={"init_lora_weights": "mica"},
    targets="all-linear",
    fit=at_most("r", DEFAULTS["r"], min),
)
_variant(
    "loraplus",
    "LoRA whose B learns 16 times as fast as A (LoRA+, Hayou et al. 2024, arXiv:2402.12354).",
    # The paper's ratio; the rate of A is halved so that B does not diverge where plain LoRA's rate is used.
    lr_scales={"lora_B": 8.0, "lora_embedding_B": 8.0, "lora_A": 0.5, "lora_embedding_A": 0.5},
)
