"""Rows -> examples in canonical form: detect the format, rename columns, check every row; and the held-out split."""

import random
from collections.abc import Mapping, Sequence

from lora_ft.errors import DataError, Problem, did_you_mean
from lora_ft.records import Example
from lora_ft.registry import FORMATS, DataFormat

from .read import Row, read_rows


def load_examples(
    source: str, format_name: str, columns: Mapping[str, str], *, answered: bool = True
) -> tuple[list[Example], str]:
    """Examples of `source` and the name of their format.

    Args:
        source: see `read_rows`.
        format_name: a format's name, or "auto".
        columns: the format's column name -> the file's.
        answered: whether answers must be there, as for training.

    Raises:
        DataError: no format fits, a column is missing, or rows that are wrong (each named).
    """
    rows = _renamed(read_rows(source), columns, source, answered)
    chosen = _detect(rows, source, answered) if format_name == "auto" else FORMATS.get(format_name)
    if format_name != "auto":
        _check_columns(chosen, rows, source, answered)
    examples, problems = [], []
    for row in rows:
        try:
            examples.append(Example(chosen.to_example(row.values, answered), row.where))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            text = str(error) if isinstance(error, ValueError) else f"malformed row: {error!r}"
            problems.append(Problem(text, row.where))
    if problems:
        raise DataError.collect(
            problems,
            title=f"{len(problems)} of {len(rows)} rows are wrong for the format {chosen.name!r}",
            fix="mend these rows, or choose another format (lora-ft list formats)",
        )
    return examples, chosen.name


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) rows; the same rows are held out for the same seed, whatever their order of use."""
    held = max(1, round(len(examples) * share))
    if held >= len(examples):
        raise DataError(f"{len(examples)} rows are too few to hold out {share:.0%}", fix="--set data.eval=null")
    chosen = set(random.Random(seed).sample(range(len(examples)), held))
    return (
        [e for i, e in enumerate(examples) if i not in chosen],
        [e for i, e in enumerate(examples) if i in chosen],
    )


def _renamed(rows: list[Row], columns: Mapping[str, str], source: str, answered: bool) -> list[Row]:
    if not columns:
        return rows
    found = set().union(*(r.values for r in rows))
    for wanted, theirs in columns.items():
        if theirs not in found and wanted not in found and answered:
            raise DataError(
                f"data.columns: there is no column {theirs!r} (for {wanted!r}); {did_you_mean(theirs, found)}",
                where=source,
            )
    back = {theirs: ours for ours, theirs in columns.items() if theirs in found}
    return [
        Row({back.get(k, k): v for k, v in r.values.items() if k in back or k not in back.values()}, r.where)
        for r in rows
    ]


def _detect(rows: Sequence[Row], source: str, answered: bool) -> DataFormat:
    head = [r.values for r in rows[:20]]
    columns = frozenset().union(*head)
    known = FORMATS.discover().values()
    hits = [f for f in known if f.matches(columns, head)]
    if not hits and not answered:
        hits = [f for f in known if f.answer and f.matches(columns | {f.answer}, head)]
    if not hits:
        wanted = "; ".join(f"{f.name} ({', '.join(f.required)})" for f in known)
        raise DataError(
            f"no known format has the columns {', '.join(sorted(columns)) or '(none)'}",
            where=source,
            why=f"formats and the columns they need: {wanted}",
            fix=f"name the columns, for example: --set data.columns.prompt={min(columns, default='COLUMN')}",
        )
    return max(hits, key=lambda f: len(f.required))  # the more columns a format needs, the surer the match


def _check_columns(chosen: DataFormat, rows: Sequence[Row], source: str, answered: bool) -> None:
    columns = frozenset().union(*(r.values for r in rows))
    given = columns if answered or not chosen.answer else columns | {chosen.answer}
    if not chosen.matches(given, [r.values for r in rows[:20]]):
        missing = [c for c in chosen.required if c not in given] or list(chosen.required)
        raise DataError(
            f"format {chosen.name!r} needs the column {missing[0]!r}; found: {', '.join(sorted(columns))}",
            where=source,
            fix=f"--set data.columns.{missing[0]}=NAME, or another data.format",
        )
