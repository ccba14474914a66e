"""What the trials gave: rows, best first, as CSV and JSON, and the best recipe."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ft import runs
from lora_ft.recipe import Resolved

from .plan import SweepPlan
from .space import values_of, with_settings

ORDER = ("completed", "pruned", "failed", "unfinished")


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        index: from 0, in the order of the proposals.
        settings: key -> text of the value.
        status: completed, pruned, failed or unfinished.
        value: of the metric; of a pruned trial at its last evaluation.
        deviation: standard deviation over the folds (n - 1), None without folds.
        metrics: all metrics after training, means over the folds.
        seconds: that it took.
        folder: of its run, below the sweep's.
        error: why it failed.
        repeats: the earlier trial with the same values, which was not trained again.
    """

    index: int
    settings: Mapping[str, str]
    status: str
    value: float | None
    folder: str
    deviation: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    error: str = ""
    repeats: int | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """Key -> value."""
        return values_of(self.settings)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "trial": self.index,
            "parameters": self.parameters,
            "status": self.status,
            "value": self.value,
            "deviation": self.deviation,
            "metrics": dict(self.metrics),
            "seconds": self.seconds,
            "run": self.folder,
            "error": self.error or None,
            "repeats": self.repeats,
        }


def ranked(rows: Sequence[TrialRow], lower: bool) -> list[TrialRow]:
    """Best first; those that did not come to an end after those that did; of equals the earlier."""

    def place(row: TrialRow) -> tuple[int, bool, float, int]:
        value = row.value or 0.0
        return ORDER.index(row.status), row.value is None, value if lower else -value, row.index

    return sorted(rows, key=place)


def best_of(rows: Sequence[TrialRow], lower: bool) -> TrialRow | None:
    """The best trial that came to an end."""
    first = next(iter(ranked(rows, lower)), None)
    return first if first and first.status == "completed" else None


def best_recipe(plan: SweepPlan, best: TrialRow) -> Resolved:
    """The whole recipe of a trial."""
    return with_settings(plan.base, best.settings)


def write_results(out: Path, plan: SweepPlan, rows: Sequence[TrialRow]) -> None:
    """results.csv, results.json, and best.yaml where a trial came to an end; each replaced in one step."""
    ordered = ranked(rows, plan.lower)
    best = best_of(rows, plan.lower)
    runs.write_text(out / "results.csv", _csv(plan, ordered))
    about = {"metric": plan.metric, "lower_is_better": plan.lower, "search": plan.search, "folds": plan.folds}
    found = {**about, "best": best.index if best else None, "trials": [r.facts() for r in ordered]}
    runs.write_text(out / "results.json", json.dumps(found, indent=1) + "\n")
    if best:
        runs.write_text(out / "best.yaml", best_recipe(plan, best).text())


def _csv(plan: SweepPlan, rows: Sequence[TrialRow]) -> str:
    keys = [a.key for a in plan.axes]
    others = sorted({name for r in rows for name in r.metrics} - {plan.metric})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "status", plan.metric, "deviation", *keys, *others, "seconds", "run", "error"])
    for r in rows:
        parameters = [r.settings.get(k, "") for k in keys]
        metrics = [r.metrics.get(name, "") for name in others]
        plain = ["" if v is None else v for v in (r.value, r.deviation)]
        seconds = "" if r.seconds is None else r.seconds
        writer.writerow([r.index, r.status, *plain, *parameters, *metrics, seconds, r.folder, r.error])
    return text.getvalue()
