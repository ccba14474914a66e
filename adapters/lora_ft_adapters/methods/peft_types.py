"""PEFT's types whose defaults do not fit every model: what they wrap, and sizes chosen from the model's layers.

C3A and FourierFT get `init_weights: true`, zeros, so that a fresh adapter is a no-op; PEFT's default is random.
"""

from collections.abc import Mapping
from typing import Any

from peft import (
    BOFTConfig,
    C3AConfig,
    CPTConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    MissConfig,
    OFTConfig,
    PsoftConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    VBLoRAConfig,
    WaveFTConfig,
    XLoraConfig,
)
from torch import nn

from lora_ft_adapters.modules import is_linear
from lora_ft_adapters.registry import Method, register
from lora_ft_adapters.shapes import at_most, divides
from lora_ft_adapters.targets import plain_modules

View = Mapping[str, Any]


def _norms(view: View, model: nn.Module) -> dict[str, Any]:
    """The normalisation layers: modules named or typed as norms that have a weight."""
    names = [n for n, m in plain_modules(model) if "norm" in type(m).__name__.lower() and hasattr(m, "weight")]
    return {"target_modules": names} if names else {}


def _ia3(view: View, model: nn.Module) -> dict[str, Any]:
    """Keys, values and the input of the feed-forward's last layer where they can be told; else all outputs."""
    names = [n for n, m in plain_modules(model) if is_linear(m)]
    last = {n: n.rsplit(".", 1)[-1].lower() for n in names}
    keys = [n for n in names if last[n] in ("k_proj", "v_proj", "key", "value", "k", "v")]
    down = [n for n in names if last[n] in ("down_proj", "fc2", "output_dense", "wo", "w2")]
    return {"target_modules": keys + down, "feedforward_modules": down} if keys and down else {
        "target_modules": "all-linear", "feedforward_modules": [],
    }  # fmt: skip


def _ours(name: str, description: str, config_class: Any, **extra: Any) -> None:
    register(Method(name, description, config_class, **extra))


_ours(
    "ia3",
    "Scales keys, values and feed-forward activations by trained vectors (Liu et al. 2022, arXiv:2205.05638).",
    IA3Config,
    targets=None,
    fit=_ia3,
)
_ours("ln_tuning", "Trains normalisation layers only (Zhao et al. 2023, arXiv:2312.11420).", LNTuningConfig,
      targets=None, fit=_norms)  # fmt: skip
_ours("boft", "Butterfly-factorised orthogonal rotation of each weight (Liu et al. 2023, arXiv:2311.06243).",
      BOFTConfig, fit=divides("boft_block_size", 4, outputs=False))  # fmt: skip
_ours("oft", "Block-diagonal orthogonal rotation of each weight (Qiu et al. 2023, arXiv:2306.07280).", OFTConfig,
      fit=divides("oft_block_size", 32, outputs=False))  # fmt: skip
_ours("c3a", "Circular convolution of blocks of each weight (Chen et al. 2024, arXiv:2407.19342).", C3AConfig,
      defaults={"init_weights": True}, fit=divides("block_size", 256))  # fmt: skip
_ours("road", "2-D rotations of groups of output features (Liao and Monz 2024, arXiv:2409.00119).", RoadConfig,
      fit=divides("group_size", 64, inputs=False))  # fmt: skip
_ours("fourierft", "Sparse spectrum of the weight change (Gao et al. 2024, arXiv:2405.03003).", FourierFTConfig,
      defaults={"init_weights": True}, fit=at_most("n_frequency", 1000, lambda i, o: i * o // 4))  # fmt: skip
_ours("waveft", "Sparse wavelet coefficients of the weight change (Bilican et al. 2025, arXiv:2505.12532).",
      WaveFTConfig,
      fit=at_most("n_frequency", 2592, lambda i, o: i * o // 4))  # fmt: skip
_ours("miss", "Shards of each weight share one small matrix (Kang 2024, arXiv:2409.15371).", MissConfig,
      fit=at_most("r", 64, lambda i, o: min(i, o) // 2))  # fmt: skip
_ours("psoft", "Orthogonal tuning inside the principal subspace of each weight.", PsoftConfig,
      fit=at_most("r", 32, lambda i, o: min(i, o) // 2))  # fmt: skip
_ours("shira", "Trains a sparse random set of the weights' own entries (Bhardwaj et al. 2024, arXiv:2406.13175).",
      ShiraConfig, fit=at_most("r", 32, lambda i, o: i * o // (2 * (i + o))))  # fmt: skip
_ours("vblora", "All factors are mixtures of vectors from one shared bank (Li et al. 2024, arXiv:2405.15179).",
      VBLoRAConfig, fit=divides("vector_length", 256))  # fmt: skip
_ours("randlora", "Full-rank update from fixed random bases, trained scales (Albert et al. 2025, arXiv:2502.00987).",
      RandLoraConfig)  # fmt: skip
_ours("cpt", "Context-aware prompt tuning (arXiv:2410.17222).", CPTConfig, targets=None,
      refusal="it needs the token types of hand-written few-shot prompts beside every row")  # fmt: skip
_ours("xlora", "A trained gate over adapters that exist already (arXiv:2402.07148).", XLoraConfig,
      refusal="it mixes adapters that are trained already; combine them with lora-ft combine")  # fmt: skip
