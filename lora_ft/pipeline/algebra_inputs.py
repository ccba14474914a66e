"""What the algebra verbs read: runs of ours, PEFT adapter folders, their base, and rows for a guard."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_ft.data import encode_all
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import PROBES_FILE, read_probes
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import check_files, grow_embeddings, load_processor, pick_device, vocabulary_rows
from lora_ft.models.opening import BaseSpec
from lora_ft.models.resolve import resolve
from lora_ft.recipe import Recipe, load_recipe
from lora_ft.records import Listener
from lora_ft.registry import TASKS, Task
from lora_ft.runs import Run
from lora_ft_adapters import AdapterError, algebra, load_adapter
from lora_ft_adapters.weights import TensorFolder

from .judge import Judge, token_budget
from .prepare import base_spec, encode_options, workers
from .rows import to_judge


@dataclass(frozen=True)
class Input:
    """One adapter, or the tuned model of `extract`.

    Attributes:
        name: what messages and the model card call it; no path.
        folder: of the adapter's files.
        base: the base model as the user or the recipe names it.
        task_name: lora-ft's name of the task.
        run: the run it is from, or None.
    """

    name: str
    folder: Path
    base: str
    task_name: str
    run: Run | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether its tokenizer is beside it."""
        return (self.folder / "tokenizer_config.json").is_file()

    @property
    def task(self) -> Task:
        """The task, knowing what the run knew."""
        task = TASKS.get(self.task_name)
        if self.run is None:
            return task
        return task.configure(self.recipe().task.options()).recall(self.run.facts.get("task_facts", {}))

    def spec(self, listener: Listener) -> BaseSpec:
        """How its base is opened; what the base's files lack starts as it did in the run."""
        task = self.task
        if task.auto_class is None:
            raise UsageError(f"the base of a {task.name} run is built by a function; algebra wants a model in files")
        source = resolve(self.base, listener.note)
        if self.run is not None:
            return base_spec(self.recipe(), task, source)
        return BaseSpec(source, task.auto_class, task.model_arguments())

    def recipe(self, data: str | None = None) -> Recipe:
        """The run's recipe, or one of defaults for a plain adapter and its rows."""
        if self.run is not None:
            return load_recipe([self.run.recipe]).recipe
        if data is None:
            raise UsageError("a plain adapter has no held-out rows to judge on", fix="--data FILE")
        return load_recipe([{"model": self.base, "task": self.task_name, "data": {"train": data}}]).recipe

    def probes(self) -> list[dict[str, Any]]:
        """Its probe inputs, empty where it has none."""
        return read_probes(self.folder) if (self.folder / PROBES_FILE).is_file() else []


def find_inputs(sources: Sequence[str | Path], base: str | None) -> list[Input]:
    """Runs and adapter folders, all of one base.

    Raises:
        ArtifactError: a folder that is neither.
        UsageError: no base is known, or several.
    """
    inputs = [_find(Path(s), base) for s in sources]
    named = [i.base for i in inputs if i.base]
    if not named:
        raise UsageError("a PEFT adapter folder does not say where its base model is", fix="--base MODEL")
    if len(set(named)) > 1:
        raise UsageError(f"the adapters are of different bases: {' and '.join(sorted(set(named)))}", fix="--base MODEL")
    return [i if i.base else Input(i.name, i.folder, named[0], i.task_name) for i in inputs]


def _find(path: Path, base: str | None) -> Input:
    if (path / "run.json").is_file():
        run = Run(path).final
        if not (run.adapter / "adapter_config.json").is_file():
            raise ArtifactError(
                f"this run has no adapter yet; its status is {run.facts.get('status')!r}", where=str(path)
            )
        recipe = load_recipe([path / "recipe.resolved.yaml"]).recipe
        return Input(path.name, run.adapter, base or recipe.model, recipe.task.type, run)
    config = path / "adapter_config.json"
    if not config.is_file():
        raise ArtifactError(
            "this is neither a run nor a PEFT adapter: it has no run.json and no adapter_config.json",
            where=str(path),
            fix="give the folder that `lora-ft train` printed, or one with adapter_model.safetensors",
        )
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("task_type")
    except (ValueError, AttributeError) as error:
        raise ArtifactError("the adapter's config is unreadable", where=str(config)) from error
    tasks = [t.name for t in TASKS.discover().values() if t.peft_task_type == kind]
    return Input(path.resolve().name, path, base or "", tasks[0] if tasks else "causal-lm")


