"""A run's adapter on its base in full precision: read from files part by part, or in memory where that cannot be."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lora_ft import exports
from lora_ft.artifact import Probe
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import golden
from lora_ft.exports.mergeable import KEPT_APART
from lora_ft.models.fingerprint import fingerprint_of_files
from lora_ft.models.load import load_processor, tokenizer_of
from lora_ft.models.streaming import BaseWeights, NotStreamable, SavedWeights, hollow_base
from lora_ft.recipe import Recipe, load_recipe
from lora_ft.records import Listener
from lora_ft.registry import TASKS, Quantizer, Task
from lora_ft.runs import Run
from lora_ft_adapters import AdapterError, UnmergeableError, load_adapter, merge
from lora_ft_adapters.hollow import lend
from lora_ft_adapters.streaming import MergedWeights
from lora_ft_adapters.weights import StateWeights, TensorFolder, Weights

from .loading import FILES, load, other_base
from .prepare import base_spec, source_of
from .probing import check_record, probe_inputs
from .ready import fit_processor, quantizer_of
from .rows import Given


@dataclass(frozen=True)
class Opened:
    """What is known of a finished run without its weights."""

    run: Run
    recipe: Recipe
    task: Task
    processor: Any
    listener: Listener
    given: Given

    @property
    def source(self) -> str:
        """Where the base's files are."""
        return source_of(self.recipe, self.task, self.listener)


@dataclass
class OnBase:
    """The adapter on one form of its base.

    Attributes:
        model: PeftModel in evaluation mode that runs, in float32.
        probes: what the adapter answers to the run's probe inputs, and what the base does.
        merged: the merged tensors, under the names of a saved model; to be called once.
        unmerged: the base's, in the same way.
        made: the merge, once it was made; holds what of each update is left.
        config: of the merged model, where merging changed it (repeated layers).
    """

    model: Any
    probes: list[Probe]
    merged: Callable[[torch.dtype | None], Weights]
    unmerged: Callable[[], Weights]
    made: list[MergedWeights] = field(default_factory=list)
    config: Any = None


def open_run(run: Run | str | Path, listener: Listener, given: Given) -> Opened:
    """A finished run, or of one with stages its last."""
    run = Run.of(run).final
    facts = run.facts
    if not (run.adapter / "adapter_config.json").is_file():
        raise ArtifactError(
            f"this run has no adapter yet; its status is {facts.get('status')!r}",
            where=str(run.path),
            fix=f"lora-ft train --resume --out {run.path}",
        )
    recipe = load_recipe([run.recipe]).recipe
    task = TASKS.get(recipe.task.type).configure(recipe.task.options()).recall(facts.get("task_facts", {}))
    check_record(run)
    processor = load_processor(str(run.adapter), task.processor_class) if task.auto_class else None
    golden.check_template(run.adapter, processor)
    return Opened(run, recipe, task, processor, listener, given)


def on_base(opened: Opened, stack: ExitStack, rounding: Quantizer | None = None) -> OnBase:
    """The adapter on the base's own weights, or on those that its quantised form multiplies with.

    Args:
        opened: the run.
        stack: closes what is open.
        rounding: the quantiser whose rounding the base goes through.

    Raises:
        ArtifactError: the base is not the one of training.
    """
    try:
        return _streamed(opened, rounding)
    except NotStreamable as error:
        why = str(error)
    except UnmergeableError:
        raise
    except AdapterError as error:
        why = str(error)
    if rounding is not None:
        raise ArtifactError(f"the dequantised base cannot be merged into: {why}", fix="--into original")
    opened.listener.note(f"the whole base is read into memory: {why}")
    return _in_memory(opened, stack)


def rounded(opened: Opened, base: BaseWeights, quantizer: Quantizer) -> Weights:
    """The base's tensors as its quantised form multiplies with them."""
    skeleton = base_spec(opened.recipe, opened.task, opened.source, opened.given).skeleton()
    return _Rounded(base, quantizer, quantizer.quantises(skeleton), getattr(torch, opened.run.facts["dtype"]))


class _Rounded(Weights):
    """A base's tensors, those of quantised layers as their 4 or 8 bits say."""

    def __init__(
        self, inner: BaseWeights, quantizer: Quantizer, layers: frozenset[str], trained: torch.dtype
    ) -> None:  # fmt: skip
        self._inner, self._quantizer, self._layers, self._trained = inner, quantizer, layers, trained

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._inner[name]
        return self._quantizer.round_trip(tensor, self._trained) if self._hit(name) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)

    def _hit(self, name: str) -> bool:
        module, _, own = name.rpartition(".")
        return own == "weight" and module in self._layers

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return torch.float32 if self._hit(name) else self._inner.dtype(name)


