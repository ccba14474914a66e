"""The loss of any masked language model, its head computed only where a token was masked (15 % of the positions).

The body is found through Transformers' own `base_model_prefix`. For one forward its last hidden states are cut down to
the masked positions, so that the model's own forward carries on with these alone. Where the last layer of the head is
plain and frozen, the loss is taken straight from its input. A model that does more than apply a head to each position
gives another loss then, which `verify` finds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft_adapters.errors import AdapterError

from .causal import IGNORE, frozen_head, passing_through
from .head import HeadResult, labelled_head


def body_of(model: nn.Module) -> nn.Module:
    """The part of a Transformers model that makes the hidden states.

    Raises:
        AdapterError: the model does not say which it is.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    body = getattr(base, getattr(base, "base_model_prefix", "") or " ", None)
    if not isinstance(body, nn.Module) or body is base:
        raise AdapterError(f"{type(base).__name__} has no body apart from its head")
    return body


@contextmanager
def _only(body: nn.Module, chosen: Tensor) -> Iterator[None]:
    """For one forward the body gives the `chosen` (B, T) positions of its last hidden states only, as (1, N, D)."""

    def cut(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0]
        if hidden.shape[:2] != chosen.shape:
            raise AdapterError(f"hidden states {tuple(hidden.shape[:2])} do not line up with {tuple(chosen.shape)}")
        rows = hidden[chosen][None]
        if isinstance(output, tuple):
            return (rows, *output[1:])
        return type(output)(**{**output, "last_hidden_state": rows})

    handle = body.register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def masked_loss(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> HeadResult:
    """Sum of cross entropies at the labelled positions.

    Args:
        model: a masked language model.
        inputs: what its forward takes, without labels; `input_ids` is (B, T).
        labels: (B, T), -100 where nothing is to be found out.
    """
    chosen = labels != IGNORE
    wanted = labels[chosen]
    try:
        head = frozen_head(model)
    except AdapterError:
        head = None  # it is trained or adapted: its own forward gives the logits
    with _only(body_of(model), chosen), nullcontext() if head is None else passing_through(head):
        rows = model(**inputs).logits.flatten(0, -2)
    if len(rows) != len(wanted):
        raise AdapterError(f"the head gives {len(rows)} rows for {len(wanted)} masked positions")
    if head is not None:
        return labelled_head(rows, head.weight, head.bias, wanted)
    total = nn.functional.cross_entropy(rows.float(), wanted, reduction="sum")
    return HeadResult(total, len(wanted), (rows.detach().argmax(-1) == wanted).sum())


def plain_loss(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> HeadResult:
    """The same from the model's own forward and full logits: slower, and the reference for `masked_loss`."""
    out = model(**inputs, labels=labels)
    chosen = labels != IGNORE
    with torch.no_grad():
        # A model may have left out the other positions itself.
        rows = out.logits if out.logits.dim() == 2 else out.logits[:, -labels.shape[1] :][chosen]
        correct = (rows.argmax(-1) == labels[chosen]).sum()
    count = len(rows)
    return HeadResult(out.loss * count, count, correct)
