"""The loss of models that find a set of boxes (DETR and its kin), as a sum over pictures.

These models match each wanted box with one of their queries (Hungarian matching, Carion et al. 2020, arXiv:2005.12872)
and divide by what the batch holds: box terms by its boxes n, DETR's cross entropy by the weights of what its queries
should find, w = (1 - e) n + e Q, where e is the weight of "no object" and Q the number of queries. Both are undone
here, and n and w of the whole step put in their place, so that micro-batches add up.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.errors import DivergedError, UsageError
from lora_ft.records import Batch

from ._base import in_dtype_of

# Transformers' losses that are sums over boxes and queries, divided as above.
CROSS_ENTROPY = "ForObjectDetection"  # DETR, YOLOS, Table Transformer
DIVIDED_BY_BOXES = (
    "DeformableDetrForObjectDetection", "ConditionalDetrForObjectDetection", "DabDetrForObjectDetection",
    "RTDetrForObjectDetection", "RTDetrV2ForObjectDetection",
)  # fmt: skip


def set_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
    """The loss as a sum over pictures, and the model's answer.

    Args:
        model: of Transformers, or PEFT's around one.
        batch: pictures of one size; each of `labels` says in "per_picture" how many boxes a picture of the step has.

    Raises:
        DivergedError: the model's boxes are not finite.
        UsageError: a model whose loss is of another kind.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    kind = _kind(base)
    with _loss_in_float32(base):
        answer = model(**in_dtype_of(model, batch))
    labels = batch["labels"]
    boxes = sum(len(one["class_labels"]) for one in labels)
    per_picture = float(labels[0]["per_picture"])
    share = max(boxes, 1) / (per_picture or 1.0)  # of the batch's own divisor and the one that takes its place
    if kind != CROSS_ENTROPY:
        return answer.loss * share, answer
    queries, nothing = answer.logits.shape[1], base.config.eos_coefficient
    matched = sum(min(len(one["class_labels"]), queries) for one in labels)
    own = (1 - nothing) * matched + nothing * queries * len(labels)
    entropy = sum(v for k, v in answer.loss_dict.items() if k.startswith("loss_ce"))
    total = entropy * (own / ((1 - nothing) * per_picture + nothing * queries)) + (answer.loss - entropy) * share
    return total, answer


def _kind(base: Any) -> str:
    kind = str(getattr(base, "loss_type", None))
    if kind not in (CROSS_ENTROPY, *DIVIDED_BY_BOXES):
        raise UsageError(
            f"{type(base).__name__}: its loss is not a sum over pictures, so a step cannot be cut into micro-batches",
            fix="use a DETR, Conditional DETR, Deformable DETR, DAB-DETR, YOLOS or RT-DETR",
        )
    return kind


@contextmanager
def _loss_in_float32(base: Any) -> Iterator[None]:
    """Matching and loss in float32 whatever the model's dtype: pixels of a box are lost in bfloat16's 8 bits."""
    own: Callable[..., Any] = base.loss_function

    def loss(logits: Any, labels: Any, device: Any, pred_boxes: Any, *args: Any, **kwargs: Any) -> Any:
        if not bool(pred_boxes.isfinite().all()):
            raise DivergedError(
                "the model's boxes are not finite numbers",
                why="the weights have diverged, or the dtype is too narrow for this model",
                fix="a smaller learning rate, or --set train.dtype=float32",
            )
        return own(logits.float(), labels, device, pred_boxes.float(), *_float32(args), **_float32(kwargs))

    before = base.__dict__.get("_loss_function")
    base.loss_function = loss
    try:
        yield
    finally:
        if before is None:
            del base._loss_function
        else:
            base.loss_function = before


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, Mapping):
        return {k: _float32(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_float32(v) for v in value]
    return value
