"""What can be done with a finished run: evaluate, predict, merge, export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ft import exports
from lora_ft.data import encode_all, is_split, load_examples
from lora_ft.errors import UsageError
from lora_ft.evaluate import compare
from lora_ft.evaluate.compare import Comparison
from lora_ft.recipe import load_recipe
from lora_ft.records import (
    Artifact,
    Example,
    Judgement,
    Listener,
    Prediction,
    PredictOptions,
    Sample,
    Silent,
)
from lora_ft.registry import EXPORTS
from lora_ft.report import model_card, public_name
from lora_ft.runs import Run
from lora_ft_adapters import build_config
from lora_ft_adapters.behaviour import behaviour_of

from .answer_files import answer_rows, write_predictions, write_rows
from .judge import Judge, token_budget
from .loading import Loaded, base_dtype, load, plain_base
from .prepare import answer_options, tell, workers
from .rows import Given, read, to_judge

DEFAULT_NEW_TOKENS = 256
MERGE_DTYPES = ("float32", "bfloat16", "float16")


def evaluate_run(
    run: Run | str | Path, *, data: str | None = None, listener: Listener | None = None, given: Given | None = None
) -> tuple[dict[str, Any], Comparison | None, list[tuple[Prediction, Prediction]]]:
    """Base against adapter on the same rows.

    Args:
        run: the run or its folder.
        data: rows to judge on; default the run's held-out rows.
        listener: hears of progress.
        given: see `load`; rows in memory are judged on as the run's own were.

    Returns:
        {"before": metrics, "after": metrics}; the paired comparison, or None when no row is right or wrong; and the
        two predictions of each row. Rows are also written to RUN/eval-rows.jsonl.
    """
    listener = listener or Silent()
    loaded = load(run, listener=listener, given=given)
    examples, source, format_name = _rows(loaded, data)
    samples, report = encode_all(
        examples, loaded.task.encoder(loaded.processor, loaded.encode), source=source, format_name=format_name,
        max_length=loaded.encode.max_length, workers=workers(loaded.recipe, loaded.task),
    )  # fmt: skip
    tell(report, "held-out", listener)
    judge = Judge(
        loaded.task, loaded.model, loaded.processor, loaded.task.loss, listener, workers(loaded.recipe, loaded.task)
    )
    sides = {side: _side(loaded, judge, samples, examples, side == "before") for side in ("before", "after")}
    metrics = {side: found.metrics for side, (found, _) in sides.items()}
    (before, told), (after, told_after) = sides["before"], sides["after"]
    if not before.right or not len(before.right) == len(after.right) == len(told) == len(told_after):
        return metrics, None, []
    rows = [
        {**a, "base_output": b["output"], "base_right": b["right"]}
        for b, a in zip(answer_rows(told, before.right), answer_rows(told_after, after.right), strict=True)
    ]
    write_rows(loaded.run.path / "eval-rows.jsonl", rows)
    return metrics, compare(before.right, after.right), list(zip(told, told_after, strict=True))


def _rows(loaded: Loaded, data: str | None) -> tuple[list[Example], str, str]:
    """Rows to judge on, where they are from, and their format; those in memory must be given again.

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


def _side(
    loaded: Loaded, judge: Judge, samples: Sequence[Sample], examples: Sequence[Example], base: bool
) -> tuple[Judgement, list[Prediction]]:
    """Metrics and predictions of the base or of the adapter."""
    recipe, what = loaded.recipe, "base" if base else "adapter"
    with judge.side(base):
        found = judge.held_out(samples, token_budget(recipe, loaded.model, loaded.task), f"judging the {what}: loss")()
        chosen = answer_options(
            recipe, loaded.task, loaded.processor, examples, loaded.encode, judge.listener if base else None
        )
        if chosen:
            told, judged = judge.answers(*chosen, f"judging the {what}: answers")
            return Judgement({**found.metrics, **judged.metrics}, judged.right), told
        if not found.right:
            return found, []
        options = PredictOptions(DEFAULT_NEW_TOKENS, recipe.eval.batch_size, loaded.encode)
        told, _ = judge.answers(examples, options, f"judging the {what}: answers")
    return found, told


def predict(  # noqa: PLR0913 - one argument per option of the verb
    run: Run | str | Path, source: str, output: str | Path, *, max_new_tokens: int = DEFAULT_NEW_TOKENS,
    batch_size: int = 16, listener: Listener | None = None, given: Given | None = None,
) -> int:  # fmt: skip
    """Answer every row of `source` and write JSON lines {where, input, output, reference}; returns the number of rows.

    Rows need no answers, and may use the column names of the run's own data.
    """
    listener, output = listener or Silent(), Path(output)
    if output.exists():
        raise UsageError("the output file exists", where=str(output), fix="--output ANOTHER.jsonl")
    if not output.parent.is_dir():
        raise UsageError("the folder of the output file does not exist", where=str(output))
    loaded = load(run, listener=listener, given=given)
    data = loaded.recipe.data
    examples, _ = load_examples(
        source, "auto", data.columns, kinds=loaded.task.kinds, group_column=data.group_column, grouped=False,
        answered=False,
    )  # fmt: skip
    judge = Judge(
        loaded.task, loaded.model, loaded.processor, loaded.task.loss, listener, workers(loaded.recipe, loaded.task)
    )
    options = PredictOptions(max_new_tokens, batch_size, loaded.encode)
    predictions, _ = judge.answers(examples, options, "answers")
    for path in write_predictions(output, predictions, coco=loaded.task.coco)[1:]:
        listener.note(f"wrote {path}")
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


def merge(
    run: Run | str | Path, target: str | Path, *, dtype: str | None = None, listener: Listener | None = None,
    given: Given | None = None,
) -> dict[str, float]:  # fmt: skip
    """Merge a run's adapter into its base: a plain Transformers model, verified after it was read back."""
    return export(run, target, format_name="merged", dtype=dtype, listener=listener, given=given)


def export(
    run: Run | str | Path,
    target: str | Path,
    *,
    format_name: str,
    dtype: str | None = None,
    listener: Listener | None = None,
    given: Given | None = None,
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
    run = (run if isinstance(run, Run) else Run(Path(run))).final
    quantised = run.facts["quant"] != "none" and not chosen.full_precision
    _check_base_fits(run, chosen.full_precision)
    loaded = load(run, dtype=None if quantised else "float32", quantised=quantised, listener=listener, given=given)
    probes = exports.probe(loaded.model, exports.read_probes(run.adapter), loaded.task.outputs)
    artifact = Artifact(
        model=loaded.model,
        processor=loaded.processor,
        base=public_name(loaded.recipe.model),
        auto_class=loaded.task.auto_class,
        outputs=loaded.task.outputs,
        stored_dtype=dtype or base_dtype(loaded, listener),
        generation=loaded.task.generation_defaults(loaded.model, loaded.processor),
        load_base=lambda: plain_base(loaded, listener, quantised),
    )

    def finish(folder: Path, figures: Mapping[str, float]) -> None:
        card = model_card(loaded.recipe, run.facts, merged=chosen.full_precision, figures=figures)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return exports.publish(artifact, target, chosen, probes, finish)
