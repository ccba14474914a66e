"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .display import clean


def before_after(metrics: Mapping[str, Mapping[str, float]], stream: TextIO, title: str) -> None:
    """One row per metric, base beside adapter."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric")
    for head in ("base", "with adapter", "change"):
        table.add_column(head, justify="right")
    before, after = metrics.get("before", {}), metrics.get("after", {})
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        change = f"{new - old:+.4f}" if old is not None and new is not None else ""
        table.add_row(name, *(f"{v:.4f}" if v is not None else "-" for v in (old, new)), change)
    Console(file=stream, highlight=False).print(table)


def compared(facts: Mapping[str, Any], stream: TextIO) -> None:
    """The last stage with and without the stages before it, on the same held-out rows."""
    table = Table(title="the last stage alone, and after the others", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric")
    for head in ("alone", "after the others", "change"):
        table.add_column(head, justify="right")
    for name, new in facts["with"].items():
        old = facts["without"].get(name)
        if old is not None:
            table.add_row(name, f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}")
    console = Console(file=stream, highlight=False)
    console.print(table)
    if "difference" in facts:
        low, high = facts["interval_95"]
        console.print(
            f"{facts['gained']} rows gained, {facts['lost']} lost; difference {facts['difference']:+.1%} "
            f"(95% interval {low:+.1%} to {high:+.1%})"
        )


def flips(rows: Sequence[tuple[str, str, str, str]], stream: TextIO, title: str) -> None:
    """Rows whose verdict changed: (where, wanted, base's answer, adapter's answer)."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("row", no_wrap=True, min_width=max((len(r[0]) for r in rows), default=3))
    for head in ("wanted", "base", "with adapter"):
        table.add_column(head, overflow="ellipsis", max_width=44, no_wrap=True)
    for row in rows:
        table.add_row(*(escape(clean(v.replace("\n", " "))) for v in row))
    Console(file=stream, highlight=False).print(table)


def methods(rows: Sequence[Mapping[str, Any]], stream: TextIO) -> None:
    """Adapter methods by family, a line each, with what running them has shown; docs/methods.md has the reasons."""
    console = Console(file=stream, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for head in ("no-op", "merge", "nf4"):
        table.add_column(head, justify="center", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    # rich would rather drop the other columns than cut this one.
    room = console.width - max(len(r["name"]) for r in rows) - 31
    table.add_column("what it is", no_wrap=True, overflow="ellipsis", max_width=max(16, room))
    for family in sorted({r["family"] for r in rows}):
        table.add_section()
        for row in (r for r in rows if r["family"] == family):
            good = {"fresh": "no-op", "merges": "yes", "nf4": "yes"}
            said = [("+" if row[k].split(",")[0] == want else "-") if k in row else "" for k, want in good.items()]
            what = f"not trained here: {row['refused']}" if "refused" in row else row["description"]
            table.add_row(row["name"], *said, _short(row.get("parameters")), escape(what))
    console.print(table)


def _short(count: int | None) -> str:
    if not count:
        return ""
    scale, letter = next(((s, x) for s, x in ((10**6, "M"), (10**3, "k")) if count >= s), (1, ""))
    return f"{count / scale:.3g}{letter}"


def listing(rows: Sequence[Mapping[str, str]], stream: TextIO) -> None:
    """Name and description of each entry."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("description")
    for row in rows:
        table.add_row(escape(row["name"]), escape(row["description"]))
    Console(file=stream, highlight=False).print(table)
