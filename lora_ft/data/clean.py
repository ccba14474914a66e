"""What is wrong with rows that can be read: duplicates, contradictions, held-out rows among the training rows."""

import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_ft.errors import DataError
from lora_ft.records import Example

from ._labels import LABELS, MEDIA, NOT_INPUT, content_of, labels_of

SHOWN = 3  # places in a line
KEPT = 100  # places in RUN/data-report.json
UNEVEN = 10  # times as many rows in the largest class as in the smallest


@dataclass(frozen=True)
class CleaningReport:
    """What was found in the training rows, and beside the held-out rows.

    Attributes:
        rows: training rows as read.
        held_out: held-out rows.
        dropped: training rows taken out.
        duplicates: training rows that say the same as an earlier one.
        conflicts: pairs of training rows with the same input and different labels.
        overlap: training rows whose input is also that of a held-out row.
        leaked: held-out rows whose input is also that of a training row.
        empty: rows whose input has no letter or digit.
        labels: training rows (of tags: words) by label, of those that are left.
        held_out_labels: the same of the held-out rows.
        one_label: whether a row has one label, as classes are, rather than several or tags.
        sources: rows left by set.
        median_length: characters of the input, None for numbers.
        longest_length: the same of the longest row.
        longest: the place of the longest row.
    """

    rows: int
    held_out: int
    dropped: int = 0
    duplicates: tuple[str, ...] = ()
    conflicts: tuple[tuple[str, str], ...] = ()
    overlap: tuple[str, ...] = ()
    leaked: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    held_out_labels: Mapping[str, int] = field(default_factory=dict)
    one_label: bool = True
    sources: Mapping[str, int] = field(default_factory=dict)
    median_length: int | None = None
    longest_length: int | None = None
    longest: str = ""

    def lines(self) -> list[tuple[str, str]]:
        """(note or warn, text) for the terminal, what is wrong last."""
        found = []
        if self.longest_length is not None:
            text = f"length: median {self.median_length:,} characters, longest {self.longest_length:,} ({self.longest})"
            found.append(("note", text))
        if len(self.sources) > 1:
            found.append(("note", "rows by set: " + ", ".join(f"{s} {n}" for s, n in self.sources.items())))
        found += self._label_lines()
        fate = "dropped" if self.dropped else "data.deduplicate=true drops them"
        if self.duplicates:
            text = f"{len(self.duplicates)} of {self.rows} training rows repeat an earlier one {_some(self.duplicates)}"
            found.append(("note", f"{text}: {fate}"))
        if self.overlap:
            text = f"{len(self.overlap)} training rows have the input of {len(self.leaked)} held-out rows"
            level = "note" if self.dropped else "warn"
            found.append((level, f"{text} {_some(self.overlap)}: {fate}"))
        if self.conflicts:
            places = [f"{a} and {b}" for a, b in self.conflicts]
            text = f"{len(places)} training rows have the input of an earlier row and another label {_some(places)}"
            found.append(("warn", text))
        if self.empty:
            found.append(("warn", f"{len(self.empty)} rows have no letter or digit {_some(self.empty)}"))
        return found

    def _label_lines(self) -> list[tuple[str, str]]:
        if not self.labels:
            return []
        small, large = min(self.labels, key=self.labels.__getitem__), max(self.labels, key=self.labels.__getitem__)
        least, most = self.labels[small], self.labels[large]
        text = f"{len(self.labels)} labels: " + (
            f"{least} of each" if least == most else f"fewest {small} ({least}), most {large} ({most})"
        )
        uneven = "; data.sampling=balanced evens them out" if self.one_label and most >= UNEVEN * least else ""
        found = [("note", text + uneven)]
        only = [n for n in self.labels if n not in self.held_out_labels] if self.held_out else []
        if only:
            found.append(("note", f"{len(only)} labels are in no held-out row: {_names(only)}"))
        unseen = [n for n in self.held_out_labels if n not in self.labels]
        if unseen:
            found.append(("warn", f"{len(unseen)} labels of held-out rows are in no training row: {_names(unseen)}"))
        return found

    def facts(self) -> dict[str, Any]:
        """For RUN/data-report.json: counts, and at most 100 places of each kind."""
        places = {"duplicates", "overlap", "leaked", "empty", "conflicts"}
        counts = {
            name: {"count": len(getattr(self, name)), "where": list(getattr(self, name)[:KEPT])} for name in places
        }
        return {
            "rows": self.rows,
            "held_out": self.held_out,
            "dropped": self.dropped,
            **dict(sorted(counts.items())),
            "labels": dict(self.labels),
            "held_out_labels": dict(self.held_out_labels),
            "sources": dict(self.sources),
            "characters": {"median": self.median_length, "longest": self.longest_length, "where": self.longest},
        }


