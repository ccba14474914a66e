"""How a model with encoder and decoder makes its decoder's input from labels, and its bare vocabulary head."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from lora_ft_adapters import AdapterError

from ._base import IGNORE


def plain_model(model: Any) -> Any:
    """The Transformers model under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_inputs(base: Any, labels: Tensor) -> Tensor:
    """Labels (B, T) one to the right behind the start token, as the model itself does it.

    Raises:
        AdapterError: the model does not say how.
    """
    make = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        made: Tensor = make(labels)
        return made
    start, pad = base.config.decoder_start_token_id, base.config.pad_token_id
    if start is None or pad is None:
        raise AdapterError("the model's config has no decoder_start_token_id or no pad_token_id")
    shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == IGNORE, pad)


def without_bias(base: Any) -> AbstractContextManager[None]:
    """A context in which the zeros that BART-like models add to their logits are no wider than one value.

    Raises:
        AdapterError: they are not zeros.
    """
    bias = getattr(base, "final_logits_bias", None)
    if bias is None:
        return nullcontext()
    if bool(bias.any()):
        raise AdapterError("the model adds a bias to its logits")
    return _narrow(base, bias)


@contextmanager
def _narrow(base: Any, bias: Tensor) -> Iterator[None]:
    base.final_logits_bias = bias.new_zeros(1, 1)
    try:
        yield
    finally:
        base.final_logits_bias = bias
