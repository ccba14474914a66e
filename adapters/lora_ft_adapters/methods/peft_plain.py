"""PEFT's types that work as they are, or nearly: one sentence for each, and whether they find their own modules."""

import copy
from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft import (
    AdaptionPromptConfig,
    FrodConfig,
    PeftConfig,
    PeftModel,
    ShadowConfig,
    ShiraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
)
from torch import nn

from lora_ft_adapters.behaviour import Behaviour, Calibration, keep_frozen, register_behaviour
from lora_ft_adapters.blocks import stacks
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.registry import Method, register

CHECKS: Any = torch.sparse.check_sparse_tensor_invariants
# name -> (config class, one sentence)
_ON_LINEAR = {
    "adamss": ("AdamssConfig", "Trains a few subspaces of each weight, chosen by clustering its singular vectors."),
    "deft": ("DeftConfig", "Removes a low-rank part of each weight and learns what takes its place."),
    "delora": ("DeloraConfig", "LoRA with a normalised direction and a trained strength (Bini et al. 2025)."),
    "frod": ("FrodConfig", "Sparse trained scales in a joint decomposition of all layers."),
    "glora": (
        "GloraConfig",
        "Generalised LoRA: supports on weights and biases (Chavan et al. 2023, arXiv:2306.07967).",
    ),
    "gralora": ("GraloraConfig", "LoRA on a grid of blocks of each weight (Jung et al. 2025, arXiv:2505.20355)."),
    "hira": ("HiraConfig", "Low-rank update multiplied into the weight entry by entry: W + W * (B A)."),
    "hra": ("HRAConfig", "Chain of Householder reflections of each weight (Yuan et al. 2024, arXiv:2405.17484)."),
    "lily": ("LilyConfig", "Low-rank factors interconnected across layers by a router; cannot be merged."),
    "loha": ("LoHaConfig", "Hadamard product of two low-rank products (LyCORIS, arXiv:2309.14859)."),
    "lokr": ("LoKrConfig", "Kronecker product of small factors (LyCORIS, arXiv:2309.14859)."),
    "osf": ("OSFConfig", "Trains the least important singular directions of each weight, for continual learning."),
    "peanut": ("PeanutConfig", "A small network that turns each weight into its change."),
    "pvera": ("PveraConfig", "Probabilistic VeRA: scales of shared random factors are sampled."),
    "supertuning": ("SupertuningConfig", "Trains the largest 1 % of each weight's entries (arXiv:2607.09287)."),
    "tinylora": ("TinyLoraConfig", "A tiny vector through fixed projections of each weight's SVD (arXiv:2602.04118)."),
    "unilora": ("UniLoraConfig", "All LoRA factors are read from one short trained vector (arXiv:2506.00799)."),
    "vera": ("VeraConfig", "Trained scales of random factors shared by all layers (arXiv:2310.11454)."),
}
_FINDS_ITS_OWN = {
    "beft": ("BeftConfig", "Trains added biases of the value projections only."),
    "trainable_tokens": ("TrainableTokensConfig", "Trains the embedding rows of given tokens (token_indices) only."),
}

for name, (config, description) in {**_ON_LINEAR, **_FINDS_ITS_OWN}.items():
    found = getattr(peft, config, None)
    if found is not None:  # an older or newer PEFT may lack some
        register(Method(name, description, found, targets="all-linear" if name in _ON_LINEAR else None))


class Shadow(Behaviour):
    """The shadow state that the last block hands on is read by nobody, so its update can never learn."""

    def matches(self, config: PeftConfig) -> bool:
        """By its config class."""
        return isinstance(config, ShadowConfig)

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """Freeze what no gradient reaches."""
        adapted = super().add(model, config, adapter_name, data)
        layers: list[Any] = [m for m in adapted.modules() if hasattr(m, "shadow_update_transform")]
        keep_frozen(layers[-1], adapter_name, [n for n in layers[-1].adapter_layer_names if "shadow_update" in n])
        return adapted


class Sparse(Behaviour):
    """SHiRA and FRoD build sparse tensors of indices they have just made; torch asks that the choice be said."""

    def matches(self, config: PeftConfig) -> bool:
        """By their config classes."""
        return isinstance(config, ShiraConfig | FrodConfig)

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """Leave torch's checks off, as they are by default."""
        CHECKS.disable()
        return super().add(model, config, adapter_name, data)

    def attach(self, model: PeftModel) -> None:
        """The same for a loaded one."""
        CHECKS.disable()


class Bank(Behaviour):
    """UniLoRA and VB-LoRA read every factor from one bank of vectors that cannot be zero."""

    changes_outputs = "its factors come from a shared bank that starts at small random values"

    def matches(self, config: PeftConfig) -> bool:
        """By their config classes."""
        return isinstance(config, UniLoraConfig | VBLoRAConfig)


class Prompted(Behaviour):
    """LLaMA-Adapter: PEFT looks for its attentions itself, and writes what it found as a name, not as a regex."""

    def matches(self, config: PeftConfig) -> bool:
        """By its config class."""
        return isinstance(config, AdaptionPromptConfig)

    def sketch(self, config: PeftConfig) -> PeftConfig:
        """Without that name."""
        made: Any = copy.deepcopy(config)
        made.target_modules = None
        return made  # type: ignore[no-any-return]


class OneOnly(Behaviour):
    """PEFT's trainable tokens of a second adapter wrap those of the first, and the model no longer runs."""

    def matches(self, config: PeftConfig) -> bool:
        """By its config class."""
        return isinstance(config, TrainableTokensConfig)

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """Refuse a second one."""
        if isinstance(model, PeftModel):
            raise AdapterError("trainable_tokens must be a model's only adapter", "lora with trainable_token_indices")
        return super().add(model, config, adapter_name, data)


register_behaviour(OneOnly())
register_behaviour(Shadow())
register_behaviour(Bank())
register_behaviour(Sparse())
register_behaviour(Prompted())


def _upper_blocks(view: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """All blocks but the lowest two, as in the paper (30 of LLaMA's 32)."""
    return {"adapter_layers": max(1, len(stacks(model)) - 2)}


register(
    Method(
        "adaption_prompt",
        "LLaMA-Adapter: gated prompts in the upper attentions (arXiv:2303.16199); Llama-like models only.",
        AdaptionPromptConfig,
        defaults={"adapter_len": 10, "adapter_layers": 1},
        targets=None,
        fit=_upper_blocks,
    )
)
register(
    Method(
        "shadow",
        "A small trained network runs beside the blocks and corrects them; cannot be merged.",
        ShadowConfig,
        # Its auxiliary loss would be mixed into every loss that is reported.
        defaults={"auxiliary_loss_weight": 0.0},
        targets=None,
    )
)
