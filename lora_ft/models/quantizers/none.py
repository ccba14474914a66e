"""No quantisation."""

from typing import Any

from lora_ft.registry import QUANTIZERS


class NoQuantizer:
    """The base in the recipe's dtype."""

    name = "none"
    description = "The frozen base in train.dtype, not quantised."

    def load_arguments(self, compute_dtype: Any) -> dict[str, Any]:
        """None are needed."""
        return {}

    def prepare(self, model: Any) -> None:
        """Nothing is needed."""


QUANTIZERS.register(NoQuantizer())
