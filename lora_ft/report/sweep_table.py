"""The table of a sweep's trials."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .display import clean


def sweep_table(rows: Sequence[Mapping[str, Any]], metric: str, stream: TextIO, title: str) -> None:
    """One row per trial in the order given, and below them why trials failed.

    Args:
        rows: trial, status, value, deviation, parameters, seconds, error of each.
        metric: name of `value`.
        stream: where it is written.
        title: above the table.
    """
    keys = list(dict.fromkeys(k for r in rows for k in r["parameters"]))
    folds = any(r["deviation"] is not None for r in rows)
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("trial", metric, *(["deviation"] if folds else []), *keys, "seconds"):
        table.add_column(escape(head), justify="right")
    table.add_column("status", no_wrap=True)
    for r in rows:
        figures = [_number(r["value"], ".4f"), *([_number(r["deviation"], ".4f")] if folds else [])]
        values = [_value(r["parameters"].get(k, "")) for k in keys]
        table.add_row(str(r["trial"]), *figures, *values, _number(r["seconds"], ".0f"), r["status"])
    console = Console(file=stream, highlight=False)
    console.print(table)
    for r in rows:
        if r["error"]:
            console.print(f"trial {r['trial']} failed: {escape(clean(r['error']))}", soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(clean(str(value)))
