"""The adapted model: method checked, base loaded, adapter added, loss chosen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lora_ft.errors import UsageError
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import check_vocabulary, load_model, skeleton
from lora_ft.recipe import Recipe
from lora_ft.records import LossSum
from lora_ft.registry import QUANTIZERS
from lora_ft.training.batching import step_samples
from lora_ft_adapters import AdapterError, add_adapter, build_config, trainable
from lora_ft_adapters.fast.verify import verify

from .prepare import Prepared, usage

VERIFY_SAMPLES = 4


@dataclass(frozen=True)
class Ready:
    """The adapted model and how its loss is computed."""

    model: Any
    loss: Callable[[Any, Any], LossSum]
    dtype: torch.dtype
    fingerprint: str
    path_note: str


def check_method(recipe: Recipe, prepared: Prepared) -> Any:
    """The PEFT config, its targets checked on a model without weights."""
    try:
        config = build_config(recipe.method.type, recipe.method.options(), prepared.task.peft_task_type)
        add_adapter(skeleton(prepared.source, prepared.task.auto_class), config)
        return build_config(recipe.method.type, recipe.method.options(), prepared.task.peft_task_type)
    except AdapterError as error:
        raise usage(error) from error


def make_ready(recipe: Recipe, prepared: Prepared, config: Any, dtype: torch.dtype, device: torch.device) -> Ready:
    """The base loaded and checked, the adapter on it, and the loss that will be trained with."""
    arguments = QUANTIZERS.get(recipe.quant).load_arguments(dtype)
    base = load_model(prepared.source, prepared.task.auto_class, dtype=dtype, device=device, arguments=arguments)
    check_vocabulary(base, prepared.processor)
    base.generation_config.update(**prepared.task.generation_defaults(base, prepared.processor))
    mark = fingerprint(base)
    torch.manual_seed(recipe.seed)  # before the adapter exists, so that its start is the seed's
    try:
        model = add_adapter(base, config)
    except AdapterError as error:
        raise usage(error) from error
    loss, note = _choose_loss(recipe, prepared, model, dtype)
    return Ready(model, loss, dtype, mark, note)


def _choose_loss(recipe: Recipe, prepared: Prepared, model: Any, dtype: torch.dtype) -> tuple[Any, str]:
    """The fast loss if it equals the plain one on the first samples; both must reach every adapter tensor."""
    task = prepared.task
    rows = step_samples(0, len(prepared.train), recipe.train.batch_size, recipe.seed)[:VERIFY_SAMPLES]
    samples = [prepared.train[i] for i in rows]
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in task.collate(samples, prepared.processor).items()}
    named = list(trainable(model))
    model.train()
    verdict = verify(
        lambda: task.fast_loss(model, batch).total, lambda: task.loss(model, batch).total, [p for _, p in named], dtype
    )
    model.eval()
    if verdict.unreached:
        names = [named[i][0] for i in verdict.unreached]
        raise UsageError(
            f"no gradient reaches {len(names)} of {len(named)} adapter tensors, for example {names[0]}",
            where="method.target_modules",
            fix="leave out modules that this task does not use",
        )
    if verdict.exact:
        return task.fast_loss, f"fast loss, gradient equal to the plain one to {verdict.gradient_error:.0e}"
    return task.loss, f"plain loss, because the fast one is off: {verdict.reason}"
