"""lora-ft combine, compress, convert, extract: new adapters from old ones, read back and compared before they exist."""

import math
from collections.abc import Sequence
from pathlib import Path

from lora_ft import exports
from lora_ft.errors import UsageError, did_you_mean
from lora_ft.models.resolve import resolve
from lora_ft.records import Listener, Silent
from lora_ft.report import public_name
from lora_ft_adapters import AdapterError, algebra

from .algebra_inputs import (
    as_artifact_error,
    find_inputs,
    held_out_loss,
    open_adapter,
    open_base,
    tuned_input,
    tuned_weights,
)
from .algebra_publish import NewAdapter, Work, publish


def combine(  # noqa: PLR0913 - one argument per option of the verb
    sources: Sequence[str | Path],
    target: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "sum",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    base: str | None = None,
    listener: Listener | None = None,
) -> NewAdapter:
    """Several adapters of one base as one plain LoRA.

    Args:
        sources: runs or PEFT adapter folders, of any methods that can be merged.
        target: a folder that does not exist yet.
        weights: one for each source; default 1 for ties and dare_ties, which average themselves, else 1 / N.
        how: sum, cat, svd, ties, dare, dare_ties or magnitude.
        rank: most singular values for each module; the sparse merges default to the sum of the sources' ranks.
        density: share of entries that the sparse merges keep.
        seed: of what dare drops.
        base: the base model; default that of the runs.
        listener: hears what takes long.

    Raises:
        UsageError: options that do not fit, or sources of different bases.
        ArtifactError: a source that cannot be read or merged.
    """
    listener = listener or Silent()
    weights = _check_combine(sources, weights, how, rank, density)
    exports.check_target(Path(target))
    inputs = find_inputs(sources, base)
    model = open_base(inputs, listener)
    with as_artifact_error():
        adapters = [open_adapter(model, i) for i in inputs]
        if rank is None and how not in algebra.SUMS:
            rank = _sum_of_ranks(adapters)
        expected = algebra.share(model)
        deltas = algebra.merged_deltas(adapters, weights, how, density=density, seed=seed)
        result = algebra.factorise(algebra.expecting(expected, deltas), algebra.Cut(rank), exact=how == "cat")
        work = Work(model, expected, result, inputs[0], adapters[0].config.task_type)
    made = " + ".join(f"{w:g} x {i.name}" for w, i in zip(weights, inputs, strict=True))
    return publish(work, Path(target), f"{how} of {made}")


def compress(  # noqa: PLR0913 - one argument per option of the verb
    source: str | Path,
    target: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    tolerance: float | None = None,
    data: str | None = None,
    base: str | None = None,
    listener: Listener | None = None,
) -> NewAdapter:
    """An adapter in fewer numbers: truncated SVD of each module's change.

    Args:
        source: a run or a PEFT adapter folder.
        target: a folder that does not exist yet.
        rank: most singular values for each module.
        energy: share of the sum of squared singular values to keep.
        tolerance: how much the held-out loss may rise; then rank or energy is the smallest that is tried.
        data: rows for that loss; default the run's held-out rows.
        base: the base model; default that of the run.
        listener: hears what takes long.

    Raises:
        UsageError: options that do not fit, or no rows to judge on.
        ArtifactError: the source cannot be read or merged.
    """
    listener = listener or Silent()
    if (rank is None) == (energy is None) and (rank is not None or tolerance is None):
        raise UsageError("compress needs a rank or an energy", fix="--rank N, --energy 0.99, or --tolerance X")
    if data is not None and tolerance is None:
        raise UsageError("--data is the guard's, but there is no --tolerance", fix="--tolerance 0.01")
    if tolerance is not None and not tolerance >= 0:
        raise UsageError(f"tolerance {tolerance} must not be negative")
    _check_cut(rank, energy)
    exports.check_target(Path(target))
    (found,) = find_inputs([source], base)
    model = open_base([found], listener)
    with as_artifact_error():
        adapter = open_adapter(model, found)
        expected = algebra.share(model)
        deltas = dict(algebra.expecting(expected, adapter.items()))
        guard = None
        if tolerance is not None:
            metric = held_out_loss(found, data, listener)
            guard = algebra.Guard(metric, tolerance, model, adapter.config.task_type)
        small = algebra.compress(deltas, rank=rank, energy=energy, guard=guard)
        work = Work(model, expected, small.result, found, adapter.config.task_type)
    losses = None if small.whole is None or small.kept is None else (small.whole, small.kept)
    return publish(work, Path(target), f"{found.name}, compressed", losses)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: str | None = None,
    listener: Listener | None = None,
) -> NewAdapter:
    """An adapter of any method that can be merged as a plain LoRA; exact when neither rank nor energy is given.

    Args:
        source: a run or a PEFT adapter folder.
        target: a folder that does not exist yet.
        rank: most singular values for each module.
        energy: share of the sum of squared singular values to keep.
        base: the base model; default that of the run.
        listener: hears what takes long.

    Raises:
        ArtifactError: the source cannot be read, or its method cannot be merged.
    """
    cut = _check_cut(rank, energy)
    exports.check_target(Path(target))
    (found,) = find_inputs([source], base)
    model = open_base([found], listener or Silent())
    with as_artifact_error():
        adapter = open_adapter(model, found)
        expected = algebra.share(model)
        result = algebra.factorise(algebra.expecting(expected, adapter.items()), cut)
        work = Work(model, expected, result, found, adapter.config.task_type)
    return publish(work, Path(target), f"{found.name}, converted")


