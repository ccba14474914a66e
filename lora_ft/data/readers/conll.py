"""CoNLL files: a word a line, a blank line between sentences; the tag is the last column, in CoNLL-U the fourth."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_ft.data._row import MAX_PROBLEMS, Row, text_of_file
from lora_ft.errors import DataError, Problem

SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".conllu")
UNIVERSAL_COLUMNS = 10
FORM, UPOS = 1, 3
DOCUMENT = "-DOCSTART-"


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    columns: tuple[str, ...]  # none: a blank line


def read(path: Path) -> Iterator[Row]:
    """A row of tokens and tags for each sentence; its place is the line of its first word. Words alone have no tags."""
    lines = [_Line(n, _columns(line)) for n, line in enumerate(text_of_file(path).split("\n"), 1)]
    words = _universal(lines, path) if path.suffix.lower() == ".conllu" else _plain(lines, path)
    sentence: list[_Line] = []
    for line in [*words, _Line(0, ())]:
        if line.columns:
            sentence.append(line)
        elif sentence:
            tagged = {} if len(sentence[0].columns) == 1 else {"tags": [w.columns[-1] for w in sentence]}
            yield Row({"tokens": [w.columns[0] for w in sentence], **tagged}, f"{path}:{sentence[0].number}")
            sentence = []


def _columns(line: str) -> tuple[str, ...]:
    line = line.rstrip("\r")
    if not line.strip():
        return ()
    # Not str.split: a word may hold a no-break space.
    return tuple(line.split("\t") if "\t" in line else re.split(" +", line.strip(" ")))


def _plain(lines: list[_Line], path: Path) -> list[_Line]:
    """Lines with a word and a tag. `# ...` is a comment unless it has a word line's columns and another line's tag."""
    certain = [c for c in lines if c.columns and c.columns[0] != DOCUMENT and not c.columns[0].startswith("#")]
    width = len(certain[0].columns) if certain else 0
    tags = {line.columns[-1] for line in certain}
    kept, problems = [], []
    for line in lines:
        columns = line.columns
        if not columns:
            kept.append(line)
        elif columns[0] == DOCUMENT or _comment(columns, width, tags):
            continue
        elif len(columns) != width or not all(columns):
            said = f"{len(columns)} columns, the file's first word has {width}: {' '.join(columns)[:60]!r}"
            problems.append(Problem(said if all(columns) else "an empty column", f"{path}:{line.number}"))
        else:
            kept.append(line)
    return _checked(kept, problems)


def _comment(columns: tuple[str, ...], width: int, tags: set[str]) -> bool:
    begins = columns[0].startswith("# ") or (columns[0] == "#" and len(columns) > 1)
    return begins and (len(columns) != width or columns[-1] not in tags)


def _universal(lines: list[_Line], path: Path) -> list[_Line]:
    """FORM and UPOS; comments, ranges of words (1-2) and empty nodes (1.1) are skipped."""
    kept, problems = [], []
    for line in lines:
        columns = line.columns
        if not columns:
            kept.append(line)
        elif columns[0].startswith("#"):
            continue
        elif len(columns) != UNIVERSAL_COLUMNS:
            said = f"{len(columns)} columns; CoNLL-U has {UNIVERSAL_COLUMNS}, parted by tabs"
            problems.append(Problem(said, f"{path}:{line.number}"))
        elif columns[0].isdecimal():
            kept.append(_Line(line.number, (columns[FORM], columns[UPOS])))
    return _checked(kept, problems)


def _checked(kept: list[_Line], problems: list[Problem]) -> list[_Line]:
    if problems:
        raise DataError.collect(
            problems[:MAX_PROBLEMS], title=f"{len(problems)} lines are wrong", fix="one word a line, its tag last"
        )
    return kept
