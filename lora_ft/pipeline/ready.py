"""The adapted model: method checked, base loaded, adapter added, loss chosen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lora_ft.errors import UsageError
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import check_vocabulary, grow_embeddings, load_model, original_weights, skeleton
from lora_ft.recipe import Recipe
from lora_ft.records import Batch, LossSum
from lora_ft.registry import QUANTIZERS, Task
from lora_ft.training.batching import by_length, epoch_order, step_samples
from lora_ft_adapters import (
    AdapterError,
    Calibration,
    active,
    add_adapter,
    build_config,
    list_methods,
    trainable,
    unsaved,
)
from lora_ft_adapters.behaviour import behaviour_of
from lora_ft_adapters.fast.lora import Lean
from lora_ft_adapters.fast.verify import Verdict, verify
from lora_ft_adapters.registry import find_method

from .prepare import Prepared, planned_steps, usage

VERIFY_SAMPLES = 4
VERIFY_TOKENS = 1024
CALIBRATION_TOKENS = 1024  # in a batch, padding included
LossFn = Callable[[Any, Batch], LossSum]


@dataclass(frozen=True)
class Ready:
    """The adapted model and how its loss is computed."""

    model: Any
    loss: LossFn
    dtype: torch.dtype
    fingerprint: str
    path_note: str


def check_method(recipe: Recipe, prepared: Prepared) -> Any:
    """The PEFT config, its targets checked on a model without weights."""
    try:
        method = recipe.method
        empty = skeleton(prepared.source, prepared.task.auto_class)
        options = {**method.options(), **_new_tokens(recipe, prepared, empty)}
        config = build_config(method.type, options, prepared.task.peft_task_type, empty)
        behaviour = behaviour_of(config)
        if behaviour.corrects_quantisation and recipe.quant == "none":
            raise AdapterError(f"{method.type} corrects the error of a quantised base, and quant is none", "quant: nf4")
        _check_biases(config)
        behaviour.prepare(config, planned_steps(recipe, prepared)[0])
        return config
    except AdapterError as error:
        raise usage(error) from error


def _check_biases(config: Any) -> None:
    """PEFT trains `bias: all` in the base itself, where it stays when the adapter is switched off."""
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise AdapterError(
            f"bias: {bias} changes the base itself, so before and after could not be compared",
            "bias: none, with method type bitfit for biases, or lora_bias: true for biases of the adapter",
        )


def _new_tokens(recipe: Recipe, prepared: Prepared, empty: Any) -> dict[str, Any]:
    """The method option that trains the rows of the recipe's new tokens."""
    if not prepared.new_tokens:
        return {}
    method = find_method(recipe.method.type)
    ids = sorted(prepared.processor.convert_tokens_to_ids(list(prepared.new_tokens)))
    option = next((o for o in ("trainable_token_indices", "token_indices") if o in method.options()), None)
    if option is None:
        able = sorted(n for n, m in list_methods().items() if "trainable_token_indices" in m.options())
        raise AdapterError(
            f"data.add_tokens: method {method.name!r} cannot train embedding rows",
            f"methods that can: {', '.join(able)}",
        )
    given = recipe.method.options().get(option) or []
    if not isinstance(given, list):
        raise AdapterError(f"method.{option}: give a list of token ids when data.add_tokens is used")
    rows = sorted({*ids, *given})
    if option == "token_indices":
        return {option: rows}
    # A head of its own must learn to write the new tokens, or it gives all of them the same chance for ever.
    ends = [getattr(empty, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    names = [n for n, m in empty.named_modules() if m is not None and any(m is e for e in ends)]
    tied = bool(getattr(getattr(empty, "config", None), "tie_word_embeddings", True))
    return {option: dict.fromkeys((n.rsplit(".", 1)[-1] for n in names), rows) if not tied else rows}


def make_ready(recipe: Recipe, prepared: Prepared, config: Any, dtype: torch.dtype, device: torch.device) -> Ready:
    """The base loaded and checked, the adapter on it, and the loss that will be trained with."""
    base = load_base(recipe, prepared.task, prepared.source, dtype, device)
    mark = fingerprint(base)
    if prepared.new_tokens:
        grow_embeddings(base, len(prepared.processor))
    check_vocabulary(base, prepared.processor)
    base.generation_config.update(**prepared.task.generation_defaults(base, prepared.processor))
    batch = _check_batch(recipe, prepared, device)
    with torch.no_grad():
        before = prepared.task.loss(base, batch).total
    torch.manual_seed(recipe.seed)  # before the adapter exists, so that its start is the seed's
    try:
        model = add_adapter(base, config, data=_calibration(recipe, prepared, device))
        lost = unsaved(model)
    except AdapterError as error:
        raise usage(error) from error
    if lost:
        raise UsageError(f"{len(lost)} trained tensors would not be saved, for example {lost[0]}", where="method")
    _check_runs(recipe, prepared, model, batch)
    with torch.no_grad(), active(model):
        after = prepared.task.loss(model.eval(), batch).total
    # Repeated layers are the one thing that a user asks of the base itself; it is judged with them.
    same = bool(getattr(config, "layer_replication", None)) or torch.allclose(before, after, rtol=1e-5)
    if not same:  # the same products in the same order
        raise UsageError(
            f"this method changes the base itself: its loss with the adapter switched off goes from "
            f"{float(before):.4g} to {float(after):.4g}",
            where="method",
            why="before and after could not be compared, and the saved adapter would not fit the original base",
            fix="choose another initialisation",
        )
    loss, note = _choose_loss(recipe, prepared, model, dtype)
    return Ready(model, loss, dtype, mark, note)


def _check_runs(recipe: Recipe, prepared: Prepared, model: Any, batch: Batch) -> None:
    """PEFT takes some methods on a quantised base and fails, or does nothing, only when the model runs."""
    try:
        with torch.no_grad():
            prepared.task.loss(model.eval(), batch)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"method {recipe.method.type!r} does not run on this base: {first}",
            where="method",
            why=f"quant: {recipe.quant}" if recipe.quant != "none" else "PEFT has no layer of it for this model",
            fix="lora-ft list methods shows what runs on a 4-bit base",
        ) from error


def load_base(
    recipe: Recipe, task: Task, source: str, dtype: torch.dtype, device: torch.device, *, quantised: bool = True
) -> Any:
    """The recipe's base, quantised as it says unless `quantised` is off."""
    quantizer = QUANTIZERS.get(recipe.quant if quantised else "none")
    arguments = quantizer.load_arguments(dtype)
    model = load_model(source, task.auto_class, dtype=dtype, device=device, arguments=arguments)
    quantizer.prepare(model)
    return model


def _calibration(recipe: Recipe, prepared: Prepared, device: torch.device) -> Calibration:
    """A seeded sample of the training rows, for methods that look at data before they start."""
    task = prepared.task
    rows = epoch_order(len(prepared.train), recipe.seed, 0)[: recipe.train.calibration_rows]
    samples = [prepared.train[i] for i in rows]
    groups = [[samples[i] for i in g] for g in by_length([s.length for s in samples], CALIBRATION_TOKENS)]
    batches = [{k: v.to(device) for k, v in task.collate(g, prepared.processor).items()} for g in groups]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        result = task.loss(model, batch)
        return result.total / result.count

    original = original_weights(prepared.source) if recipe.quant != "none" else None
    return Calibration(batches, loss, original)


def _choose_loss(recipe: Recipe, prepared: Prepared, model: Any, dtype: torch.dtype) -> tuple[LossFn, str]:
    """The fastest loss that equals the plain one on the first samples; every adapter tensor must get a gradient."""
    task = prepared.task
    batch = _check_batch(recipe, prepared, next(model.parameters()).device)
    named = list(trainable(model))
    plain = partial(_total, task.loss, model, batch)
    refused: list[str] = []
    model.train()
    try:
        for what, loss in _candidates(task, model):
            verdict = verify(partial(_total, loss, model, batch), plain, [p for _, p in named], dtype)
            _check_reached(named, verdict)
            if verdict.exact:
                note = f"{what}: gradient equal to the plain one to {verdict.gradient_error:.0e}"
                return loss, "; ".join([note, *refused])
            refused.append(f"{what} is off: {verdict.reason}")
    finally:
        model.eval()
    return task.loss, "; ".join(["plain loss", *refused])


def _check_batch(recipe: Recipe, prepared: Prepared, device: torch.device) -> Batch:
    """The shortest samples of the first step, few enough that the plain path's full logits fit where training fits."""
    rows = step_samples(0, len(prepared.train), recipe.train.batch_size, recipe.seed)
    samples = sorted((prepared.train[i] for i in rows), key=lambda s: s.length)[:VERIFY_SAMPLES]
    chosen = [s for n, s in enumerate(samples, 1) if n == 1 or n * s.length <= VERIFY_TOKENS]
    return {k: v.to(device) for k, v in prepared.task.collate(chosen, prepared.processor).items()}


def _total(loss: LossFn, model: Any, batch: Batch) -> torch.Tensor:
    return loss(model, batch).total


def _candidates(task: Task, model: Any) -> Iterator[tuple[str, LossFn]]:
    """Fast paths, the fastest first."""
    try:
        lean = Lean(model)
    except AdapterError:
        pass  # another method than LoRA
    else:

        def lean_loss(model: Any, batch: Batch) -> LossSum:
            with lean:
                return task.fast_loss(model, batch)

        yield "head at labels only, lean LoRA", lean_loss
    yield "head at labels only", task.fast_loss


def _check_reached(named: list[tuple[str, Any]], verdict: Verdict) -> None:
    if verdict.unreached:
        names = [named[i][0] for i in verdict.unreached]
        raise UsageError(
            f"no gradient reaches {len(names)} of {len(named)} adapter tensors, for example {names[0]}",
            where="method.target_modules",
            fix="leave out modules that this task does not use",
        )
