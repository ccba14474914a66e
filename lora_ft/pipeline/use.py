"""What can be done with a finished run: load, evaluate, predict, merge, export."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_ft import exports
from lora_ft.data import encode_all, load_examples, split
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.evaluate import compare
from lora_ft.evaluate.compare import Comparison
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import grow_embeddings, load_processor, pick_device, stored_dtype
from lora_ft.models.resolve import resolve
from lora_ft.recipe import Recipe, load_recipe
from lora_ft.records import Artifact, EncodeOptions, Listener, Prediction, PredictOptions, Silent
from lora_ft.registry import EXPORTS, TASKS, Task
from lora_ft.report import model_card, public_name
from lora_ft.runs import Run
from lora_ft_adapters import AdapterError, build_config, load_adapter
from lora_ft_adapters.behaviour import behaviour_of

from .judge import Judge, answer_rows, token_budget, write_rows
from .prepare import answer_options
from .ready import load_base

DEFAULT_NEW_TOKENS = 256
MERGE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A run's adapter on its base.

    Attributes:
        model: PeftModel in evaluation mode; `model.disable_adapter()` gives the base.
        processor: tokenizer or processor.
        recipe: of the run.
        task: of the recipe.
        encode: how rows became tokens in training.
        run: the run.
        dtype: of the base here.
    """

    model: Any
    processor: Any
    recipe: Recipe
    task: Task
    encode: EncodeOptions
    run: Run
    dtype: str


def load(
    run: Run | str | Path, *, dtype: str | None = None, quantised: bool = True, listener: Listener | None = None
) -> Loaded:
    """The adapter of a finished run on its base, the base checked against the one it was trained on.

    Args:
        run: the run or its folder.
        dtype: name of a torch dtype; default that of training.
        quantised: whether a base that was quantised in training is so here too.
        listener: hears what takes long.

    Raises:
        ArtifactError: the run is not finished, or its base is not the one it was trained on.
    """
    listener = listener or Silent()
    run = run if isinstance(run, Run) else Run(Path(run))
    facts = run.facts
    if not (run.adapter / "adapter_config.json").is_file():
        raise ArtifactError(
            f"this run has no adapter yet; its status is {facts.get('status')!r}",
            where=str(run.path),
            fix=f"lora-ft train --resume --out {run.path}",
        )
    recipe = load_recipe([run.path / "recipe.resolved.yaml"]).recipe
    task = TASKS.get(recipe.task)
    dtype = dtype or facts["dtype"]
    base = _load_base(recipe, task, dtype, listener, quantised=quantised)
    same_form = quantised or recipe.quant == "none"
    if same_form and fingerprint(base) != facts["fingerprint"]:
        raise ArtifactError(
            "the base model is not the one this adapter was trained on: names, shapes or values differ",
            where=recipe.model,
            fix="use the same files; if the model on the hub has changed, pin the old revision in a local folder",
        )
    data = recipe.data
    options = EncodeOptions(facts["encode"]["max_length"], data.overlong, data.system_prompt, data.template)
    processor = load_processor(str(run.adapter))
    _grow(base, recipe, processor)
    base.generation_config.update(**task.generation_defaults(base, processor))
    try:
        model = load_adapter(base, run.adapter)
    except AdapterError as error:
        raise ArtifactError(str(error), where=str(run.adapter)) from error
    return Loaded(model, processor, recipe, task, options, run, dtype)


def _grow(base: Any, recipe: Recipe, processor: Any) -> Any:
    """Room for the tokens that training added."""
    if recipe.data.add_tokens:
        grow_embeddings(base, len(processor))
    return base


def _load_base(recipe: Recipe, task: Task, dtype: str, listener: Listener, *, quantised: bool) -> Any:
    source = resolve(recipe.model, listener.note)
    return load_base(recipe, task, source, getattr(torch, dtype), pick_device(), quantised=quantised)


def evaluate_run(
    run: Run | str | Path, *, data: str | None = None, listener: Listener | None = None
) -> tuple[dict[str, Any], Comparison | None, list[tuple[Prediction, Prediction]]]:
    """Base against adapter on the same rows.

    Args:
        run: the run or its folder.
        data: rows to judge on; default the run's held-out rows.
        listener: hears of progress.

    Returns:
        {"before": metrics, "after": metrics}; the paired comparison, or None when no answers can be judged; and the
        two predictions of each answered row. Rows are also written to RUN/eval-rows.jsonl.
    """
    listener = listener or Silent()
    loaded = load(run, listener=listener)
    examples, source, format_name = _rows_to_judge(loaded, data)
    samples, _ = encode_all(
        examples, loaded.task.encoder(loaded.processor, loaded.encode), source=source, format_name=format_name,
        max_length=loaded.encode.max_length,
    )  # fmt: skip
    judge = Judge(loaded.task, loaded.model, loaded.processor, loaded.task.loss, listener)
    chosen = answer_options(loaded.recipe, loaded.task, loaded.processor, examples, loaded.encode)
    metrics: dict[str, dict[str, float]] = {}
    answers: dict[str, list[Prediction]] = {}
    right: dict[str, list[bool]] = {}
    for side, what in (("before", "base"), ("after", "adapter")):
        with judge.side(side == "before"):
            budget = token_budget(loaded.recipe, loaded.model)
            metrics[side] = judge.held_out(samples, budget, f"judging the {what}: loss")()
            if chosen:
                answers[side], judged = judge.answers(*chosen, f"judging the {what}: answers")
                metrics[side] |= judged.metrics
                right[side] = judged.right
    if not chosen or len(right["before"]) != len(answers["before"]):
        return metrics, None, []
    pairs = list(zip(answers["before"], answers["after"], strict=True))
    rows = [
        {**a, "base_output": b["output"], "base_right": b["right"]}
        for b, a in zip(
            answer_rows(answers["before"], right["before"]), answer_rows(answers["after"], right["after"]), strict=True
        )
    ]
    write_rows(loaded.run.path / "eval-rows.jsonl", rows)
    return metrics, compare(right["before"], right["after"]), pairs


