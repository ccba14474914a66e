"""The axes of the project, declared empty. The files of an axis register themselves; plug-ins use the same door."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from .errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .artifact import Artifact, Probe, Subject
    from .records import Batch, Encoded, EncodeOptions, Example, Judgement, LossSum, Prediction, PredictOptions, Sample


class Named(Protocol):
    """Anything that can be listed."""

    @property
    def name(self) -> str:
        """What a recipe or command line says."""

    @property
    def description(self) -> str:
        """One sentence."""


class DataFormat(Named, Protocol):
    """A layout of rows."""

    @property
    def kind(self) -> str:
        """What its examples hold; a task says which kinds it takes (`lora_ft/data/_format.py` has the kinds)."""

    @property
    def required(self) -> tuple[str, ...]:
        """The columns it cannot do without."""

    @property
    def answer(self) -> str | None:
        """The one of them that holds what is to be learnt; rows for prediction may lack it."""

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these rows are in this format."""

    def to_examples(self, row: Mapping[str, Any], answered: bool) -> list[dict[str, Any]]:
        """Canonical fields of the examples of one row, mostly one; raises ValueError with what is wrong with it.

        A format whose rows give several examples says with `group_of(fields, where)` which of them stay together.

        Args:
            row: values by column.
            answered: whether the answer must be there (training) or may be missing (prediction).
        """


class Task(Named, Protocol):
    """A kind of problem: how examples become batches, what the loss is, how answers are judged.

    `lora_ft/tasks/_base.py` has the parts that most tasks share. A task never changes: `configure`, `learn` and
    `recall` give another one that knows more.
    """

    @property
    def auto_class(self) -> str | None:
        """Transformers' auto class that loads the model with the right head; None: a user's function builds it."""

    @property
    def hub_task(self) -> str:
        """What the hub calls this kind of model (`pipeline_tag`); "" for none."""

    @property
    def peft_task_type(self) -> str | None:
        """PEFT's name for the task, None for a plain module."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of examples it takes."""

    @property
    def new_head(self) -> bool:
        """Whether modules that the base's files lack may start at random and train with the adapter."""

    @property
    def overlong(self) -> str:
        """What happens to over-long rows when the recipe says auto: drop, truncate_prompt, truncate or error."""

    @property
    def whole_step(self) -> bool:
        """Whether the loss needs all samples of a step at once; then `represent` and `combine` are its parts."""

    @property
    def perplexity(self) -> bool:
        """Whether the exponential of the mean loss is the perplexity of a token."""

    @property
    def fast_note(self) -> str:
        """What `fast_loss` does to be faster than `loss`; "" where it is the same."""

    @property
    def chats(self) -> bool:
        """Whether one can talk to the model."""

    @property
    def processor_class(self) -> str:
        """Transformers' auto class that loads its tokenizer or processor."""

    @property
    def media(self) -> bool:
        """Whether its samples are images or sounds, which are read ahead by threads."""

    @property
    def coco(self) -> bool:
        """Whether predictions are boxes, which are also written as COCO JSON."""

    def configure(self, options: Mapping[str, Any]) -> Task:
        """With the recipe's options; raises UsageError for an unknown or wrong one, or a package that is missing."""

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> Task:
        """With what it must know of the data, such as label names; raises DataError naming rows that do not fit."""

    def facts(self) -> dict[str, Any]:
        """What `learn` found, for run.json."""

    def recall(self, facts: Mapping[str, Any]) -> Task:
        """With what an earlier `learn` found."""

    def model_arguments(self) -> dict[str, Any]:
        """Of the model's config, such as num_labels and id2label."""

    def check_processor(self, processor: Any) -> list[str]:
        """Notes about this tokenizer or processor that a user should read; raises when it cannot serve."""

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """A function from an example to its samples; raises ValueError for a row it cannot encode."""

    def show(self, sample: Sample, processor: Any) -> str:
        """One sample as text with the supervised part marked."""

    def mix(self, samples: Sequence[Sample], draw: int) -> list[Sample]:
        """The samples of one step, before it is cut into micro-batches, with partners for mixing where a task mixes."""

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Samples -> padded tensors; called by several threads at once.

        Args:
            samples: of one micro-batch.
            processor: tokenizer or processor.
            draw: what randomness depends on beside the sample itself: another number each epoch, 0 when judging.
        """

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The plain path: the model's own loss."""

    def fast_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The same value in less time and memory, or raises AdapterError with the reason why it cannot."""

    def represent(self, model: nn.Module, batch: Batch) -> Tensor:
        """What `combine` needs of each sample (B, ...)."""

    def combine(self, representations: Tensor) -> LossSum:
        """The loss of a whole step."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What artifacts are compared by: the model's answer to a batch that has no labels."""

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """Small inputs for `outputs`, one for each sample, by which artifacts are compared."""

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Mapping[str, Tensor]]) -> Judgement:
        """Metrics from the `LossSum.outputs` of all held-out samples, beside the mean loss; `right` by row."""

    def predict(
        self, model: nn.Module, processor: Any, examples: Iterable[Example], options: PredictOptions
    ) -> Iterator[Prediction]:
        """Outputs for examples, in their order."""

    def judge(self, predictions: Sequence[Prediction]) -> Judgement:
        """Metrics over predictions that have references; for tasks that write."""

    def prompt(self, processor: Any, example: Example, options: EncodeOptions) -> list[int]:
        """Token ids that ask for the next answer; raises UsageError for a task that does not write."""

    def reference_lengths(self, processor: Any, examples: Sequence[Example]) -> list[int | None]:
        """Tokens of each example's answer that could be generated and judged, None where there is none."""

    def generation_defaults(self, model: nn.Module, processor: Any) -> dict[str, Any]:
        """Settings that the model's generation config needs to work as trained, such as where an answer ends."""