def hollow(opened: Opened, source: str | None = None) -> tuple[Any, BaseWeights]:
    """The run's base, or another folder of the same model, without numbers, with its tensors."""
    spec = base_spec(opened.recipe, opened.task, source or opened.source, opened.given)
    tokenizer = tokenizer_of(opened.processor)
    tokens = len(tokenizer) if tokenizer is not None and opened.recipe.data.add_tokens else 0
    model, weights = hollow_base(spec, tokens, _replaced(opened))
    fit_processor(model, opened.task, opened.processor, grow=False)
    return model, weights


def _replaced(opened: Opened) -> tuple[str, ...]:
    """Modules that the adapter holds as a whole."""
    from lora_ft_adapters.apply import read_config

    return tuple(getattr(read_config(opened.run.adapter), "modules_to_save", None) or ())


def _streamed(opened: Opened, rounding: Quantizer | None) -> OnBase:
    if opened.given.model is not None:
        raise NotStreamable("it is in memory already")
    facts = opened.run.facts
    if facts["quant"] != opened.recipe.quant.type:
        raise NotStreamable("its files are quantised")
    model, base = hollow(opened)
    trained = getattr(torch, facts["dtype"])
    wanted = facts["fingerprint"] if facts["quant"] == "none" else facts.get(FILES)
    if wanted and wanted != fingerprint_of_files(model, base.ungrown(), facts.get("fresh", ()), trained):
        raise other_base(opened.recipe.model)
    weights: Weights = base
    if rounding is not None:
        weights = rounded(opened, base, rounding)
    adapted = load_adapter(model, opened.run.adapter)
    MergedWeights(adapted, weights)  # refuses what it cannot merge before anything is written
    lend(adapted, weights, torch.float32)
    made: list[MergedWeights] = []

    def merged(dtype: torch.dtype | None) -> Weights:
        made.append(MergedWeights(adapted, weights, rounded=dtype))
        return SavedWeights(made[-1], base)

    try:
        probes = _probes(opened, adapted)
    except ArtifactError as error:
        raise NotStreamable(f"its parts do not run one by one ({error.what})") from error
    if facts["quant"] == "none":  # else the base is another one than that of training
        _hold(opened, probes)
    return OnBase(adapted, probes, merged, lambda: SavedWeights(weights, base), made)


def _probes(opened: Opened, model: Any) -> list[Probe]:
    """Answers to the run's probe inputs; a head that only the adapter has answers nothing on the base."""
    inputs, _ = probe_inputs(opened, model, opened.listener)
    found = exports.probe(model, inputs, opened.task.outputs)
    return [p if bool(p.base.isfinite().all()) else replace(p, base=torch.zeros_like(p.base)) for p in found]


def _hold(opened: Opened, probes: list[Probe]) -> None:
    """Against the answers at the end of training, where these are the same inputs."""
    facts = golden.read_facts(opened.run.adapter)
    if facts.get("inputs") == [golden.inputs_hash(p.inputs) for p in probes]:
        run = opened.run.facts
        same = run["dtype"] == "float32" and facts.get("device") == "cpu"
        golden.check_golden(opened.run.adapter, probes, golden.Form.SAME if same else golden.Form.ROUNDED)


def _in_memory(opened: Opened, stack: ExitStack) -> OnBase:
    reload = partial(load, opened.run, dtype="float32", quantised=False, listener=opened.listener, given=opened.given)

    def tensors(model: Any) -> Weights:
        if opened.task.auto_class is None:
            return StateWeights(model.state_dict())
        folder = stack.enter_context(TemporaryDirectory())
        model.save_pretrained(folder)  # under the names, and in the form, that files of this model have
        return TensorFolder(folder)

    def merged(dtype: torch.dtype | None) -> Weights:
        model: Any = merge(reload().model)
        found.config = getattr(model, "config", None)
        return tensors(model)

    model = reload().model
    found = OnBase(model, _probes(opened, model), merged, lambda: tensors(reload().model.unload()))
    return found


def rounding_of(opened: Opened) -> Quantizer | None:
    """The quantiser of the run's base; None where it was not quantised by us."""
    return None if opened.recipe.quant.type == "none" else quantizer_of(opened.recipe)


def unmergeable(error: UnmergeableError) -> UsageError:
    """As the user's error."""
    return UsageError(str(error), fix=KEPT_APART)
