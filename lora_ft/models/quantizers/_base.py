"""What quantisers share: options that the recipe gives, and which layers they reach."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import ValidationError
from torch import Tensor

from lora_ft.errors import Problem, UsageError, did_you_mean
from lora_ft.models.quantised import keep_backward
from lora_ft.recipe import Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Options(Section):
    """A quantiser's own options."""


@dataclass(frozen=True)
class QuantizerBase:
    """A quantiser without options, whose layers are those that Transformers would replace."""

    options: Options = field(default_factory=Options)

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""

    def configure(self, options: Mapping[str, Any]) -> Self:
        """With the recipe's options, checked."""
        kind = type(self.options)
        try:
            return replace(self, options=kind.model_validate(dict(options)))
        except ValidationError as error:
            problems = [Problem(_problem(self.name, dict(e), list(kind.model_fields))) for e in error.errors()]
            raise UsageError.collect(problems, title=f"{len(problems)} problems with quant's options") from error

    def load_arguments(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        """Arguments for `from_pretrained`."""
        return {}

    def prepare(self, model: Any) -> None:
        """What is quantised keeps a layout that has a backward."""
        keep_backward(model)

    def quantises(self, empty: Any) -> frozenset[str]:
        """Names of the layers that are quantised, from the model's modules on the meta device, which are used up."""
        config = self.load_arguments(torch.float32).get("quantization_config")
        if config is None:
            return frozenset()
        from transformers.quantizers.auto import AutoHfQuantizer

        before = {n: type(m) for n, m in empty.named_modules()}
        AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(
            model=empty, dtype=torch.float32, device_map={"": "cpu"}
        )
        return frozenset(n for n, m in empty.named_modules() if type(m) is not before.get(n))

    def round_trip(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """What a quantised layer multiplies with, in float32; `dtype` is that of the base when it was quantised."""
        raise UsageError(f"what quant: {self.name} makes of a weight cannot be computed", fix="--into original")


def _problem(name: str, error: Mapping[str, Any], known: list[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(key, known) if known else "it has none"
        return f"quant: {name} has no option {key!r}; {hint}"
    return f"quant: {name}, {key}: {error['msg']}, got {error.get('input')!r}"
