"""Open a base model of any kind: of Transformers, or built by a user's function; with or without weights."""

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig

from . import python_module
from .load import LOAD_ERRORS, Base, fitting, incomplete, load_with_new_head, unreachable


@dataclass(frozen=True)
class BaseSpec:
    """Which base model, and in which form.

    Attributes:
        source: a folder, a hub id, or python:FILE:FUNCTION.
        auto_class: Transformers' auto class; None where a function builds the model.
        model_arguments: of the model's config, or of the function.
        new_head: whether modules that the files lack may start at random.
        dropout: of all the model's own dropout layers; None as its config says.
        seed: of what starts at random.
        trust_code: whether a user's function may run.
    """

    source: str
    auto_class: str | None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    new_head: bool = False
    dropout: float | None = None
    seed: int = 0
    trust_code: bool = False

    def open(self, *, dtype: torch.dtype, device: torch.device, arguments: Mapping[str, Any] | None = None) -> Base:
        """The frozen model in evaluation mode; what starts at random is the seed's.

        Args:
            dtype: of the weights.
            device: where they go.
            arguments: further ones for `from_pretrained`, from a quantiser.

        Raises:
            ArtifactError: missing, of a wrong architecture, or incomplete.
            UnsafeError: pickle weights, a weight index that leaves the folder, or code that is not trusted.
        """
        torch.manual_seed(self.seed)
        if self.auto_class is None:
            model = python_module.build(self.source, self.model_arguments, trust_code=self.trust_code)
            _set_dropout(model, self.dropout)
            return Base(model.to(device=device, dtype=dtype).requires_grad_(False).eval())
        base = load_with_new_head(
            self.source, self.auto_class, dtype=dtype, device=device, arguments=dict(arguments or {}),
            model_arguments={**self.model_arguments, **self._dropout_arguments()},
        )  # fmt: skip
        if base.fresh and not self.new_head:
            raise incomplete(base.model, [f"{m}.*" for m in base.fresh], self.source)
        return base

    def skeleton(self, device: str | None = "meta") -> nn.Module:
        """Its modules without weights (meta device), to check targets before gigabytes are read.

        Args:
            device: None leaves it to the caller's context.
        """
        model: Any
        if self.auto_class is None:
            return python_module.skeleton(self.source, self.model_arguments, trust_code=self.trust_code)
        try:
            wanted = fitting(self.source, self.auto_class, self.model_arguments)
            config, of_class = AutoConfig.from_pretrained(
                self.source, trust_remote_code=False, return_unused_kwargs=True, **wanted
            )
            with torch.device(device) if device else nullcontext():
                model = getattr(transformers, self.auto_class).from_config(config, **of_class)
        except LOAD_ERRORS as error:
            raise unreachable("model", self.source, error) from error
        if getattr(model, "generation_config", None) is not None:
            with suppress(OSError):  # a base without such a file generates as its config says
                model.generation_config = GenerationConfig.from_pretrained(self.source)
        found: nn.Module = model.requires_grad_(False)
        return found

    def _dropout_arguments(self) -> dict[str, float]:
        if self.dropout is None:
            return {}
        try:
            config = AutoConfig.from_pretrained(self.source, trust_remote_code=False)
        except LOAD_ERRORS as error:
            raise unreachable("configuration", self.source, error) from error
        names = [n for n in config.to_dict() if _is_dropout(n) and _is_rate(getattr(config, n, None))]
        return dict.fromkeys(names, self.dropout)


def _is_dropout(name: str) -> bool:
    return name.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate", "dropout_p"))


def _is_rate(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _set_dropout(model: nn.Module, rate: float | None) -> None:
    for module in model.modules():
        if rate is not None and isinstance(module, nn.Dropout):
            module.p = rate
