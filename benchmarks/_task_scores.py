"""What an arm of `tasks` and `domain` got right: a figure a set, and how sure the difference of two arms is.

Every arm gives one answer a held-out row: a class, a value, a list of tags, or the rank of the right passage. `units`
makes a few numbers of each row, from which each figure is computed over all rows, or over rows drawn again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft.tasks._spans import spans_of

Row = dict[str, Any]
Floats = NDArray[np.float64]
RESAMPLES = 2000
FIGURES = {
    "text-classification": "accuracy",
    "regression": "pearson",
    "token-classification": "span_f1",
    "sentence-pairs": "recall_at_1",
}


def units(kind: str, rows: Sequence[Row], answers: Sequence[Any]) -> Floats:
    """(rows, numbers): right or not; value and wanted value; spans found, given and wanted; found first or not.

    Args:
        kind: of the set, a key of FIGURES.
        rows: held-out rows.
        answers: one each.
    """
    made = [_unit(kind, row, answer) for row, answer in zip(rows, answers, strict=True)]
    return np.array(made, dtype=np.float64)


def _unit(kind: str, row: Row, answer: Any) -> list[float]:
    if kind == "text-classification":
        return [float(answer == row["label"])]
    if kind == "regression":
        return [float(answer), float(row["label"])]
    if kind == "sentence-pairs":
        return [float(answer == 1)]
    given, wanted = set(spans_of(answer)), set(spans_of(row["tags"]))
    return [len(given & wanted), len(given), len(wanted)]


def figure(kind: str, found: Floats) -> float:
    """The set's figure, from units."""
    if kind == "regression":
        return float(np.corrcoef(found.T)[0, 1])
    if kind == "token-classification":
        hits, given, wanted = found.sum(0)
        return float(2 * hits / max(1.0, given + wanted))
    return float(found.mean())


def interval(kind: str, ours: Sequence[Floats], theirs: Sequence[Floats], seed: int = 0) -> dict[str, float]:
    """How much better `ours` is, with the 95 % interval of a paired bootstrap over rows.

    Args:
        kind: of the set.
        ours: units of each training seed; the figure is the mean over seeds.
        theirs: the same of the other arm; its number of seeds may differ.
        seed: of the resampling.
    """

    def difference(rows: Any) -> float:
        sides = [np.mean([figure(kind, u[rows]) for u in side]) for side in (ours, theirs)]
        return float(sides[0] - sides[1])

    number, draw = len(ours[0]), np.random.default_rng(seed)
    drawn = [difference(draw.integers(number, size=number)) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"difference": difference(slice(None)), "low": float(low), "high": float(high)}


def ranks(rows: Sequence[Row], similarity: Floats) -> list[int]:
    """The place of each row's own passage among all, from 1.

    Args:
        rows: held-out pairs.
        similarity: (anchors, positives). Passages with the same text, and those of rows with the same anchor, are not
            counted against a row.
    """
    found = []
    for i, row in enumerate(rows):
        other = [row["anchor"] != r["anchor"] and row["positive"] != r["positive"] for r in rows]
        found.append(1 + int((np.array(other) & (similarity[i] > similarity[i, i])).sum()))
    return found


def cosines(anchors: Any, positives: Any) -> Floats:
    """(anchors, positives) from two lists of vectors of length 1."""
    return np.asarray(np.array(anchors, dtype=np.float64) @ np.array(positives, dtype=np.float64).T)
