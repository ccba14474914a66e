"""What `train.few_shot` cannot do, and what beside it would change nothing."""

import json

from lora_ft.errors import UsageError
from lora_ft.recipe import Recipe, TrainSection
from lora_ft.registry import Task

CLASSES = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")  # their logits are the head's
USED = ("few_shot", "dtype", "tokens_per_micro_batch")  # of the train section
WITHOUT = "--set train.few_shot=false"


def check(recipe: Recipe, task: Task) -> None:
    """Refuse, before any weight is read, what `train.few_shot` cannot do.

    Raises:
        UsageError: another method than a head, another kind of task, keys of steps, or a way of drawing epochs: there
            are none.
    """
    method, data = recipe.method.type, recipe.data
    if method != "head":
        raise UsageError(
            f"train.few_shot fits a new head on frozen features, and method {method} trains more than a head",
            where="method",
            fix="--set method=head",
        )
    if task.auto_class not in CLASSES:
        raise UsageError(
            f"train.few_shot: the task {task.name} has no new head whose answers are its loss",
            where="task",
            why="it goes with classification of texts and of words, and with regression",
            fix=WITHOUT,
        )
    usual = {n: v for n, v in TrainSection().model_dump().items() if n not in USED}
    idle = {n: v for n, v in usual.items() if getattr(recipe.train, n) != v}
    if idle:
        back = " ".join(f"--set train.{n}={json.dumps(v)}" for n, v in idle.items())
        raise UsageError(
            f"train.few_shot fits the head at once, so {', '.join(f'train.{n}' for n in idle)} would change nothing",
            where="train",
            fix=f"leave them out; where a preset has them, {back}",
        )
    drawn = "data.sampling: balanced" if data.sampling != "shuffle" else "a data.train list with weights"
    if data.sampling != "shuffle" or not (isinstance(data.train, str) or len({s.weight for s in data.train}) == 1):
        raise UsageError(
            f"train.few_shot: {drawn} changes how epochs are drawn, and here every row counts once",
            where="data",
            fix="leave it out; class weights are an option of the task",
        )
