"""The next-token loss of any causal language model, its vocabulary head computed only where there is a label.

The output head is found through Transformers' own `get_output_embeddings()`. For one forward it passes its
input through, so that the model's "logits" are the last hidden states. A model that does more than apply the
head (soft-capping, logit scaling, auxiliary losses) gives another loss then, which `verify` finds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft_adapters.errors import AdapterError

from .head import HeadResult, labelled_head

IGNORE = -100


def frozen_head(model: nn.Module) -> nn.Linear:
    """The plain frozen linear layer that turns hidden states into logits.

    Raises:
        AdapterError: there is none, or it is trained, adapted or quantised.
    """
    find = getattr(getattr(model, "get_base_model", lambda: model)(), "get_output_embeddings", None)
    head = find() if find else None
    if type(head) is not nn.Linear:
        kind = type(head).__name__ if head is not None else "missing"
        raise AdapterError(f"the output head is not a plain linear layer ({kind})")
    if head.weight.requires_grad:
        raise AdapterError("the output head is trained")
    return head


@contextmanager
def passing_through(head: nn.Linear) -> Iterator[None]:
    """For as long as the block runs, the head gives back what it gets."""
    head.forward = lambda h: h  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward  # the class's own forward shows again


def labelled_loss(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> HeadResult:
    """Sum of next-token cross entropies at the labelled positions.

    Args:
        model: a causal language model whose output head is frozen.
        inputs: what its forward takes, without labels; `input_ids` is (B, T).
        labels: (B, T), -100 where nothing is to be learnt; position t is predicted from t - 1.
    """
    head = frozen_head(model)
    with passing_through(head):
        hidden = model(**inputs, use_cache=False).logits
    if hidden.shape[:2] != labels.shape:
        raise AdapterError(f"hidden states {tuple(hidden.shape[:2])} do not line up with labels {tuple(labels.shape)}")
    keep = labels[:, 1:] != IGNORE
    return labelled_head(hidden[:, :-1][keep], head.weight, head.bias, labels[:, 1:][keep])


def plain_loss(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> HeadResult:
    """The same from the model's own forward and full logits: slower, and the reference for `labelled_loss`."""
    out = model(**inputs, labels=labels, use_cache=False)
    # Where virtual tokens stand before the input, PEFT's loss counts the first real token too.
    first = 0 if out.logits.shape[1] > labels.shape[1] else 1
    count = int((labels[:, first:] != IGNORE).sum())
    with torch.no_grad():
        logits = out.logits[:, -labels.shape[1] : -1]
        correct = ((logits.argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != IGNORE)).sum()
    return HeadResult(out.loss * count, count, correct)
