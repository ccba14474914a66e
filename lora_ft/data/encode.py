"""All examples through a task's encoder, with a count of what became of each and one error for all that fail."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_ft.ahead import Ahead
from lora_ft.errors import DataError, Problem
from lora_ft.records import DataReport, Encoded, Example, Sample

MAX_UNLABELLED = 0.05  # above this share of rows without a label, something is wrong with the data or the template


def encode_all(
    examples: Sequence[Example],
    encoder: Callable[[Example], Encoded],
    *,
    source: str,
    format_name: str,
    max_length: int,
    workers: int = 0,
) -> tuple[list[Sample], DataReport]:
    """Samples that carry labels, and the report.

    Args:
        examples: all rows.
        encoder: of the task; raises ValueError for a row that cannot be encoded.
        source, format_name: for the report.
        max_length: for messages.
        workers: threads that encode at once, for rows whose encoding reads files.

    Raises:
        DataError: rows that cannot be encoded; rows over max_length with `overlong: error`; nothing left; more than
            5 % of the rows without a trainable token.
    """
    samples: list[Sample] = []
    outcomes: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    problems: list[Problem] = []

    def tried(example: Example) -> Encoded | ValueError:
        try:
            return encoder(example)
        except ValueError as error:
            return error

    with Ahead(tried, examples, workers) as results:
        found = list(results)
    for example, encoded in zip(examples, found, strict=True):
        if isinstance(encoded, ValueError):
            problems.append(Problem(str(encoded), example.where))
            continue
        outcome = encoded.outcome
        kept = [s for s in encoded.samples if s.labelled]
        if not kept and not outcome:
            outcome = "no trainable token"
        if outcome:
            outcomes[outcome] += 1
            places.setdefault(outcome, []).append(example.where)
        samples += [replace(s, source=example.source, place=len(samples) + i) for i, s in enumerate(kept)]
    if problems:
        raise DataError.collect(problems, title=f"{len(problems)} of {len(examples)} rows cannot be encoded")
    _check(len(examples), len(samples), outcomes, places, max_length)
    report = DataReport(
        source=source,
        format=format_name,
        rows=len(examples),
        samples=len(samples),
        tokens=sum(s.length for s in samples),
        labelled_tokens=sum(s.labelled for s in samples),
        outcomes=dict(outcomes),
    )
    return samples, report


def _check(rows: int, samples: int, outcomes: Counter[str], places: dict[str, list[str]], max_length: int) -> None:
    counts = ", ".join(f"{n} {what}" for what, n in outcomes.items())
    over = outcomes.get("over max_length", 0)
    if over:
        raise DataError(
            f"{over} of {rows} rows are longer than max_length {max_length}",
            where=_some(places["over max_length"]),
            fix=f"--set data.max_length={max_length * 2}, or --set data.overlong=truncate_prompt",
        )
    empty = outcomes.get("no trainable token", 0)
    if empty > MAX_UNLABELLED * rows or (empty and not samples):
        raise DataError(
            f"{empty} of {rows} rows have no trainable token",
            where=_some(places["no trainable token"]),
            why="there is no assistant turn, or its text is empty or cut away, so every label is masked",
            fix=f"check the rows; --set data.max_length={max_length * 2} if answers are cut away",
        )
    if not samples:
        raise DataError(
            f"no row is left to use ({counts or 'there were none'})",
            why=f"max_length is {max_length}",
            fix=f"--set data.max_length={max_length * 4}, or --set data.overlong=truncate_prompt",
        )


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (" ..." if len(places) > 3 else "")
