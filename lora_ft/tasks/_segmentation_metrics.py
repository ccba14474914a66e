"""Masks of classes against the right ones, from counts of pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ft.records import Judgement


def confusion(given: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """(classes, classes) counts of pixels, rows the right class, columns the model's; pixels without a class are out.

    Args:
        given: (H, W), ids of classes.
        wanted: the same; what is no id of a class does not count.
        classes: how many there are.
    """
    counts = (wanted >= 0) & (wanted < classes)
    pairs = wanted[counts] * classes + given[counts]
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def judge_masks(tables: Sequence[Tensor], labels: Sequence[str]) -> Judgement:
    """Mean intersection over union, mean accuracy and share of right pixels, over the pixels of all pictures.

    Means are over the classes that are wanted or given (for mean accuracy: wanted) somewhere.

    Args:
        tables: of `confusion`, one a picture.
        labels: in the order of their ids.
    """
    table = torch.stack(list(tables)).long().sum(0).double()
    right, wanted, given = table.diagonal(), table.sum(1), table.sum(0)
    either = wanted + given - right
    iou, accuracy = right / either, right / wanted
    metrics: dict[str, float] = {}
    if table.sum():
        metrics = {
            "mean_iou": float(iou[either > 0].mean()),
            "mean_accuracy": float(accuracy[wanted > 0].mean()),
            "pixel_accuracy": float(right.sum() / table.sum()),
        }
    of_class: dict[str, Any] = {n: float(v) for n, v in zip(labels, iou.tolist(), strict=True) if v == v}
    rows = {"labels": list(labels), "rows": table.long().tolist()}
    return Judgement(metrics, [], {"iou_of_class": of_class, "confusion_matrix": rows})
