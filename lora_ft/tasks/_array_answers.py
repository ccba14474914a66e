"""What a module's output means: metrics over rows, and the answer to one row for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft.records import Judgement

from ._base import IGNORE
from ._classification_metrics import judge_classes, judge_label_sets
from .regression import judge_numbers

Floats = NDArray[np.float64]
Array = NDArray[Any]


@dataclass(frozen=True)
class Answer:
    """The answer to one row: as text, and further values for its file."""

    text: str
    details: Mapping[str, Any]


def judge_class_targets(scores: Floats, targets: Array, labels: Sequence[str]) -> Judgement:
    """One class for each row or each of its positions; a row is right when all its positions are.

    Args:
        scores: (rows, C) or (rows, C, ...) of probabilities.
        targets: (rows, ...) of class numbers, or probabilities of the shape of `scores`, whose largest counts.
        labels: names of the C classes.
    """
    wanted = targets.argmax(1) if targets.dtype.kind == "f" else targets.reshape(scores[:, 0].shape)
    flat = np.moveaxis(scores, 1, -1).reshape(-1, scores.shape[1])
    counted = wanted.ravel() != IGNORE
    if not counted.any():
        return Judgement({}, [])
    found = judge_classes(flat[counted], wanted.ravel()[counted], labels)
    hits = (scores.argmax(1) == wanted) | (wanted == IGNORE)
    return replace(found, right=hits.reshape(len(hits), -1).all(1).tolist())


def judge_shares(scores: Floats, targets: Floats, labels: Sequence[str], threshold: float) -> Judgement:
    """Yes or no for each row, or for each of several labels; errors where targets are shares between 0 and 1.

    Args:
        scores: (rows, K) of probabilities.
        targets: (rows, K).
        labels: names of no and yes for K = 1, else of the K labels.
        threshold: from which a probability is a yes.
    """
    if not np.isin(targets, (0.0, 1.0)).all():
        return Judgement({k: v for k, v in judge_number_targets(scores, targets).metrics.items() if k != "r2"}, [])
    wanted = targets.astype(np.int64)
    if scores.shape[1] > 1:
        return judge_label_sets(scores, wanted, threshold)
    centred = _centred(scores[:, 0], threshold)
    return judge_classes(np.stack([1 - centred, centred], 1), wanted[:, 0], labels)


def judge_number_targets(given: Floats, wanted: Floats) -> Judgement:
    """Errors of one number for each row, or their means over several.

    Args:
        given: (rows, K).
        wanted: (rows, K).
    """
    columns = [judge_numbers(given[:, i], wanted[:, i]) for i in range(given.shape[1])]
    shared = [name for name in columns[0] if all(name in c for c in columns)]
    return Judgement({name: float(np.mean([c[name] for c in columns])) for name in shared}, [])


def class_answer(scores: Floats, labels: Sequence[str]) -> Answer:
    """The likeliest class, or that of each position.

    Args:
        scores: (C,) or (C, ...).
        labels: names of the C classes.
    """
    best = scores.argmax(0)
    if best.ndim:
        names = [labels[i] for i in best.ravel()]
        return Answer(" ".join(names), {"classes": names})
    return Answer(labels[int(best)], {"scores": dict(zip(labels, scores.tolist(), strict=True))})


def share_answer(scores: Floats, labels: Sequence[str], threshold: float) -> Answer:
    """Yes or no by its name, or the labels with commas between.

    Args:
        scores: (K,).
        labels: as for `judge_shares`.
        threshold: from which a probability is a yes.
    """
    if len(scores) == 1:
        yes = float(scores[0])
        return Answer(labels[int(yes >= threshold)], {"scores": {labels[0]: 1 - yes, labels[1]: yes}})
    names = dict(zip(labels, scores.tolist(), strict=True))
    return Answer(", ".join(n for n, p in names.items() if p >= threshold), {"scores": names})


def number_answer(values: Floats) -> Answer:
    """The number, or all of them with commas between, to six digits as text and whole in the details."""
    flat = values.ravel().tolist()
    return Answer(", ".join(f"{v:.6g}" for v in flat), {"value": flat[0] if len(flat) == 1 else flat})


def _centred(scores: Floats, threshold: float) -> Floats:
    """The scores in the same order, the threshold moved to a half: the likelier of two classes is the answer."""
    above = np.maximum(0.5 + 0.5 * (scores - threshold) / (1 - threshold), np.nextafter(0.5, 1.0))
    moved: Floats = np.where(scores >= threshold, above, 0.5 * scores / threshold)
    return moved
