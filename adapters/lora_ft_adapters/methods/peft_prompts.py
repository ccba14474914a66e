"""PEFT's methods that add trained tokens or cached keys and values before the input, and those that route by task.

A fresh prompt changes the outputs at once, so none of these starts as a no-op, and none can be merged.
"""

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import (
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptLearningConfig,
    initialize_kv_prefix_from_past_key_values,
)
from torch import nn

from lora_ft_adapters.behaviour import Behaviour, Calibration, register_behaviour
from lora_ft_adapters.registry import Method, register

TOKENS = 20  # virtual tokens; Lester et al. find little gain above it


class Prompt(Behaviour):
    """Trained inputs."""

    changes_outputs = "its trained tokens are read from the first step on"

    def matches(self, config: PeftConfig) -> bool:
        """By PEFT's base class."""
        return isinstance(config, PromptLearningConfig)


class Prefix(Prompt):
    """Keys and values before every attention.

    Random ones ruin what the model says, and training takes long to undo that. They start as those that the base
    itself computes for the first tokens of a training row, where there is one that is long enough (Li and Liang find
    the same of real words, arXiv:2101.00190, section 7.4).
    """

    def matches(self, config: PeftConfig) -> bool:
        """Prefix tuning without a projection, and cartridges."""
        stored = isinstance(config, PrefixTuningConfig | CartridgeConfig)
        return stored and not getattr(config, "prefix_projection", False)

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """As PEFT does, then the start from the data."""
        given: Any = config
        cached = _first_tokens(model, given.num_virtual_tokens, data)
        adapted = super().add(model, config, adapter_name, data)
        if cached is not None:
            initialize_kv_prefix_from_past_key_values(adapted, adapter_name=adapter_name, past_key_values=cached)
        return adapted


@torch.no_grad()
def _first_tokens(model: nn.Module, count: int, data: Calibration | None) -> Any:
    """The base's (key, value) of every layer for the first `count` real tokens of a row, or None."""
    if isinstance(model, PeftModel):  # beside another adapter the base cannot be run alone
        return None
    for batch in data.batches if data else ():
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is None or mask is None:
            return None
        for row, real in zip(ids, mask.bool(), strict=True):
            if int(real.sum()) >= count and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                cache = getattr(model(input_ids=row[real][None, :count], use_cache=True), "past_key_values", None)
                layers = [(getattr(c, "keys", None), getattr(c, "values", None)) for c in getattr(cache, "layers", ())]
                plain = all(isinstance(t, torch.Tensor) and t.dim() == 4 for pair in layers for t in pair)
                return layers if layers and plain else None  # recurrent layers keep another kind of state
    return None


class _OneTask(Behaviour):
    """Gives a method that routes by task the task number 0 where the caller gives none."""

    def _hook(self, position: int) -> Callable[..., Any]:
        def add_task(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            zeros = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
            if len(args) > position:
                known = args[position]
                return (*args[:position], zeros if known is None else known, *args[position + 1 :]), kwargs
            return args, {**kwargs, "task_ids": zeros if kwargs.get("task_ids") is None else kwargs["task_ids"]}

        return add_task


class Poly(_OneTask):
    """Polytropon; each layer is told the task."""

    def matches(self, config: PeftConfig) -> bool:
        """By its config class."""
        return isinstance(config, PolyConfig)

    def attach(self, model: PeftModel) -> None:
        """Hooks on the layers, so that generate() works too."""
        for module in model.modules():
            if hasattr(module, "poly_router") and not module._forward_pre_hooks:
                module.register_forward_pre_hook(self._hook(1), with_kwargs=True)


class Multitask(_OneTask):
    """Multitask prompt tuning; the prompt encoder is told the task."""

    changes_outputs = Prompt.changes_outputs

    def matches(self, config: PeftConfig) -> bool:
        """By its config class."""
        return isinstance(config, MultitaskPromptTuningConfig)

    def attach(self, model: PeftModel) -> None:
        """A hook on each prompt encoder."""
        for encoder in model.prompt_encoder.values():
            if not encoder._forward_pre_hooks:
                encoder.register_forward_pre_hook(self._hook(1), with_kwargs=True)


for behaviour in (Prompt(), Prefix(), Multitask(), Poly()):
    register_behaviour(behaviour)

_PROMPTS = {
    "prompt_tuning": ("PromptTuningConfig", "Trained token embeddings before the input (arXiv:2104.08691).", {}),
    "p_tuning": (
        "PromptEncoderConfig",
        "Prompt tokens from a small trained network (Liu et al. 2021, arXiv:2103.10385).",
        {"encoder_hidden_size": 128},
    ),
    "prefix_tuning": ("PrefixTuningConfig", "Trained keys and values before every attention (arXiv:2101.00190).", {}),
    "cartridge": ("CartridgeConfig", "A trained KV cache, its first token frozen (arXiv:2506.06266).", {}),
    "multitask_prompt_tuning": (
        "MultitaskPromptTuningConfig",
        "Prompt tuning with a shared prompt and one low-rank factor per task (arXiv:2303.02861).",
        {},
    ),
}
for name, (config, description, extra) in _PROMPTS.items():
    found = getattr(peft, config, None)
    if found is not None:  # an older or newer PEFT may lack some
        values = {"num_virtual_tokens": TOKENS, **extra}
        register(Method(name, description, found, defaults=values, targets=None, family="prompt"))
register(Method("poly", "Several LoRA skills mixed by a trained router (arXiv:2202.13914).", PolyConfig))
