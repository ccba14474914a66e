"""Which format rows are in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_ft.errors import DataError, UsageError
from lora_ft.registry import FORMATS, DataFormat

from ._format import RowFormat
from ._row import Row

LOOKED_AT = 20


@dataclass(frozen=True)
class Wanted:
    """What a caller knows of the rows.

    Attributes:
        name: of the format, or auto.
        source: for messages.
        kinds: what the task takes; None: everything.
        answered: whether the answer's column must be there.
        group: the column that holds the groups, which is no feature.
    """

    name: str
    source: str
    kinds: tuple[str, ...] | None = None
    answered: bool = True
    group: str | None = None

    def fits(self, chosen: DataFormat, rows: Sequence[Row], *, answer_given: bool) -> bool:
        """Whether rows with these columns are in this format, the answer's column added if need be."""
        without = self.group if chosen.kind == "arrays" else None
        head = [{k: v for k, v in r.values.items() if k != without} for r in rows[:LOOKED_AT]]
        columns = frozenset(k for r in rows for k in r.values if k != without)
        return chosen.matches(columns if answer_given or not chosen.answer else columns | {chosen.answer}, head)


def choose_format(rows: Sequence[Row], wanted: Wanted) -> DataFormat:
    """The named format, or with "auto" the one whose columns are there.

    Raises:
        DataError: no format fits, or columns are missing.
        UsageError: the named format is for other tasks.
    """
    known = [f for f in FORMATS.discover().values() if wanted.kinds is None or f.kind in wanted.kinds]
    if wanted.name == "auto":
        return _detected(rows, wanted, known)
    chosen = FORMATS.get(wanted.name)
    if chosen not in known:
        raise UsageError(
            f"data.format: {chosen.name!r} holds {chosen.kind!r} rows, which this task does not take",
            fix=f"a format that fits the task: auto, {_names(known) or 'there is none'}",
        )
    if not wanted.fits(chosen, rows, answer_given=wanted.answered):
        raise _misfit(chosen, rows, wanted)
    return chosen


def _detected(rows: Sequence[Row], wanted: Wanted, known: Sequence[DataFormat]) -> DataFormat:
    rows = rows[:LOOKED_AT]
    hits = [f for f in known if wanted.fits(f, rows, answer_given=True)]
    if not hits and not wanted.answered:
        hits = [f for f in known if f.answer and wanted.fits(f, rows, answer_given=False)]
    if hits:
        return max(hits, key=lambda f: len(f.required))  # the more columns a format needs, the surer the match
    columns = {c for r in rows for c in r.values}
    others = [f for f in FORMATS.discover().values() if f not in known and wanted.fits(f, rows, answer_given=True)]
    other = f"; they look like {_names(others)}, which this task does not take" if others else ""
    first = min(columns, default="COLUMN")
    column = known[0].required[0] if known else "NAME"
    raise DataError(
        f"no known format has the columns {', '.join(sorted(columns)) or '(none)'}{other}",
        where=wanted.source,
        why="formats and their columns: " + "; ".join(f"{f.name} ({f.description.rstrip('.')})" for f in known),
        fix=f"name the columns, for example: --set data.columns.{column}={first}",
    )


def _misfit(chosen: DataFormat, rows: Sequence[Row], wanted: Wanted) -> DataError:
    columns = frozenset(c for r in rows for c in r.values)
    missing = [c for c in chosen.required if not _has(chosen, c, columns) and (wanted.answered or c != chosen.answer)]
    found = f"found: {', '.join(sorted(columns))}"
    return DataError(
        f"format {chosen.name!r} needs the column {missing[0]!r}; {found}"
        if missing
        else f"the rows are not in the format {chosen.name!r} ({chosen.description.rstrip('.')}); {found}",
        where=wanted.source,
        fix=f"--set data.columns.{missing[0] if missing else chosen.required[0]}=NAME, or another data.format",
    )


def _has(chosen: DataFormat, column: str, columns: frozenset[str]) -> bool:
    return column in columns if not isinstance(chosen, RowFormat) else chosen.named(column, columns) is not None


def _names(formats: Iterable[DataFormat]) -> str:
    return ", ".join(f.name for f in formats)
