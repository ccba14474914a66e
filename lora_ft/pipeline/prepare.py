"""Data and processor ready for training, checked on every row before any weight is read."""

import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_ft.ahead import auto_workers
from lora_ft.data import encode_all
from lora_ft.errors import UsageError
from lora_ft.media import Media, cache
from lora_ft.models import python_module
from lora_ft.models.lengths import check_lengths
from lora_ft.models.load import base_labels, load_processor
from lora_ft.models.opening import BaseSpec
from lora_ft.models.resolve import resolve
from lora_ft.recipe import Recipe
from lora_ft.records import DataReport, EncodeOptions, Example, Listener, PredictOptions, Sample
from lora_ft.registry import TASKS, Task
from lora_ft.training.batching import Stratum, balanced, epoch_size, mixed, steps_per_epoch
from lora_ft_adapters import AdapterError

from . import rows
from .rows import Given, Rows

SHORT_ANSWER = 128  # tokens; longer references are prose, where exact match says nothing
AUTO_ROWS = 200
DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data.

    Attributes:
        task: the task, knowing its data.
        base: which model.
        processor: tokenizer or processor; None where the task needs none.
        options: how rows became tokens.
        train: training samples.
        held_out: samples held out.
        held_out_examples: the rows of these.
        report: of the training rows.
        held_out_report: of the held-out rows, or None.
        new_tokens: those of the recipe that the tokenizer did not know.
        weights: of the training sets, where there are several.
        cleaning: what was found in the rows, for the run's data report.
        model: the caller's own module, or None.
    """

    task: Task
    base: BaseSpec
    processor: Any
    options: EncodeOptions
    train: list[Sample]
    held_out: list[Sample]
    held_out_examples: list[Example]
    report: DataReport
    held_out_report: DataReport | None
    new_tokens: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    cleaning: Mapping[str, Any] = field(default_factory=dict)
    model: Any = None


def prepare(recipe: Recipe, listener: Listener, given: Given | None = None) -> Prepared:
    """Read, split and encode the data with the base's processor."""
    given = given or Given()
    task = TASKS.get(recipe.task.type).configure(recipe.task.options())
    if given.model is None and python_module.is_spec(recipe.model):
        python_module.check_trusted(recipe.model, trust_code=given.trust_code)
    if task.media:
        cache.use(int(recipe.data.cache_gb * 2**30))
    found = rows.read(recipe, task, given)
    source = source_of(recipe, task, listener)
    task = _learnt(recipe, task, found, source)
    processor, new = _processor(recipe, task, source, listener)
    options = encode_options(recipe, task, source, processor=processor)
    if options.max_length < recipe.data.max_length:
        listener.note(f"a sample holds at most {options.max_length} tokens, all that this base can read")
    encoder = task.encoder(processor, options)
    samples, report = encode_all(
        found.training, encoder, source=found.source, format_name=found.format, max_length=options.max_length,
        workers=workers(recipe, task),
    )  # fmt: skip
    report = replace(report, sample_shown=task.show(samples[0], processor))
    held_samples: list[Sample] = []
    held_report = None
    if found.held_out:
        held_samples, held_report = encode_all(
            found.held_out, encoder, source=recipe.data.eval or "", format_name=found.format,
            max_length=options.max_length, workers=workers(recipe, task),
        )  # fmt: skip
    tell(report, "training", listener)
    if held_report:
        tell(held_report, "held-out", listener)
    cleaning = found.report.facts() if found.report else {}
    for level, line in found.report.lines() if found.report else ():
        (listener.warn if level == "warn" else listener.note)(line)
    return Prepared(
        task, base_spec(recipe, task, source, given), processor, options, samples, held_samples, found.held_out, report,
        held_report, new, found.weights, cleaning, given.model,
    )  # fmt: skip


def source_of(recipe: Recipe, task: Task, listener: Listener) -> str:
    """What the recipe's model stands for: a folder, a hub id, or a function."""
    if task.auto_class is None or python_module.is_spec(recipe.model):
        if task.auto_class is not None:
            raise UsageError(f"the task {task.name} wants a Transformers model, not a function", fix="task: module")
        return recipe.model
    return resolve(recipe.model, listener.note)


def base_spec(recipe: Recipe, task: Task, source: str, given: Given | None = None) -> BaseSpec:
    """How the recipe's base is opened."""
    return BaseSpec(
        source, task.auto_class, task.model_arguments(), new_head=task.new_head, dropout=recipe.train.dropout,
        seed=recipe.seed, trust_code=bool(given and given.trust_code),
    )  # fmt: skip


def encode_options(
    recipe: Recipe, task: Task, source: str, max_length: int | None = None, processor: Any = None
) -> EncodeOptions:
    """How rows become tokens.

    Args:
        recipe: says so.
        task: decides what `overlong: auto` means.
        source: of the base, whose own limit counts.
        max_length: what a finished run used, if one did.
        processor: of the base, which may say how much it reads.
    """
    data = recipe.data
    if max_length is None and task.auto_class:
        max_length = check_lengths(base_spec(recipe, task, source).skeleton(), data.max_length, processor)
    elif max_length is None:
        max_length = data.max_length
    overlong = task.overlong if data.overlong == "auto" else data.overlong
    return EncodeOptions(
        max_length, overlong, data.system_prompt, data.template, data.max_pixels, data.max_seconds, data.resample
    )


def workers(recipe: Recipe, task: Task) -> int:
    """Threads that read and collate ahead."""
    wanted = recipe.data.workers
    if wanted == "auto":
        return auto_workers() if task.media else 0
    return wanted


