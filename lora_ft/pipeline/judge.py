"""Held-out metrics and written answers, of the base or of the adapter on it."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

from lora_ft.evaluate import evaluate
from lora_ft.recipe import Recipe
from lora_ft.records import Example, Judgement, Listener, LossSum, Prediction, PredictOptions, Sample
from lora_ft.registry import Task
from lora_ft.training.batching import by_length
from lora_ft_adapters import active

# Padding included. On a CPU more tokens at once gain nothing and cost cache; on a GPU fewer leave it idle.
MICRO_BATCH_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 8192}
WHOLE_STEP_FACTOR = 8  # a loss of the whole step costs a second forward pass as soon as the step is cut
LARGEST_EXPONENT = 700.0  # of a float64


def token_budget(recipe: Recipe, model: Any, task: Task) -> int:
    """Tokens computed at once, padding included."""
    kind = next(model.parameters()).device.type
    usual = MICRO_BATCH_TOKENS.get(kind, 1024) * (WHOLE_STEP_FACTOR if task.whole_step else 1)
    return recipe.train.tokens_per_micro_batch or usual


def unsmoothed(task: Task) -> Task:
    """The task without label smoothing, which is of training: the loss and perplexity of rows are those of the text."""
    options: Any = getattr(task, "options", None)
    if not getattr(options, "label_smoothing_factor", 0):
        return task
    judging: Task = replace(cast(Any, task), options=options.model_copy(update={"label_smoothing_factor": 0.0}))
    return judging


class Judge:
    """Judges one model with one set of held-out rows.

    Args:
        task: says how.
        model: PeftModel.
        processor: tokenizer or processor.
        loss: model, batch -> LossSum; not used where the task smooths labels.
        listener: hears of progress.
        workers: threads that read ahead.
    """

    def __init__(
        self,
        task: Task,
        model: Any,
        processor: Any,
        loss: Callable[[Any, Any], LossSum],
        listener: Listener,
        workers: int = 0,
    ) -> None:
        self.task, self.model, self.processor, self.listener = unsmoothed(task), model, processor, listener
        self.loss = loss if self.task is task else self.task.loss
        self.workers = workers

    def side(self, base: bool) -> Any:
        """A context in which the model is the base, or the adapter on it."""
        return active(self.model) if base else nullcontext()

    def held_out(self, samples: Sequence[Sample], budget: int, what: str) -> Callable[[], Judgement]:
        """A function that judges the model as it is then: mean loss, the task's metrics, and which rows are right."""
        groups = by_length([s.length for s in samples], budget)
        collate = partial(self.task.collate, processor=self.processor)

        def judge() -> Judgement:
            progress = partial(self.listener.progress, what)
            found = evaluate(self.model, samples, groups, collate, self.loss, progress, self.workers)
            judged = self.task.measure(samples, found.outputs) if any(found.outputs) else Judgement({}, [])
            means = dict(found.means)
            if self.task.perplexity:
                means["perplexity"] = math.exp(min(means["loss"], LARGEST_EXPONENT))
            return Judgement({**means, **judged.metrics}, judged.right, judged.tables)

        return judge

    def answers(
        self, examples: Sequence[Example], options: PredictOptions, what: str
    ) -> tuple[list[Prediction], Judgement]:
        """Answers to all examples, in order, and how good they are."""
        predictions: list[Prediction] = []
        for p in self.task.predict(self.model, self.processor, examples, options):
            predictions.append(p)
            self.listener.progress(what, len(predictions), len(examples))
        cut = [p.where for p in predictions if p.cut]
        if cut:
            self.listener.warn(f"{len(cut)} of {len(predictions)} inputs were too long and lost a part ({cut[0]})")
        return predictions, self.task.judge(predictions)