def extract(
    base: str | Path,
    tuned: str | Path,
    target: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    listener: Listener | None = None,
) -> NewAdapter:
    """A LoRA from a base and a fully fine-tuned model of the same shape.

    Args:
        base: folder or hub id.
        tuned: folder or hub id; a folder is read tensor by tensor.
        target: a folder that does not exist yet.
        rank: most singular values for each matrix.
        energy: share of the sum of squared singular values to keep.
        listener: hears what takes long.

    Raises:
        ArtifactError: the models do not have the same weights.
    """
    listener = listener or Silent()
    cut = _check_cut(rank, energy)
    exports.check_target(Path(target))
    found = tuned_input(str(base), resolve(str(tuned), listener.note))
    model = open_base([found], listener)
    with as_artifact_error():
        expected = algebra.share(model)
        deltas = algebra.extract_deltas(model, tuned_weights(model, found), model)
        result = algebra.factorise(algebra.expecting(expected, deltas), cut)
        work = Work(model, expected, result, found, found.task.peft_task_type)
    return publish(work, Path(target), f"{public_name(str(tuned))} minus {public_name(str(base))}")


def _check_combine(
    sources: Sequence[str | Path], weights: Sequence[float] | None, how: str, rank: int | None, density: float
) -> list[float]:
    """The weights, one for each source."""
    if not sources:
        raise UsageError("combine needs at least one run or adapter")
    if how not in algebra.HOWS:
        raise UsageError(f"--how {how!r}; {did_you_mean(how, algebra.HOWS)}")
    if weights is None:
        weights = [1.0 if how.endswith("ties") else 1 / len(sources)] * len(sources)
    if len(weights) != len(sources):
        raise UsageError(f"{len(sources)} adapters, but {len(weights)} weights", fix="--weights 0.7,0.3")
    if not all(math.isfinite(w) for w in weights):
        raise UsageError("weights must be finite numbers")
    if not 0 < density <= 1:
        raise UsageError(f"density {density} must be above 0 and at most 1")
    if how in ("sum", "cat") and rank is not None:
        raise UsageError(f"--how {how} is exact and takes no rank", fix="--how svd --rank N")
    if how == "svd" and rank is None:
        raise UsageError("--how svd needs a rank", fix="--rank N, or --how sum, which is exact")
    _check_cut(rank, None)
    return list(weights)


def _check_cut(rank: int | None, energy: float | None) -> algebra.Cut:
    if rank is not None and energy is not None:
        raise UsageError("give a rank or an energy, not both")
    try:
        return algebra.Cut(rank, energy)
    except AdapterError as error:
        raise UsageError(str(error)) from error


def _sum_of_ranks(adapters: Sequence[algebra.AdapterDeltas]) -> int:
    """What `cat` would need; a sparse merge has full rank, which would be as large as the model."""
    ranks = [max((r for r in a.ranks()), default=0) for a in adapters]
    if not all(ranks):
        raise UsageError("an adapter that is no plain LoRA has no rank to go by", fix="--rank N")
    return sum(ranks)
