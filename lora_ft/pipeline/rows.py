"""The rows of a recipe: training sets read and mixed, held-out rows split off or read, all of it cleaned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lora_ft.data import CleaningReport, clean, is_split, load_examples, load_sources, split
from lora_ft.errors import UsageError
from lora_ft.models import python_module
from lora_ft.recipe import Recipe, Source
from lora_ft.records import Example
from lora_ft.registry import Task
from lora_ft.runs import Run


@dataclass(frozen=True)
class Given:
    """What a caller from Python has in memory instead of files.

    Attributes:
        train: data for `lora_ft.data.memory.examples_of`.
        held_out: the same, or None for the recipe's `data.eval`.
        model: a module instead of the recipe's model.
        trust_code: whether a recipe's own Python function may run.
    """

    train: Any = None
    held_out: Any = None
    model: Any = None
    trust_code: bool = False


@dataclass(frozen=True)
class Rows:
    """Examples of a recipe.

    Attributes:
        training: examples to learn from.
        held_out: examples to judge on.
        format: name of the row format.
        source: where the training rows are from, for messages.
        weights: of the training sets, where there are several.
        report: what cleaning found.
    """

    training: list[Example]
    held_out: list[Example]
    format: str
    source: str
    weights: Mapping[str, float] = field(default_factory=dict)
    report: CleaningReport | None = None


def read(recipe: Recipe, task: Task, given: Given) -> Rows:
    """Everything the recipe's data section names, split and cleaned.

    Raises:
        DataError: rows that cannot be read or are of the wrong kind.
    """
    data = recipe.data
    options: dict[str, Any] = {"kinds": task.kinds, "group_column": data.group_column, "media_root": data.media_root}
    if given.train is not None:
        examples, name = load_examples(given.train, data.format, data.columns, name="train", **options)
        weights: Mapping[str, float] = {}
    else:
        # By absolute paths, so that a run resumed from another folder has the same sets in the same order.
        sets = data.train if isinstance(data.train, str) else [_absolute_set(s) for s in data.train]
        examples, name, weights = load_sources(sets, data.format, data.columns, **options)
    held: list[Example] = []
    if given.held_out is not None:
        held, _ = load_examples(given.held_out, data.format, data.columns, name="eval", grouped=False, **options)
    elif data.eval is not None and is_split(data.eval):
        examples, held = split(examples, data.eval, recipe.seed)
    elif data.eval is not None:
        held, _ = load_examples(data.eval, data.format, data.columns, grouped=False, **options)
    examples, held, report = clean(examples, held, data.deduplicate)
    return Rows(examples, held, name, source_name(data.train), weights if len(weights) > 1 else {}, report)


def to_judge(recipe: Recipe, task: Task, source: str | None) -> tuple[list[Example], str, str]:
    """Rows to judge a finished run on, where they are from, and their format.

    Args:
        recipe: of the run.
        task: of the recipe.
        source: a file of rows; None for the run's held-out rows.
    """
    data = recipe.data
    wanted = source or data.eval
    if wanted is None:
        raise UsageError("this run held out no rows to judge on", fix="lora-ft eval RUN --data FILE")
    if source is None and is_split(wanted):
        rows = read(recipe, task, Given())
        return rows.held_out, rows.source, rows.format
    name = data.format if source is None else "auto"
    root = data.media_root if source is None else None
    examples, name = load_examples(
        wanted, name, data.columns, kinds=task.kinds, group_column=data.group_column, grouped=False, media_root=root
    )
    return examples, wanted, name


def source_name(train: str | tuple[Source, ...]) -> str:
    """The training sets in one line."""
    return train if isinstance(train, str) else " + ".join(s.path for s in train)


def _absolute_set(source: Source) -> Source:
    return Source(path=absolute(source.path), weight=source.weight)


def absolute(path: str) -> str:
    """A path that works from any folder; names that are no path stay as they are."""
    if python_module.is_spec(path):
        return python_module.absolute(path)
    return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path


def absolute_sets(train: str | Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    """`data.train` with absolute paths."""
    return absolute(train) if isinstance(train, str) else [{**s, "path": absolute(s["path"])} for s in train]


class Known(Protocol):
    """A finished run, loaded or not."""

    @property
    def recipe(self) -> Recipe:
        """Its recipe."""

    @property
    def task(self) -> Task:
        """Its task, knowing its data."""

    @property
    def run(self) -> Run:
        """The run."""

    @property
    def given(self) -> Given:
        """What the caller has in memory."""


def held_out_rows(loaded: Known, data: str | None = None) -> tuple[list[Example], str, str]:
    """Rows to judge on, where they are from, and their format; those in memory must be given again.

    Args:
        loaded: the run.
        data: a file instead of the run's own rows.

    Raises:
        UsageError: the run's held-out rows were in memory, and nothing is given instead.
    """
    recipe, given, known = loaded.recipe.data, loaded.given, loaded.run.facts.get("in_memory", ())
    part = recipe.eval is not None and is_split(recipe.eval)
    if data is None and given.held_out is not None:
        examples, name = load_examples(
            given.held_out, recipe.format, recipe.columns, kinds=loaded.task.kinds, group_column=recipe.group_column,
            grouped=False, name="eval", media_root=recipe.media_root,
        )  # fmt: skip
        return examples, "eval", name
    if data is None and given.train is not None and part and "eval_data" not in known:
        found = read(loaded.recipe, loaded.task, given)
        return found.held_out, found.source, found.format
    if data is None and ("eval_data" in known or ("train_data" in known and part)):
        what = "held_out" if "eval_data" in known else "train"
        fix = f"--data FILE; from Python given=lora_ft.Given({what}=THE_SAME_ROWS)"
        raise UsageError("the held-out rows of this run were in memory", where=str(loaded.run.path), fix=fix)
    return to_judge(loaded.recipe, loaded.task, data)