def tuned_input(base: str, tuned: str) -> Input:
    """The two models of `extract`; `tuned` is already resolved."""
    return Input(Path(tuned).name, Path(tuned), base, "causal-lm")


def open_base(inputs: Sequence[Input], listener: Listener) -> Any:
    """The base, unquantised in float32, checked against the one that each run was trained on.

    Raises:
        ArtifactError: it cannot be loaded, or is another one.
    """
    first = inputs[0]
    device = pick_device()
    if device.type == "mps":
        device = torch.device("cpu")  # MPS has no float64
    opened = first.spec(listener).open(dtype=torch.float32, device=device)
    model, mark = opened.model, fingerprint(opened.model, opened.fresh)
    for one in inputs:
        facts = one.run.facts if one.run is not None else {}
        if facts and facts.get("quant") == "none" and facts.get("fingerprint") != mark:
            raise ArtifactError(
                "the base model is not the one this adapter was trained on: names, shapes or values differ",
                where=one.name,
                fix="--base with the files that it was trained on",
            )
    _grow(model, inputs)
    return model


def _grow(model: Any, inputs: Sequence[Input]) -> None:
    """Give the base the rows of tokens that training added, as `load` does; all inputs must have added the same."""
    rows = vocabulary_rows(model)
    added: dict[str, dict[int, str]] = {}
    for one in inputs:
        vocabulary = load_processor(str(one.folder)).get_vocab() if one.has_tokenizer else {}
        new = {i: t for t, i in vocabulary.items() if i >= rows}
        if new:
            added[one.name] = new
    first = next(iter(added.values()), {})
    if any(new != first for new in added.values()):
        raise UsageError(f"the adapters {' and '.join(added)} have added different tokens to the base's vocabulary")
    if first:
        grow_embeddings(model, max(first) + 1)


def open_adapter(base: Any, one: Input) -> algebra.AdapterDeltas:
    """The changes of one adapter; the base's own weights are shared and stay as they are."""
    return algebra.AdapterDeltas(load_adapter(algebra.share(base), one.folder), base=base)


def tuned_weights(base: Any, tuned: Input) -> Any:
    """The tuned model's tensors, read one by one where its files name them as the base does."""
    source = str(tuned.folder)
    if Path(source).is_dir():
        check_files(source)
        folder = TensorFolder(source)
        if {n for n, _ in base.named_parameters()} <= set(folder):  # stacked experts have other names in files
            return folder
    spec = BaseSpec(source, tuned.task.auto_class)
    return spec.open(dtype=torch.float32, device=next(base.parameters()).device).model


def held_out_loss(one: Input, data: str | None, listener: Listener) -> Callable[[Any], float]:
    """A function from a model to its mean loss on the run's held-out rows, or on those of `data`."""
    recipe = one.recipe(data)
    source = resolve(one.base, listener.note)
    processor = load_processor(str(one.folder) if one.has_tokenizer else source, one.task.processor_class)
    length = one.run.facts["encode"]["max_length"] if one.run else None
    options = encode_options(recipe, one.task, source, length)
    examples, where, format_name = to_judge(recipe, one.task, data)
    samples, _ = encode_all(
        examples, one.task.encoder(processor, options), source=where, format_name=format_name,
        max_length=options.max_length, workers=workers(recipe, one.task),
    )  # fmt: skip

    def loss(model: Any) -> float:
        judge = Judge(one.task, model, processor, one.task.loss, listener, workers(recipe, one.task))
        return judge.held_out(samples, token_budget(recipe, model, one.task), "held-out loss")().metrics["loss"]

    return loss


@contextmanager
def as_artifact_error() -> Iterator[None]:
    """Errors of the adapter utility as the user's: an artifact that does not fit."""
    try:
        yield
    except AdapterError as error:
        raise ArtifactError(str(error), fix=error.fix) from error
