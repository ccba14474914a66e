"""Rows -> examples in canonical form: detect the format, rename columns, check every row."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ft.errors import DataError, Problem, UsageError
from lora_ft.recipe import Source
from lora_ft.records import Example
from lora_ft.registry import DataFormat

from ._columns import aligned, groups, renamed
from ._detect import Wanted, choose_format
from ._format import RowFormat
from ._row import Row
from .memory import rows_of
from .read import read_rows


def load_examples(  # noqa: PLR0913 - what a caller may say of a source
    source: Any,
    format_name: str,
    columns: Mapping[str, str],
    *,
    kinds: tuple[str, ...] | None = None,
    group_column: str | None = None,
    grouped: bool = True,
    answered: bool = True,
    name: str = "data",
    media_root: str | None = None,
) -> tuple[list[Example], str]:
    """Examples of `source` and the name of their format.

    Args:
        source: a name as `read_rows` takes it, or what `rows_of` takes from memory.
        format_name: a format's name, or "auto".
        columns: the format's column name -> the file's.
        kinds: the kinds of examples that serve; None: all.
        group_column: the file's column that holds each row's group.
        grouped: whether every row must have one, because they are to be split.
        answered: whether answers must be there, as for training.
        name: of what is in memory, for messages.
        media_root: folder of the images and sounds; default that of the rows' file.

    Raises:
        DataError: no format fits, a column is missing, or rows that are wrong (each named).
        UsageError: the named format is of another kind.
    """
    rows: Sequence[Row] = read_rows(source) if isinstance(source, str) else rows_of(source, name)
    source = source if isinstance(source, str) else name
    of_rows = groups(rows, group_column, source, grouped)
    rows = renamed(rows, columns, source, answered)
    chosen = choose_format(rows, Wanted(format_name, source, kinds, answered, group_column))
    if chosen.kind == "arrays":
        rows = aligned(rows, group_column)
    examples, problems = [], []
    for row, group in zip(rows, of_rows, strict=True):
        try:
            found = chosen.to_examples(row.values, answered)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            text = str(error) if isinstance(error, ValueError) else f"malformed row: {error!r}"
            problems.append(Problem(text, row.where))
            continue
        places = [row.where] if len(found) == 1 else [f"{row.where} [{n}]" for n in range(1, len(found) + 1)]
        root = row.folder if media_root is None else str(Path(media_root).expanduser().resolve())
        for fields, where in zip(found, places, strict=True):
            together = group or ("" if len(found) == 1 else _group_of(chosen, fields, row.where))
            examples.append(Example(fields, where, source, together, root))
    _raise(problems, len(rows), chosen)
    return examples, chosen.name


def load_sources(
    train: str | Sequence[Source],
    format_name: str,
    columns: Mapping[str, str],
    *,
    kinds: tuple[str, ...] | None = None,
    group_column: str | None = None,
    media_root: str | None = None,
) -> tuple[list[Example], str, dict[str, float]]:
    """Examples of one set or of several that are mixed, the names of their formats, and the weight of each set.

    Args:
        train: a source, or several with weights.
        format_name: as for `load_examples`, for all of them.
        columns: the format's column name -> the files'.
        kinds: the kinds of examples that serve; None: all.
        group_column: the files' column that holds each row's group.
        media_root: as for `load_examples`.

    Raises:
        UsageError: a set is named twice, or a row is in two of them.
        DataError: as `load_examples`.
    """
    sources = (Source(path=train),) if isinstance(train, str) else tuple(train)
    twice = [path for path, count in Counter(s.path for s in sources).items() if count > 1]
    if twice:
        raise UsageError(f"data.train names {twice[0]!r} twice", fix="name it once, with a higher weight")
    examples: list[Example] = []
    names: dict[str, None] = {}
    for source in sources:
        found, name = load_examples(
            source.path, format_name, columns, kinds=kinds, group_column=group_column, media_root=media_root
        )
        examples += found
        names[name] = None
    places = Counter(e.where for e in examples)
    if len(places) < len(examples):
        row, _ = places.most_common(1)[0]
        raise UsageError("two sets of data.train hold the same row of a file", where=row, fix="name the file once")
    return examples, ", ".join(names), {s.path: s.weight for s in sources}


def _group_of(chosen: DataFormat, fields: Mapping[str, Any], where: str) -> str:
    """Examples of one row are never parted by a split, unless their format says so."""
    return str(chosen.group_of(fields, where)) if isinstance(chosen, RowFormat) else where


def _raise(problems: Sequence[Problem], rows: int, chosen: DataFormat) -> None:
    if problems:
        raise DataError.collect(
            problems,
            title=f"{len(problems)} of {rows} rows are wrong for the format {chosen.name!r}",
            fix="mend these rows, or choose another format (lora-ft list formats)",
        )
