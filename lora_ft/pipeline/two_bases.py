"""A run on a quantised base: merged into the original weights or into the rounded ones, whichever answers better."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lora_ft.data import encode_all
from lora_ft.errors import ArtifactError, LoraFtError, UsageError
from lora_ft.records import Sample
from lora_ft_adapters.registry import corrects_quantisation

from .judge import Judge, token_budget
from .on_base import OnBase, Opened, on_base, rounding_of
from .prepare import encode_options, workers
from .rows import held_out_rows

ROWS = 64  # held-out rows that the two are judged on


def chosen_base(opened: Opened, stack: ExitStack, into: str) -> tuple[OnBase, Mapping[str, Any]]:
    """The base to merge into, and how it was chosen.

    Args:
        opened: the run.
        stack: closes what is open.
        into: original, dequantised, or auto for the better of both.

    Raises:
        UsageError: dequantised, but the base was not quantised; original, but the adapter holds what that lost.
    """
    rounding = rounding_of(opened)
    method = opened.recipe.method
    if corrects_quantisation(method.type, method.options()):
        if into == "original" or rounding is None:
            raise UsageError(
                f"a {method.type} adapter holds the error of its quantised base, which the original "
                "weights do not have",
                fix="--into dequantised" if rounding else "lora-ft export --format peft, and use it on that base",
            )
        return on_base(opened, stack, rounding), {"into": "dequantised"}
    if rounding is None:
        if into == "dequantised":
            raise UsageError("--into dequantised: the base of this run was not quantised", fix="leave it out")
        return on_base(opened, stack), {}
    if into == "original":
        return on_base(opened, stack), {"into": into}
    if into == "dequantised":
        return on_base(opened, stack, rounding), {"into": into}
    samples = _samples(opened)
    try:
        both = {"dequantised": on_base(opened, stack, rounding)}
    except ArtifactError as error:  # a method that needs the whole base in memory
        opened.listener.note(f"merged into the original weights: {error.what}")
        return on_base(opened, stack), {"into": "original"}
    both["original"] = on_base(opened, stack)
    if not samples:
        opened.listener.note("no held-out rows: merged into the weights that the adapter was trained on (dequantised)")
        return both["dequantised"], {"into": "dequantised"}
    losses = {name: _loss(opened, based, samples) for name, based in both.items()}
    best = min(losses, key=lambda n: losses[n])
    opened.listener.note(
        f"held-out loss of {len(samples)} samples: {losses['original']:.4f} on the original weights, "
        f"{losses['dequantised']:.4f} on the dequantised ones; merged into the {best} ones"
    )
    return both[best], {"into": best, **{f"loss_{n}": loss for n, loss in losses.items()}}


def _samples(opened: Opened) -> list[Sample]:
    try:
        rows, source, name = held_out_rows(opened)
    except LoraFtError as error:
        opened.listener.warn(f"the held-out rows of this run cannot be read: {error.what}")
        return []
    options = encode_options(opened.recipe, opened.task, opened.recipe.model, opened.run.facts["encode"]["max_length"])
    samples, _ = encode_all(
        rows[:ROWS], opened.task.encoder(opened.processor, options), source=source, format_name=name,
        max_length=options.max_length, workers=workers(opened.recipe, opened.task),
    )  # fmt: skip
    return samples


def _loss(opened: Opened, based: OnBase, samples: list[Sample]) -> float:
    task, model = opened.task, based.model
    judge = Judge(task, model, opened.processor, task.loss, opened.listener, workers(opened.recipe, task))
    budget = token_budget(opened.recipe, model, task)
    return judge.held_out(samples, budget, "held-out loss")().metrics["loss"]
