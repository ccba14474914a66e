"""The adapted model: method checked, base loaded, adapter added, loss chosen."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_ft.errors import UsageError
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import Base, check_vocabulary, grow_embeddings, original_weights, tokenizer_of
from lora_ft.models.opening import BaseSpec
from lora_ft.models.quantised import check_stored, from_cache, stored_as, unpacked
from lora_ft.recipe import Recipe
from lora_ft.records import Batch, Sample, moved
from lora_ft.registry import QUANTIZERS, Quantizer, Task
from lora_ft.training.batching import by_length, epoch_order
from lora_ft.training.randomness import seed_all
from lora_ft_adapters import (
    AdapterError,
    Calibration,
    active,
    add_adapter,
    build_config,
    list_methods,
    unsaved,
)
from lora_ft_adapters.behaviour import behaviour_of
from lora_ft_adapters.fast.merge_aware import MergeAware
from lora_ft_adapters.registry import find_method

from .paths import LossPath, check_batch, choose_path
from .prepare import Prepared, planned_steps, usage

PADDING_TOLERANCE = {torch.float32: 1e-3}  # relative; 16-bit sums differ by more
CALIBRATION_TOKENS = 1024  # in a batch, padding included


@dataclass(frozen=True)
class Ready:
    """The adapted model and how its loss is computed.

    Attributes:
        model: PeftModel.
        path: of the loss.
        fingerprint: of the base.
        fresh: modules of the base that its files lack; the adapter holds them.
    """

    model: Any
    path: LossPath
    fingerprint: str
    fresh: tuple[str, ...] = ()


def check_method(recipe: Recipe, prepared: Prepared, fresh: tuple[str, ...] = (), empty: Any = None) -> Any:
    """The PEFT config, its targets checked on a model without weights.

    Args:
        recipe: names the method and its options.
        prepared: the data.
        fresh: modules that start at random, and so train and are saved with the adapter.
        empty: the model without weights, where the caller has it.
    """
    try:
        method = recipe.method
        empty = prepared.base.skeleton() if empty is None else empty
        options = {**method.options(), **_new_tokens(recipe, prepared, empty)}
        if fresh:
            options["modules_to_save"] = sorted({*(options.get("modules_to_save") or ()), *fresh})
        config = build_config(method.type, options, prepared.task.peft_task_type, empty)
        behaviour = behaviour_of(config)
        if behaviour.corrects_quantisation and recipe.quant.type == "none":
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


def make_ready(recipe: Recipe, prepared: Prepared, dtype: torch.dtype, device: torch.device) -> Ready:
    """The base loaded and checked, the adapter on it, and the loss that will be trained with."""
    opened = open_base(recipe, prepared.base, dtype, device, model=prepared.model)
    base = opened.model
    mark = fingerprint(base, opened.fresh)
    fit_processor(base, prepared.task, prepared.processor, grow=bool(prepared.new_tokens))
    config = check_method(recipe, prepared, opened.fresh, base)
    batch = check_batch(recipe, prepared, device)
    with torch.no_grad():
        before = prepared.task.loss(base, batch).total
    seed_all(recipe.seed)  # before the adapter exists, so that its start is the seed's
    try:
        model = add_adapter(base, config, data=_calibration(recipe, prepared, device))
        lost = unsaved(model)
        as_merged(recipe, model)
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
    _check_padding(prepared, model, dtype, device)
    return Ready(model, choose_path(recipe, prepared, model, dtype), mark, opened.fresh)


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
            why=f"quant: {recipe.quant.type}"
            if recipe.quant.type != "none"
            else "PEFT has no layer of it for this model",
            fix="lora-ft list methods shows what runs on a 4-bit base",
        ) from error


def _check_padding(prepared: Prepared, model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """A short row must have the same loss alone as beside a longer one, or every figure hangs on who is in a batch."""
    task = prepared.task
    by_size = sorted(prepared.train, key=lambda s: s.length)
    short, long = by_size[0], by_size[len(by_size) // 2]
    if task.whole_step or short.length == long.length:
        return

    @torch.no_grad()
    def total(*samples: Sample) -> float:
        batch = moved(task.collate(samples, prepared.processor), device)
        return float(task.loss(model.eval(), batch).total)

    together, apart = total(short, long), total(short) + total(long)
    if not math.isclose(together, apart, rel_tol=PADDING_TOLERANCE.get(dtype, 5e-2), abs_tol=1e-4):
        raise UsageError(
            f"padding changes the loss of a row: two rows in one batch have {together:.5g}, one by one {apart:.5g}",
            where="method",
            why="this model, with this method, looks at padding",
            fix="another method (prompt methods on decoders that classify are known for it), or another base",
        )


def open_base(
    recipe: Recipe, spec: BaseSpec, dtype: torch.dtype, device: torch.device, *, quantised: bool = True,
    model: Any = None,
) -> Base:  # fmt: skip
    """The recipe's base, quantised as it says unless `quantised` is off; or a copy of the caller's own module."""
    if model is not None:
        return Base(copy.deepcopy(model).to(device=device, dtype=dtype).requires_grad_(False).eval())
    quantizer = quantizer_of(recipe) if quantised else QUANTIZERS.get("none")
    if recipe.quant.type != "none" and spec.auto_class is None:
        raise UsageError("quant: a model that a function builds is not quantised", fix="quant: none")
    arguments = quantizer.load_arguments(dtype)

    def load(folder: str | None) -> Base:
        where = spec if folder is None else replace(spec, source=folder)
        return where.open(dtype=dtype, device=device, arguments=arguments if folder is None else None)

    if arguments:
        settings = {**recipe.quant.model_dump(mode="json"), "dtype": str(dtype), "class": spec.auto_class}
        opened = from_cache(spec.source, settings, load)
    else:
        opened = load(None)
        if not quantised and stored_as(opened.model):
            opened = Base(unpacked(opened.model).to(dtype), opened.fresh)
    quantizer.prepare(opened.model)
    return opened


def quantizer_of(recipe: Recipe) -> Quantizer:
    """The recipe's quantiser with its options."""
    return QUANTIZERS.get(recipe.quant.type).configure(recipe.quant.options())


