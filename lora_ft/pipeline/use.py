"""What can be done with a finished run: evaluate and predict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_ft.data import encode_all, load_examples
from lora_ft.errors import UsageError
from lora_ft.evaluate import compare
from lora_ft.evaluate.compare import Comparison
from lora_ft.records import (
    Example,
    Judgement,
    Listener,
    Prediction,
    PredictOptions,
    Sample,
    Silent,
)
from lora_ft.runs import Run

from .answer_files import answer_rows, write_predictions, write_rows
from .judge import Judge, token_budget
from .loading import Loaded, load
from .prepare import answer_options, tell, workers
from .rows import Given, held_out_rows

DEFAULT_NEW_TOKENS = 256


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
    examples, source, format_name = held_out_rows(loaded, data)
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
