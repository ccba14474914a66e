"""Names of classes: what a row's label is called, which there are, and how much each weighs."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, field_validator

from lora_ft.errors import DataError, Problem, UsageError, did_you_mean
from lora_ft.records import Example

from ._base import Options

T = TypeVar("T")


def label_name(value: Any) -> str:
    """A label as the name of its class: text without surrounding white space, whole numbers, true and false.

    Raises:
        ValueError: nothing, or a number that is not whole.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # what a table makes of whole numbers where one is missing
        value = int(value)
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    if value is None or isinstance(value, str) or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("the row has no label")
    hint = "; numbers are learnt with task: regression" if isinstance(value, float) else ""
    raise ValueError(f"a class is named by text or a whole number, got {value!r}{hint}")


LabelName = Annotated[str, BeforeValidator(label_name)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LabelOptions(Options):
    """Options of tasks with classes."""

    labels: tuple[LabelName, ...] | None = Field(
        None, description="All labels in the order of their ids; default: those of the training rows, sorted."
    )
    class_weights: Literal["balanced"] | dict[LabelName, Weight] | None = Field(
        None,
        description="Weight of each label in the loss (1 where none is given), or balanced: in inverse proportion to "
        "how often it occurs.",
    )
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all labels.")

    @field_validator("labels", mode="after")
    @classmethod
    def _once_each(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        twice = [name for name, count in Counter(value or ()).items() if count > 1]
        if twice:
            raise ValueError(f"the label {twice[0]!r} is listed twice")
        return value

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        if value is None or value == "balanced":
            return value
        positive = isinstance(value, Mapping) and all(
            isinstance(w, int | float) and 0 < w < math.inf for w in value.values()
        )
        if not positive:
            raise ValueError("must be 'balanced', or a weight above 0 for each label")
        return dict(value)


def values_of(examples: Sequence[Example], read: Callable[[Example], T]) -> list[tuple[T, str]]:
    """What `read` finds in each example, with the row's place.

    Raises:
        DataError: naming all rows for which `read` raises ValueError.
    """
    found: list[tuple[T, str]] = []
    problems: list[Problem] = []
    for example in examples:
        try:
            found.append((read(example), example.where))
        except ValueError as error:
            problems.append(Problem(str(error), example.where))
    if problems:
        raise DataError.collect(problems, title=f"{len(problems)} of {len(examples)} rows cannot be learnt from")
    return found


def learn_labels(
    train: Sequence[tuple[Sequence[str], str]],
    held_out: Sequence[tuple[Sequence[str], str]],
    given: Sequence[str] | None,
    least: int = 2,
) -> tuple[str, ...]:
    """The labels in the order of their ids.

    Args:
        train: names and place of each training row.
        held_out: the same of the held-out rows; they can have no other label.
        given: the order, if the recipe says so; then no row has another label.
        least: labels that the training rows must have.

    Raises:
        DataError: too few labels, or rows with a label that is not known.
    """
    found = {name for names, _ in train for name in names}
    if given is not None:
        _check_known([*train, *held_out], given, "is not one of task.labels", "add it to task.labels, or mend the rows")
    else:
        fix = "add training rows with it, or list all labels in task.labels"
        _check_known(held_out, sorted(found), "of a held-out row is in no training row", fix)
    if len(found) < least:
        got = f"only the label {min(found)!r}" if found else "no label at all"
        raise DataError(
            f"the {len(train)} training rows have {got}", why="there is nothing to tell apart", fix="check the labels"
        )
    return tuple(given) if given is not None else tuple(_sorted(found))


def _check_known(rows: Sequence[tuple[Sequence[str], str]], known: Sequence[str], what: str, fix: str) -> None:
    strange: dict[str, list[str]] = {}
    for names, where in rows:
        for name in set(names) - set(known):
            strange.setdefault(name, []).append(where)
    if strange:
        problems = [
            Problem(f"the label {name!r}{_of(places)} {what}; {did_you_mean(name, known)}", places[0])
            for name, places in strange.items()
        ]
        raise DataError.collect(problems, title=f"{len(strange)} labels are not known", fix=fix)


def _of(places: Sequence[str]) -> str:
    return f" ({len(places)} rows)" if len(places) > 1 else ""


def _sorted(names: set[str]) -> list[str]:
    """By value when all are whole numbers, else by name."""
    if all(re.fullmatch(r"[+-]?\d+", n) for n in names):
        return sorted(names, key=lambda n: (int(n), n))
    return sorted(names)


def class_weights(
    wanted: str | Mapping[str, float] | None, labels: Sequence[str], counts: Mapping[str, int], rows: int | None = None
) -> tuple[float, ...]:
    """The weight of each label in the loss; () when all weigh the same.

    balanced is n / (k c) for one of k labels that c of n carry, so that each label has the same share. Where a row has
    any number of labels (`rows`), it is (rows - c) / c, so that rows with and without a label have the same share.

    Args:
        wanted: the option.
        labels: in the order of their ids.
        counts: how often each occurs.
        rows: number of rows, for labels that do not exclude each other.

    Raises:
        UsageError: a weight for a label that there is not.
        DataError: balanced, and a label that no row has.
    """
    if wanted is None:
        return ()
    if isinstance(wanted, Mapping):
        for name in wanted:
            if name not in labels:
                raise UsageError(f"task.class_weights: no label is called {name!r}; {did_you_mean(name, labels)}")
        return tuple(float(wanted.get(name, 1.0)) for name in labels)
    absent = [name for name in labels if not counts.get(name)]
    if absent:
        raise DataError(
            f"task.class_weights: balanced needs training rows of every label; none has {absent[0]!r}",
            fix="give the weights by hand, or leave the label out of task.labels",
        )
    if rows is not None:  # a label of every row has nothing to be balanced with
        return tuple((rows - counts[name]) / counts[name] or 1.0 for name in labels)
    whole = sum(counts[name] for name in labels)
    return tuple(whole / (len(labels) * counts[name]) for name in labels)


def label_ids(names: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The ids of these labels.

    Raises:
        ValueError: a label that is not known.
    """
    index = {name: i for i, name in enumerate(labels)}
    for name in names:
        if name not in index:
            raise ValueError(f"the label {name!r} is not known; {did_you_mean(name, labels)}")
    return [index[name] for name in names]


def label_arguments(labels: Sequence[str]) -> dict[str, Any]:
    """The labels as a model's config keeps them."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