def as_merged(recipe: Recipe, model: Any) -> None:
    """Let an adapter compute as the merge into its quantised base will, where the recipe says so."""
    if getattr(quantizer_of(recipe).options, "merge_aware", False):
        MergeAware(model).install()


def check_quant(recipe: Recipe, spec: BaseSpec) -> str:
    """How the base will be stored: the recipe's quantiser, or what its files are; no weight is read.

    Raises:
        UsageError: a package is missing, an option is wrong, or such a base cannot train.
    """
    quantizer_of(recipe).load_arguments(torch.float32)
    stored = check_stored(spec.source, recipe.quant.type) if spec.auto_class is not None else ""
    return stored or recipe.quant.type


def fit_processor(base: Any, task: Task, processor: Any, *, grow: bool) -> None:
    """The base with room for the processor's tokens, its padding and its ends."""
    tokenizer = tokenizer_of(processor)
    if tokenizer is not None:
        if grow:
            grow_embeddings(base, len(tokenizer))
        check_vocabulary(base, tokenizer)
        if task.new_head and getattr(base.config, "pad_token_id", None) is None:  # where the last real token is
            base.config.pad_token_id = tokenizer.pad_token_id
    if processor is not None and getattr(base, "generation_config", None) is not None:
        base.generation_config.update(**task.generation_defaults(base, processor))


def _calibration(recipe: Recipe, prepared: Prepared, device: torch.device) -> Calibration:
    """A seeded sample of the training rows, for methods that look at data before they start."""
    task = prepared.task
    rows = epoch_order(len(prepared.train), recipe.seed, 0)[: recipe.train.calibration_rows]
    samples = [prepared.train[i] for i in rows]
    groups = [[samples[i] for i in g] for g in by_length([s.length for s in samples], CALIBRATION_TOKENS)]
    batches = [moved(task.collate(g, prepared.processor), device) for g in groups]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        result = task.loss(model, batch)
        return result.total / result.count

    original = original_weights(prepared.base.source) if recipe.quant.type != "none" else None
    return Calibration(batches, loss, original)