class Quantizer(Named, Protocol):
    """A way to load a base model in fewer bits."""

    @property
    def options(self) -> Any:
        """What the recipe says beside the type, checked."""

    def configure(self, options: Mapping[str, Any]) -> Quantizer:
        """With the recipe's options; raises UsageError for an unknown or wrong one."""

    def load_arguments(self, compute_dtype: Any) -> dict[str, Any]:
        """Arguments for Transformers' `from_pretrained`; raises when a package is missing."""

    def prepare(self, model: Any) -> None:
        """What a model loaded with these arguments needs before it is evaluated and trained in turn."""

    def quantises(self, empty: Any) -> frozenset[str]:
        """Names of the layers that are quantised, from the model's modules on the meta device, which are used up."""

    def round_trip(self, weight: Tensor, dtype: Any) -> Tensor:
        """What a quantised layer multiplies with, in float32; `dtype` is that of the base when it was quantised."""


class ArtifactForm(Protocol):
    """How an artifact is written and proved."""

    def write(self, artifact: Artifact, folder: Path) -> None:
        """Write into an empty folder."""

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """Read back from disk and compare with the probes; raises ArtifactError when it differs."""


class ExportFormat(Named, ArtifactForm, Protocol):
    """A form in which a trained adapter leaves the project."""

    @property
    def full_precision(self) -> bool:
        """Whether it needs the base's own weights even if training quantised them."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What numbers can be written in, as `--dtype` says it; () where there is no choice."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the programs that read it, as `lora-ft train --target` says them."""

    def default_dtype(self, stored: str) -> str:
        """One of `dtypes`, where the base's own files are in torch's dtype `stored`."""

    def check(self, subject: Subject) -> None:
        """Raise UsageError with the reason, and the nearest way out, where this adapter cannot take this form."""


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Named entries of one axis, found in the axis's folder and in entry points of `lora_ft.<axis>`."""

    def __init__(self, axis: str, package: str) -> None:
        self.axis, self.package = axis, package
        self._entries: dict[str, T] = {}
        self._discovered = False

    def register(self, entry: T) -> T:
        """Add an entry. The name must be new, lower case, of letters, digits, `_` and `-`."""
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", entry.name):
            raise ValueError(f"{self.axis}: {entry.name!r} is not a valid name")
        if entry.name in self._entries:
            raise ValueError(f"{self.axis}: {entry.name!r} is registered twice")
        self._entries[entry.name] = entry
        return entry

    def discover(self) -> dict[str, T]:
        """All entries by name, after importing the axis's files and then third-party entry points."""
        if not self._discovered:
            folder = importlib.import_module(self.package)
            for module in sorted(m.name for m in pkgutil.iter_modules(folder.__path__)):
                if not module.startswith("_"):
                    importlib.import_module(f"{self.package}.{module}")
            for point in entry_points(group=f"lora_ft.{self.axis}"):
                point.load()
            self._discovered = True
        return dict(sorted(self._entries.items()))

    def get(self, name: str) -> T:
        """The entry called `name`, or a UsageError with the nearest names."""
        entries = self.discover()
        if name not in entries:
            singular = self.axis.rstrip("s").replace("_", " ")
            near = f"unknown {singular} {name!r}; {did_you_mean(name, entries)}"
            raise UsageError(near, fix=f"lora-ft list {self.axis.replace(' ', '_')} shows all")
        return entries[name]


FORMATS: Registry[DataFormat] = Registry("formats", "lora_ft.data.formats")
TASKS: Registry[Task] = Registry("tasks", "lora_ft.tasks")
QUANTIZERS: Registry[Quantizer] = Registry("quantizers", "lora_ft.models.quantizers")
EXPORTS: Registry[ExportFormat] = Registry("exports", "lora_ft.exports.formats")
