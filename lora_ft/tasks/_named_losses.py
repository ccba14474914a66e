"""Losses by their names in torch.nn.functional: what a target is, its sum, and what an output means."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_ft.errors import DataError, UsageError

from ._base import IGNORE

CLASS, SHARE, NUMBER = "class", "share", "number"
LEAVE_OUT = "the model's output and the target must have the same shape"


@dataclass(frozen=True)
class NamedLoss:
    """One loss.

    Attributes:
        target: class (a whole number from 0, over dimension 1 of the output), share (from 0 to 1) or number.
        scores: from output to probabilities, or to the values themselves.
    """

    target: str
    scores: Callable[[Tensor], Tensor]


def _same(output: Tensor) -> Tensor:
    return output


def _softmax(output: Tensor) -> Tensor:
    return output.softmax(1)


LOSSES: Mapping[str, NamedLoss] = {
    "binary_cross_entropy": NamedLoss(SHARE, _same),
    "binary_cross_entropy_with_logits": NamedLoss(SHARE, torch.sigmoid),
    "cross_entropy": NamedLoss(CLASS, _softmax),
    "nll_loss": NamedLoss(CLASS, _softmax),  # of logarithms of probabilities the softmax is the probabilities
    "mse_loss": NamedLoss(NUMBER, _same),
    "l1_loss": NamedLoss(NUMBER, _same),
    "smooth_l1_loss": NamedLoss(NUMBER, _same),
    "huber_loss": NamedLoss(NUMBER, _same),
}


def elementwise_loss(name: str, output: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """(sum over all elements, their number).

    Args:
        name: a loss whose target is a share or a number.
        output: (B, ...).
        target: of the same shape but for dimensions of size 1.
    """
    if not _alike(output, target):
        raise shape_error(output, target, LEAVE_OUT)
    target = target.reshape(output.shape).to(output.dtype)
    if name == "binary_cross_entropy" and not bool(((output >= 0) & (output <= 1)).all()):
        if not bool(output.isfinite().all()):
            return output.sum(), output.numel()  # not finite: the loop says that training diverged
        raise UsageError(
            f"binary_cross_entropy needs outputs from 0 to 1, the model gives {output.min():.4g} to {output.max():.4g}",
            where="task.loss",
            fix="end the model with a sigmoid (mlp: output: sigmoid), or loss: binary_cross_entropy_with_logits",
        )
    total: Tensor = getattr(nn.functional, name)(output, target, reduction="sum")
    return total, output.numel()


def class_loss(
    name: str, output: Tensor, target: Tensor, weights: Tensor | None, smoothing: float
) -> tuple[Tensor, float]:
    """(sum over all targets, their number or the sum of their weights); targets of -100 do not count.

    Args:
        name: cross_entropy or nll_loss.
        output: (B, C) or (B, C, ...).
        target: classes (B,) or (B, ...); for cross_entropy also probabilities of the output's shape.
        weights: (C,) of the classes.
        smoothing: share of the target spread over all classes; cross_entropy only.
    """
    extra = {"label_smoothing": smoothing} if name == "cross_entropy" else {}
    function = getattr(nn.functional, name)
    if target.is_floating_point():
        if target.shape != output.shape:
            raise shape_error(output, target, "targets of probabilities have one for each class")
        total = function(output, target.to(output.dtype), weight=weights, reduction="sum", **extra)
        return total, output.numel() // output.shape[1]
    wanted = output.shape[:1] + output.shape[2:]
    if output.dim() < 2 or not _alike(output[:, 0], target):
        raise shape_error(output, target, "an output is (rows, classes, ...), its target (rows, ...) of class numbers")
    target = target.reshape(wanted)
    total = function(output, target, weight=weights, reduction="sum", ignore_index=IGNORE, **extra)
    counted = target[target != IGNORE]
    return total, counted.numel() if weights is None else float(weights[counted].sum())


def check_classes(output: Tensor, target: Tensor, where: str) -> None:
    """Refuse a class that the model has no output for.

    Args:
        output: (B, C, ...).
        target: whole numbers.
        where: of the training row with the largest class.
    """
    if target.is_floating_point() or output.dim() < 2 or not target.numel():
        return
    largest, classes = int(target.max()), output.shape[1]
    if largest >= classes:
        raise DataError(
            f"class {largest} does not exist: the model gives {classes} output{'s' if classes > 1 else ''} for a row",
            where=where,
            why="classes are counted from 0",
            fix=f"make the model's last layer {largest + 1} wide (task.arguments), or mend the targets"
            + ("; for one output: loss: binary_cross_entropy_with_logits" if classes == 1 else ""),
        )


def shape_error(output: Tensor, target: Tensor, why: str) -> UsageError:
    """The error for an output that does not go with its target."""
    return UsageError(
        f"the model's output {tuple(output.shape)} does not fit the targets {tuple(target.shape)}",
        where="task.loss",
        why=why,
        fix="change the size of the model's last layer (task.arguments), the targets, or the loss",
    )


def _alike(output: Tensor, target: Tensor) -> bool:
    """The same shape but for dimensions of size 1, the first one apart."""
    if output.dim() == 0 or target.dim() == 0 or len(output) != len(target):
        return False
    return [n for n in output.shape[1:] if n != 1] == [n for n in target.shape[1:] if n != 1]