def clean(
    train: Sequence[Example], held: Sequence[Example], deduplicate: bool
) -> tuple[list[Example], list[Example], CleaningReport]:
    """(training rows, held-out rows, what was found); nothing is changed unless asked.

    Args:
        train: training rows.
        held: held-out rows; they always stay.
        deduplicate: drop training rows that repeat an earlier one, or that have a held-out row's input.

    Raises:
        DataError: nothing is left to train on.
    """
    found = _compare(train, held)
    out = {*found.duplicates, *found.overlap} if deduplicate else set()
    kept = [e for i, e in enumerate(train) if i not in out]
    if train and not kept:
        raise DataError("every training row is also held out", fix="other held-out rows, or data.deduplicate=false")
    labels = labels_of([*kept, *held])
    lengths = [sum(map(len, _texts(e.fields, LABELS))) for e in kept]
    longest = max(range(len(kept)), key=lengths.__getitem__, default=0)
    report = CleaningReport(
        rows=len(train),
        held_out=len(held),
        dropped=len(out),
        duplicates=tuple(train[i].where for i in found.duplicates),
        conflicts=tuple((train[i].where, train[j].where) for i, j in found.conflicts),
        overlap=tuple(train[i].where for i in found.overlap),
        leaked=tuple(held[i].where for i in found.leaked),
        empty=tuple(e.where for e in [*kept, *held] if _empty(e)),
        labels=Counter(name for row in labels[: len(kept)] for name in row),
        held_out_labels=Counter(name for row in labels[len(kept) :] for name in row),
        one_label=not any("labels" in e.fields or "tags" in e.fields for e in kept),
        sources=Counter(e.source for e in kept),
        median_length=round(statistics.median(lengths)) if any(lengths) else None,
        longest_length=lengths[longest] if any(lengths) else None,
        longest=kept[longest].where if any(lengths) else "",
    )
    return kept, list(held), report


@dataclass
class _Found:
    """Indices of training rows, and of held-out rows that are among them."""

    duplicates: list[int] = field(default_factory=list)
    conflicts: list[tuple[int, int]] = field(default_factory=list)
    overlap: list[int] = field(default_factory=list)
    leaked: list[int] = field(default_factory=list)


def _compare(train: Sequence[Example], held: Sequence[Example]) -> _Found:
    found = _Found()
    tested = [content_of(e).given for e in held]
    to_test, seen = set(tested), set()
    first: dict[Any, tuple[int, Any]] = {}
    for index, example in enumerate(train):
        content = content_of(example)
        earlier, label = first.setdefault(content.given, (index, content.label))
        if content in seen:
            found.duplicates.append(index)
        elif content.label != label:
            found.conflicts.append((earlier, index))
        if content.given in to_test:
            found.overlap.append(index)
        seen.add(content)
    found.leaked = [i for i, given in enumerate(tested) if given in first]
    return found


def _texts(value: Any, without: Collection[str] = ()) -> Iterator[str]:
    """All text of an example but its labels; of messages the contents."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        inner = value.get("content", "") if "role" in value else None
        hidden = {*without, *MEDIA, "id"} if "type" not in value else {*MEDIA, "type"}
        for part in [v for k, v in value.items() if k not in hidden] if inner is None else [inner]:
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _empty(example: Example) -> bool:
    """Numbers are never empty."""
    texts = list(_texts(example.fields, NOT_INPUT))
    return bool(texts) and not any(c.isalnum() for text in texts for c in text)


def _some(places: Sequence[str]) -> str:
    return f"({', '.join(places[:SHOWN])}{', ...' if len(places) > SHOWN else ''})"


def _names(labels: Sequence[str]) -> str:
    return ", ".join(labels[:SHOWN]) + (", ..." if len(labels) > SHOWN else "")
