"""No quantisation."""

from lora_ft.registry import QUANTIZERS

from ._base import QuantizerBase


class NoQuantizer(QuantizerBase):
    """The base in the recipe's dtype, or as its own files quantise it."""

    name = "none"
    description = "The frozen base in train.dtype, or quantised as its own files are."


QUANTIZERS.register(NoQuantizer())
