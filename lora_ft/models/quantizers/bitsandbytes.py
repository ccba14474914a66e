"""bitsandbytes: 4-bit NF4 and FP4 (QLoRA, arXiv:2305.14314), 8-bit LLM.int8 (arXiv:2208.07339)."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lora_ft.errors import UsageError
from lora_ft.registry import QUANTIZERS

from . import _four_bit
from ._base import Dtype, Options, QuantizerBase

BLOCK = 64  # numbers that share a scale, as Transformers' layers are made


class FourBit(Options):
    """Arguments of Transformers' BitsAndBytesConfig, by its names."""

    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Dtype = "auto"
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    llm_int8_skip_modules: tuple[str, ...] = ()
    merge_aware: bool = False


class EightBit(Options):
    """Arguments of Transformers' BitsAndBytesConfig, by its names."""

    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: tuple[str, ...] = ()
    merge_aware: bool = False


@dataclass(frozen=True)
class BitsAndBytes(QuantizerBase):
    """Linear layers but the output head in 4 or 8 bits."""

    def load_arguments(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        """The quantisation config; raises when the package is missing."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(f"quant: {self.name} needs bitsandbytes", fix="pip install 'lora-ft[quant]'")
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(**self._arguments(compute_dtype))}  # type: ignore[no-untyped-call]

    def _arguments(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class FourBitQuantizer(BitsAndBytes):
    """4 bits a number, with a scale for 64 of them."""

    options: FourBit = field(default_factory=FourBit)
    kind: ClassVar[str] = ""

    def load_arguments(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        """The quantisation config; what it makes of weights is made faster on a CPU."""
        found = super().load_arguments(compute_dtype)
        _four_bit.faster()
        return found

    def _arguments(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        wanted, options = self.options.bnb_4bit_compute_dtype, self.options
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": options.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": compute_dtype if wanted == "auto" else getattr(torch, wanted),
            "bnb_4bit_quant_storage": getattr(torch, options.bnb_4bit_quant_storage),
            "llm_int8_skip_modules": list(options.llm_int8_skip_modules) or None,
        }

    def round_trip(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Quantised and dequantised."""
        from bitsandbytes import functional

        _four_bit.faster()
        packed, state = functional.quantize_4bit(
            weight.to(dtype).contiguous(), blocksize=BLOCK, quant_type=self.kind,
            compress_statistics=self.options.bnb_4bit_use_double_quant,
        )  # fmt: skip
        found: Tensor = functional.dequantize_4bit(packed, state)
        return found.float().reshape(weight.shape)


@dataclass(frozen=True)
class Nf4(FourBitQuantizer):
    """NormalFloat: the 16 values are quantiles of a normal distribution."""

    name = "nf4"
    description = "4-bit NormalFloat with double quantisation (QLoRA), bitsandbytes; GPU or CPU."
    kind = "nf4"


@dataclass(frozen=True)
class Fp4(FourBitQuantizer):
    """A 4-bit floating point number."""

    name = "fp4"
    description = "4-bit floating point with double quantisation, bitsandbytes; GPU or CPU."
    kind = "fp4"


@dataclass(frozen=True)
class Int8(BitsAndBytes):
    """8 bits a number, with a scale for each row."""

    options: EightBit = field(default_factory=EightBit)

    name = "int8"
    description = "8-bit LLM.int8, bitsandbytes; GPU or CPU."

    def _arguments(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        return {
            "load_in_8bit": True,
            "llm_int8_threshold": self.options.llm_int8_threshold,
            "llm_int8_skip_modules": list(self.options.llm_int8_skip_modules) or None,
        }

    def round_trip(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Quantised and dequantised."""
        from bitsandbytes import functional

        packed, scales, _ = functional.int8_vectorwise_quant(weight.to(dtype).to(torch.float16).contiguous())
        found: Tensor = functional.int8_vectorwise_dequant(packed, scales)
        return found.float()


for quantizer in (Nf4(), Fp4(), Int8()):
    QUANTIZERS.register(quantizer)
