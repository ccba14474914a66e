"""torchao: weight-only formats of PyTorch's own quantisation library (https://github.com/pytorch/ao)."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_ft.errors import UsageError, did_you_mean
from lora_ft.models.load import pick_device
from lora_ft.registry import QUANTIZERS

from ._base import Options, QuantizerBase

# What trains: activations stay in the base's dtype, so that gradients reach the adapters. Name -> (class, arguments).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8_weight_only": ("Int8WeightOnlyConfig", {}),
    "int4_weight_only": ("Int4WeightOnlyConfig", {"group_size": 128}),
    "float8_weight_only": ("Float8WeightOnlyConfig", {}),
}

ON_GPU = ("int4_weight_only",)


class TorchAoOptions(Options):
    """Which of torchao's weight-only formats, and arguments of its config class."""

    config: str = "int8_weight_only"
    group_size: int | None = None


@dataclass(frozen=True)
class TorchAo(QuantizerBase):
    """Linear layers but the output head in one of torchao's weight-only formats."""

    options: TorchAoOptions = field(default_factory=TorchAoOptions)

    name = "torchao"
    description = "torchao weight-only formats: torchao:int8_weight_only, int4_weight_only or float8_weight_only."

    def load_arguments(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        """The quantisation config; raises when the package is missing."""
        wanted = self.options.config
        if wanted not in CONFIGS:
            raise UsageError(f"quant: torchao has no config {wanted!r} that trains; {did_you_mean(wanted, CONFIGS)}")
        if importlib.util.find_spec("torchao") is None:
            raise UsageError("quant: torchao needs torchao", fix="pip install 'lora-ft[quant]' torchao")
        if wanted in ON_GPU and pick_device().type == "cpu":
            raise UsageError(f"quant: torchao:{wanted} has no product with a gradient on a CPU", fix="quant: nf4")
        from torchao import quantization
        from transformers import TorchAoConfig

        name, arguments = CONFIGS[wanted]
        if self.options.group_size is not None:
            arguments = {**arguments, "group_size": self.options.group_size}
        return {"quantization_config": TorchAoConfig(getattr(quantization, name)(**arguments))}

    def quantises(self, empty: Any) -> frozenset[str]:
        """Names of the layers whose weights are replaced; their modules stay as they are."""
        from transformers.quantizers.auto import AutoHfQuantizer

        config = self.load_arguments(torch.float32)["quantization_config"]
        quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.preprocess_model(model=empty, dtype=torch.float32, device_map={"": "cpu"})
        names = [n for n, m in empty.named_modules() if isinstance(m, torch.nn.Linear)]
        return frozenset(n for n in names if quantizer.param_needs_quantization(empty, f"{n}.weight"))

    def round_trip(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Quantised and dequantised."""
        from torchao.quantization import quantize_

        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        layer.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        quantize_(layer, self.load_arguments(dtype)["quantization_config"].quant_type)
        found: Any = layer.weight
        return torch.as_tensor(found.dequantize()).float()


QUANTIZERS.register(TorchAo())
