"""Data and processor ready for training, checked on every row before any weight is read."""

import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lora_ft.data import encode_all, load_examples, split
from lora_ft.errors import UsageError
from lora_ft.models.load import check_lengths, load_processor
from lora_ft.models.resolve import resolve
from lora_ft.recipe import Recipe
from lora_ft.records import DataReport, EncodeOptions, Example, Listener, PredictOptions, Sample
from lora_ft.registry import TASKS, Task
from lora_ft.training.batching import steps_per_epoch
from lora_ft_adapters import AdapterError

SHORT_ANSWER = 128  # tokens; longer references are prose, where exact match says nothing
AUTO_ROWS = 200
DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data.

    Attributes:
        task: the task.
        source: folder or hub id of the base.
        processor: tokenizer or processor.
        options: how rows became tokens.
        train: training samples.
        held_out: samples held out.
        held_out_examples: the rows of these.
        report: of the training rows.
        held_out_report: of the held-out rows, or None.
        new_tokens: those of the recipe that the tokenizer did not know.
    """

    task: Task
    source: str
    processor: Any
    options: EncodeOptions
    train: list[Sample]
    held_out: list[Sample]
    held_out_examples: list[Example]
    report: DataReport
    held_out_report: DataReport | None
    new_tokens: tuple[str, ...] = ()


def prepare(recipe: Recipe, listener: Listener) -> Prepared:
    """Read, split and encode the data with the base's processor."""
    task = TASKS.get(recipe.task)
    training, held, format_name = _examples(recipe)
    source = resolve(recipe.model, listener.note)
    processor = load_processor(source)
    data = recipe.data
    new: tuple[str, ...] = ()
    if data.add_tokens:
        known = processor.get_vocab()
        new = tuple(dict.fromkeys(t for t in data.add_tokens if t not in known))
        processor.add_tokens(list(new))  # a known token added again would be cut out of the middle of words
        listener.note(f"{len(new)} new tokens" + (f" ({', '.join(new[:6])})" if new else ": all are known already"))
    for note in task.check_processor(processor):
        listener.note(note)
    options = EncodeOptions(check_lengths(source, data.max_length), data.overlong, data.system_prompt, data.template)
    encoder = task.encoder(processor, options)
    samples, report = encode_all(
        training, encoder, source=data.train, format_name=format_name, max_length=options.max_length
    )
    report = replace(report, sample_shown=task.show(samples[0], processor))
    held_samples: list[Sample] = []
    held_report = None
    if held:
        held_samples, held_report = encode_all(
            held, encoder, source=data.eval or "", format_name=format_name, max_length=options.max_length
        )
    tell(report, "training", listener)
    if held_report:
        tell(held_report, "held-out", listener)
        _warn_of_leaks(samples, held_samples, listener)
    return Prepared(task, source, processor, options, samples, held_samples, held, report, held_report, new)


def planned_steps(recipe: Recipe, prepared: Prepared) -> tuple[int, int]:
    """(optimizer steps in all, in one epoch)."""
    per_epoch = steps_per_epoch(len(prepared.train), recipe.train.batch_size)
    return recipe.train.steps or max(1, math.ceil((recipe.train.epochs or DEFAULT_EPOCHS) * per_epoch)), per_epoch


def _warn_of_leaks(training: Sequence[Sample], held: Sequence[Sample], listener: Listener) -> None:
    """Held-out rows that are also training rows make every figure too good."""
    seen = {data_hash([s]) for s in training}
    both = [s.where for s in held if data_hash([s]) in seen]
    if both:
        listener.warn(f"{len(both)} of {len(held)} held-out samples are also in the training data ({both[0]})")


def _examples(recipe: Recipe) -> tuple[list[Example], list[Example], str]:
    data = recipe.data
    examples, format_name = load_examples(data.train, data.format, data.columns)
    if data.eval is None:
        return examples, [], format_name
    if data.eval.endswith("%"):
        try:
            share = float(data.eval[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise UsageError(f"data.eval: {data.eval!r} is not a share between 0% and 100%", fix="--set data.eval=10%")
        return *split(examples, share, recipe.seed), format_name
    held, _ = load_examples(data.eval, data.format, data.columns)
    return examples, held, format_name


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
    recipe: Recipe, task: Task, processor: Any, examples: Sequence[Example], encode: EncodeOptions
) -> tuple[list[Example], PredictOptions] | None:
    """The held-out rows to answer in full and how, or None when that would say nothing."""
    settings = recipe.eval
    if settings.generate == 0 or not examples:
        return None
    known = zip(examples, task.reference_lengths(processor, examples), strict=True)
    judged = [(e, n) for e, n in known if n is not None]
    lengths = sorted(n for _, n in judged)
    if not lengths:
        return None
    typical = lengths[int(0.9 * (len(lengths) - 1))]
    if settings.generate == "auto" and typical > SHORT_ANSWER:
        return None
    rows = AUTO_ROWS if settings.generate == "auto" else settings.generate
    longest = settings.max_new_tokens or max(16, int(1.5 * lengths[-1]))
    return [e for e, _ in judged[:rows]], PredictOptions(longest, settings.batch_size, encode)


def data_hash(samples: Sequence[Sample]) -> str:
    """SHA-256 over all tokens and labels: the data, the template and the tokenizer in one."""
    digest = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample.inputs):
            digest.update(repr((name, list(sample.inputs[name]))).encode())
    return digest.hexdigest()


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