def _rows_to_judge(loaded: Loaded, data: str | None) -> tuple[list[Any], str, str]:
    section = loaded.recipe.data
    source = data or section.eval
    if source is None:
        raise UsageError("this run held out no rows to judge on", fix="lora-ft eval RUN --data FILE")
    if data is None and source.endswith("%"):
        examples, name = load_examples(section.train, section.format, section.columns)
        _, held = split(examples, float(source[:-1]) / 100, loaded.recipe.seed)
        return held, section.train, name
    examples, name = load_examples(source, section.format if data is None else "auto", section.columns)
    return examples, source, name


def predict(
    run: Run | str | Path, source: str, output: str | Path, *, max_new_tokens: int = DEFAULT_NEW_TOKENS,
    batch_size: int = 16, listener: Listener | None = None,
) -> int:  # fmt: skip
    """Answer every row of `source` and write JSON lines {where, input, output, reference}; returns the number of rows.

    Rows need no answers, and may use the column names of the run's own data.
    """
    listener, output = listener or Silent(), Path(output)
    if output.exists():
        raise UsageError("the output file exists", where=str(output), fix="--output ANOTHER.jsonl")
    if not output.parent.is_dir():
        raise UsageError("the folder of the output file does not exist", where=str(output))
    loaded = load(run, listener=listener)
    examples, _ = load_examples(source, "auto", loaded.recipe.data.columns, answered=False)
    judge = Judge(loaded.task, loaded.model, loaded.processor, loaded.task.loss, listener)
    options = PredictOptions(max_new_tokens, batch_size, loaded.encode)
    predictions, _ = judge.answers(examples, options, "answers")
    write_rows(output, answer_rows(predictions))
    return len(predictions)


def _check_base_fits(run: Run, full_precision: bool) -> None:
    """Refuse to put an adapter that corrects its quantised base on the unquantised one."""
    method = load_recipe([run.path / "recipe.resolved.yaml"], [], []).recipe.method
    behaviour = behaviour_of(build_config(method.type, method.options()))
    if full_precision and behaviour.corrects_quantisation:
        raise UsageError(
            f"a {method.type} adapter holds the error of its quantised base, which the full base does not have",
            fix="lora-ft export --format peft, and use it on the quantised base",
        )


def _probe_inputs(run: Run) -> list[dict[str, list[int]]]:
    try:
        inputs: list[dict[str, list[int]]] = json.loads((run.adapter / "probes.json").read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError("the run's probe inputs are missing or unreadable", where=str(run.adapter)) from error
    return inputs


def merge(
    run: Run | str | Path, target: str | Path, *, dtype: str | None = None, listener: Listener | None = None
) -> dict[str, float]:
    """Merge a run's adapter into its base: a plain Transformers model, verified after it was read back."""
    return export(run, target, format_name="merged", dtype=dtype, listener=listener)


def export(
    run: Run | str | Path,
    target: str | Path,
    *,
    format_name: str,
    dtype: str | None = None,
    listener: Listener | None = None,
) -> dict[str, float]:
    """Write a run's adapter in an export format; nothing is published that differs from adapter on base.

    Args:
        run: the run or its folder.
        target: a folder that does not exist yet.
        format_name: see `lora-ft list exports`.
        dtype: of merged weights; default that of the base's own files.
        listener: hears what takes long.

    Returns:
        What verification measured.
    """
    listener = listener or Silent()
    chosen, target = EXPORTS.get(format_name), Path(target)
    if dtype is not None and (dtype not in MERGE_DTYPES or not chosen.full_precision):
        raise UsageError(f"dtype {dtype!r} does not go with {format_name}", fix=f"merge with {', '.join(MERGE_DTYPES)}")
    exports.check_target(target)
    run = run if isinstance(run, Run) else Run(Path(run))
    quantised = run.facts["quant"] != "none" and not chosen.full_precision
    _check_base_fits(run, chosen.full_precision)
    loaded = load(run, dtype=None if quantised else "float32", quantised=quantised, listener=listener)
    probes = exports.probe(loaded.model, _probe_inputs(run))
    artifact = Artifact(
        model=loaded.model,
        processor=loaded.processor,
        base=public_name(loaded.recipe.model),
        auto_class=loaded.task.auto_class,
        stored_dtype=dtype or stored_dtype(resolve(loaded.recipe.model, listener.note)),
        generation=loaded.task.generation_defaults(loaded.model, loaded.processor),
        load_base=lambda: _grow(
            _load_base(loaded.recipe, loaded.task, loaded.dtype, listener, quantised=quantised),
            loaded.recipe,
            loaded.processor,
        ),
    )

    def finish(folder: Path, figures: Mapping[str, float]) -> None:
        card = model_card(loaded.recipe, run.facts, merged=chosen.full_precision, figures=figures)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return exports.publish(artifact, target, chosen, probes, finish)
