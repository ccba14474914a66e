"""How classes, sets of labels and tags are judged, with scikit-learn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft.records import Judgement

from ._spans import spans_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def judge_classes(scores: Floats, wanted: Ints, labels: Sequence[str]) -> Judgement:
    """One class for each row.

    Macro means are over the classes that are wanted or given. roc_auc is the positive (second) class's of two, else the
    mean of one class against the rest; it is left out where a class has no row.

    Args:
        scores: (rows, labels), probabilities.
        wanted: (rows,), ids.
        labels: in the order of their ids.
    """
    from sklearn import metrics

    given = scores.argmax(-1)
    found = {"accuracy": float(metrics.accuracy_score(wanted, given)), **_prf(wanted, given)}
    if len(np.unique(wanted)) == len(labels):
        found["roc_auc"] = float(
            metrics.roc_auc_score(wanted, scores[:, 1])
            if len(labels) == 2
            else metrics.roc_auc_score(wanted, scores, multi_class="ovr", average="macro")
        )
    return Judgement(found, (wanted == given).tolist(), _confusion(wanted, given, labels))


def judge_label_sets(scores: Floats, wanted: Ints, threshold: float) -> Judgement:
    """Any number of labels for each row; accuracy counts rows with exactly the right ones.

    roc_auc is the mean over labels, and left out where a label has rows of one kind only.

    Args:
        scores: (rows, labels), probabilities.
        wanted: (rows, labels), 0 or 1.
        threshold: labels from this probability on are given.
    """
    from sklearn import metrics

    given = (scores >= threshold).astype(np.int64)
    # A table of one column is two classes to scikit-learn; the second of them is the label.
    prf = _prf(wanted[:, 0], given[:, 0], [1]) if wanted.shape[1] == 1 else _prf(wanted, given)
    found = {"accuracy": float(metrics.accuracy_score(wanted, given)), **prf}
    if ((wanted.min(0) == 0) & (wanted.max(0) == 1)).all():
        found["roc_auc"] = float(metrics.roc_auc_score(wanted, scores, average="macro"))
    return Judgement(found, (wanted == given).all(-1).tolist())


def judge_tags(
    given: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], labels: Sequence[str], spans: bool
) -> Judgement:
    """One tag for each word of each row; a row is right when all its tags are.

    Args:
        given: ids of the model's tags, by row.
        wanted: ids of the right tags, by row.
        labels: in the order of their ids.
        spans: whether tags mark spans, which are then judged: right are those with the right type and both borders.
    """
    from sklearn import metrics

    flat_wanted, flat_given = (np.array([i for row in rows for i in row], dtype=np.int64) for rows in (wanted, given))
    found = {"accuracy": float(metrics.accuracy_score(flat_wanted, flat_given))}
    found |= _judge_spans(given, wanted, labels) if spans else _prf(flat_wanted, flat_given)
    right = [list(g) == list(w) for g, w in zip(given, wanted, strict=True)]
    return Judgement(found, right, _confusion(flat_wanted, flat_given, labels))


def _judge_spans(
    given: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], labels: Sequence[str]
) -> dict[str, float]:
    """Precision, recall and F1 over all spans that are wanted or given."""
    from sklearn import metrics

    got, right = (
        {(i, span) for i, row in enumerate(rows) for span in spans_of([labels[t] for t in row])}
        for rows in (given, wanted)
    )
    either = sorted(got | right)
    if not either:
        return {"span_precision": 0.0, "span_recall": 0.0, "span_f1": 0.0}
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        [int(s in right) for s in either], [int(s in got) for s in either], average="binary", zero_division=0.0
    )
    return {"span_precision": float(precision), "span_recall": float(recall), "span_f1": float(f1)}


def _prf(wanted: Ints, given: Ints, classes: Sequence[int] | None = None) -> dict[str, float]:
    from sklearn import metrics

    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        wanted, given, labels=classes, average="macro", zero_division=0.0
    )
    micro = metrics.f1_score(wanted, given, labels=classes, average="micro", zero_division=0.0)
    return {
        "precision_macro": float(precision),
        "recall_macro": float(recall),
        "f1_macro": float(f1),
        "f1_micro": float(micro),
    }


def _confusion(wanted: Ints, given: Ints, labels: Sequence[str]) -> dict[str, Any]:
    """Rows are the right labels, columns the model's."""
    from sklearn import metrics

    rows = metrics.confusion_matrix(wanted, given, labels=np.arange(len(labels)))
    return {"confusion_matrix": {"labels": list(labels), "rows": rows.tolist()}}