def _learnt(recipe: Recipe, task: Task, found: Rows, source: str) -> Task:
    """The task with what it must know of the data; labels that the base knows too stand in the base's order."""
    learnt = task.learn(found.training, found.held_out)
    labels = learnt.facts().get("labels")
    if labels and task.auto_class:
        known = base_labels(source)
        if set(known) == set(labels) and tuple(known) != tuple(labels) and "labels" not in recipe.task.options():
            return task.configure({**recipe.task.options(), "labels": list(known)}).learn(
                found.training, found.held_out
            )
    return learnt


def _processor(recipe: Recipe, task: Task, source: str, listener: Listener) -> tuple[Any, tuple[str, ...]]:
    """The processor, and the tokens of the recipe that are new to it."""
    wanted = recipe.data.add_tokens
    if wanted and (task.auto_class is None or task.processor_class != "AutoTokenizer"):
        raise UsageError("data.add_tokens: there is no tokenizer to add tokens to", fix="leave it out")
    if task.auto_class is None:
        return None, ()
    processor = load_processor(source, task.processor_class)
    new: tuple[str, ...] = ()
    if wanted:
        known = processor.get_vocab()
        new = tuple(dict.fromkeys(t for t in wanted if t not in known))
        processor.add_tokens(list(new))  # a known token added again would be cut out of the middle of words
        listener.note(f"{len(new)} new tokens" + (f" ({', '.join(new[:6])})" if new else ": all are known already"))
    for note in task.check_processor(processor):
        listener.note(note)
    return processor, new


def planned_steps(recipe: Recipe, prepared: Prepared) -> tuple[int, int]:
    """(optimizer steps in all, in one epoch)."""
    size = epoch_size(len(prepared.train), strata(recipe, prepared))
    per_epoch = steps_per_epoch(size, recipe.train.batch_size)
    return recipe.train.steps or max(1, math.ceil((recipe.train.epochs or DEFAULT_EPOCHS) * per_epoch)), per_epoch


def strata(recipe: Recipe, prepared: Prepared) -> Sequence[Stratum]:
    """How an epoch is drawn when it is not every sample once."""
    data, samples = recipe.data, prepared.train
    if data.sampling == "balanced" and prepared.weights:
        raise UsageError("data.sampling: balanced does not go with several training sets", fix="choose one of them")
    if data.sampling == "balanced":
        if not all(s.label for s in samples):
            raise UsageError(f"data.sampling: balanced needs classes, and {prepared.task.name} rows have none here")
        return balanced([s.label for s in samples], len(samples))
    return mixed([s.source for s in samples], prepared.weights, len(samples)) if prepared.weights else ()


def tell(report: DataReport, what: str, listener: Listener) -> None:
    """Say what was read and what became of it."""
    listener.note(
        f"{what} data: {report.rows} rows, format {report.format}, {report.samples} samples, {report.tokens:,} tokens, "
        f"{report.labelled_tokens:,} of them labelled ({report.source})"
    )
    for outcome, count in report.outcomes.items():
        say = listener.warn if outcome.startswith(("dropped", "no trainable")) else listener.note
        say(f"{count} of {report.rows} {what} rows: {outcome}")


def answer_options(
    recipe: Recipe, task: Task, processor: Any, examples: Sequence[Example], encode: EncodeOptions,
    listener: Listener | None = None,
) -> tuple[list[Example], PredictOptions] | None:  # fmt: skip
    """The held-out rows to answer in full and how, or None when that would say nothing.

    Args:
        recipe, task, processor, encode: how the run encodes rows.
        examples: held-out rows.
        listener: hears why long answers are not written; None where it was told before.
    """
    settings = recipe.eval
    if settings.generate == 0 or not examples:
        return None
    known = zip(examples, task.reference_lengths(processor, examples), strict=True)
    judged = [(e, n) for e, n in known if n is not None]
    lengths = sorted(n for _, n in judged)
    if not lengths:
        return None
    typical = lengths[int(0.9 * (len(lengths) - 1))]
    asked_for = recipe.task.options().get("metrics", "auto") != "auto"
    if settings.generate == "auto" and typical > SHORT_ANSWER and not asked_for:
        if listener:
            listener.note(
                f"held-out answers are not written and judged: most have up to {typical} tokens, and eval.generate: "
                f"auto writes up to {SHORT_ANSWER}"
            )
        return None
    rows = AUTO_ROWS if settings.generate == "auto" else settings.generate
    longest = settings.max_new_tokens or max(16, int(1.5 * lengths[-1]))
    return [e for e, _ in judged[:rows]], PredictOptions(longest, settings.batch_size, encode)


def data_hash(samples: Sequence[Sample]) -> str:
    """SHA-256 over all tokens and labels: the data, the template and the tokenizer in one."""
    digest = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample.inputs):
            digest.update(name.encode())
            _hash_into(digest, sample.inputs[name])
    return digest.hexdigest()


def _hash_into(digest: Any, value: Any) -> None:
    """Every number: the text of a large array would leave out its middle."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(str(name).encode())
            _hash_into(digest, value[name])
    elif isinstance(value, Media):
        if value.path:
            with Path(value.path).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            _hash_into(digest, value.content)
    elif hasattr(value, "tobytes"):
        digest.update(repr((value.dtype, value.shape)).encode() + value.tobytes())
    else:
        digest.update(repr(value if not isinstance(value, tuple) else list(value)).encode())


def versions() -> Mapping[str, str]:
    """Of everything that can change a result."""
    found = {"python": platform.python_version()}
    for package in ("lora-ft", "torch", "transformers", "peft", "accelerate"):
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            found[package.replace("-", "_")] = "unknown"
    return found


def usage(error: AdapterError) -> UsageError:
    """An error of the adapter utility as the user's error."""
    return UsageError(str(error), where="method", fix=error.fix)
