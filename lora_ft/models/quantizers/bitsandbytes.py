"""bitsandbytes: 4-bit NF4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314) and 8-bit LLM.int8 (arXiv:2208.07339)."""

import importlib.util
import logging
from typing import Any

from lora_ft.errors import UsageError
from lora_ft.registry import QUANTIZERS


class BitsAndBytes:
    """Linear layers but the output head in 4 or 8 bits.

    Args:
        name: what the recipe says.
        description: one sentence.
        options: arguments of Transformers' BitsAndBytesConfig.
    """

    def __init__(self, name: str, description: str, options: dict[str, Any]) -> None:
        self.name, self.description, self._options = name, description, options

    def load_arguments(self, compute_dtype: Any) -> dict[str, Any]:
        """The quantisation config; raises when the package is missing."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(f"quant: {self.name} needs bitsandbytes", fix="pip install 'lora-ft[quant]'")
        from transformers import BitsAndBytesConfig

        options = dict(self._options)
        if options.get("load_in_4bit"):
            options["bnb_4bit_compute_dtype"] = compute_dtype
        return {"quantization_config": BitsAndBytesConfig(**options)}  # type: ignore[no-untyped-call]

    def prepare(self, model: Any) -> None:
        """Keep 4-bit weights in the layout that has a backward.

        On a CPU with avx512_bf16, bitsandbytes 0.50 repacks a 4-bit weight in the first forward in evaluation mode, for
        good, and the product with it passes no gradient: training after an evaluation would silently learn nothing.
        """
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        # It warns in each product of an 8-bit layer that activations are cast to float16; nothing a user can act on.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


QUANTIZERS.register(
    BitsAndBytes(
        "nf4",
        "4-bit NormalFloat with double quantisation (QLoRA), bitsandbytes; GPU or CPU.",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    )
)
QUANTIZERS.register(BitsAndBytes("int8", "8-bit LLM.int8, bitsandbytes; GPU or CPU.", {"load_in_8bit": True}))
