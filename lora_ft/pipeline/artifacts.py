"""Merge, unmerge and export: artifacts written beside their place, read back, compared, and only then published."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from lora_ft import exports
from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports.publish import KEPT_LIMIT
from lora_ft.models.load import stored_dtype
from lora_ft.models.streaming import NotStreamable, read_streamed
from lora_ft.records import Listener, Silent
from lora_ft.registry import EXPORTS, ExportFormat
from lora_ft.report import model_card, public_name
from lora_ft.runs import Run
from lora_ft_adapters import UnmergeableError

from .loading import load, plain_base
from .on_base import OnBase, Opened, open_run, unmergeable
from .prepare import base_spec
from .probing import probe_inputs
from .rows import Given
from .subjects import subject_of
from .two_bases import chosen_base
from .unmerging import unmerge_into


def merge(run: Run | str | Path, target: str | Path, **options: Any) -> dict[str, Any]:
    """Merge a run's adapter into its base: a plain Transformers model, verified after it was read back.

    Args:
        run, target, options: as for `export`.
    """
    return export(run, target, format_name="merged", **options)


def export(  # noqa: PLR0913 - one argument per option of the verb
    run: Run | str | Path,
    target: str | Path,
    *,
    format_name: str,
    dtype: str | None = None,
    listener: Listener | None = None,
    given: Given | None = None,
    into: str = "auto",
    push: str | None = None,
    private: bool = False,
) -> dict[str, Any]:
    """Write a run's adapter in an export format; nothing is published that differs from adapter on base.

    Args:
        run: the run or its folder.
        target: a folder that does not exist yet.
        format_name: see `lora-ft list exports`.
        dtype: what numbers are written in; default that of the base's own files.
        listener: hears what takes long.
        given: what the caller has in memory.
        into: of a run on a quantised base, whether it is merged into the base's original weights or into those that the
            quantised base multiplies with: auto tries both on held-out rows.
        push: repository of the hub, USER/NAME, that it is uploaded to.
        private: whether a new repository is private.

    Returns:
        What verification measured.
    """
    if push is not None:
        exports.check_repository(push)
    chosen, target = EXPORTS.get(format_name), Path(target)
    _check_options(chosen, dtype, into)
    if private and push is None:
        raise UsageError("private is for a new repository of the hub, and nothing is pushed", fix="--push USER/NAME")
    exports.check_target(target)
    opened = open_run(run, listener or Silent(), given or Given())
    about = subject_of(opened)
    try:
        chosen.check(about)
        with ExitStack() as stack:
            figures = _export(opened, chosen, target, about, (dtype, into), stack)
    except UnmergeableError as error:
        raise unmergeable(error) from error
    return figures if push is None else {**figures, "address": exports.push(target, push, private=private)}


def _check_options(chosen: ExportFormat, dtype: str | None, into: str) -> None:
    if dtype is not None and dtype not in chosen.dtypes:
        allowed = ", ".join(chosen.dtypes)
        raise UsageError(
            f"dtype {dtype!r} does not go with {chosen.name}", fix=f"--dtype {allowed}" if allowed else "leave it out"
        )
    if into not in ("auto", "original", "dequantised"):
        raise UsageError(f"into {into!r} is not known", fix="auto, original or dequantised")


def _export(
    opened: Opened, chosen: ExportFormat, target: Path, about: Subject, wanted: tuple[str | None, str],
    stack: ExitStack,
) -> dict[str, Any]:  # fmt: skip
    dtype, into = wanted
    choice: Mapping[str, Any] = {}
    based: OnBase | None = None
    if chosen.full_precision:
        numbers = sum(p.numel() for p in about.model.parameters())
        width = getattr(getattr(torch, dtype or chosen.default_dtype(_stored(opened)), None), "itemsize", 1)
        exports.check_space(target, numbers * width)
        based, choice = chosen_base(opened, stack, into)
        probes = based.probes
    else:
        probes = _beside(opened)
    if not probes:
        raise ArtifactError(
            "there is no input to compare the artifact by: the run kept hashes alone, and its rows are gone",
            where=opened.recipe.data.train if isinstance(opened.recipe.data.train, str) else "data.train",
            fix="put the run's data back where it was",
        )
    artifact = _artifact(opened, about, dtype or chosen.default_dtype(_stored(opened)), based, probes)

    def finish(folder: Path, figures: Mapping[str, float]) -> None:
        found = {**figures, **choice, **_left(based, artifact.dtype)}
        form = "" if chosen.name in ("merged", "peft") else chosen.name
        card = model_card(opened.recipe, opened.run.facts, merged=chosen.full_precision, figures=found, form=form)
        (folder / "README.md").write_text(card, encoding="utf-8")
        result.update(found)

    result: dict[str, Any] = {}
    exports.publish(artifact, target, chosen, probes, finish)
    return result


def _left(based: OnBase | None, dtype: str) -> dict[str, Any]:
    """What of each layer's update is left in the written dtype.

    Raises:
        ArtifactError: so little that the merged model would be the base.
    """
    kept = based.made[-1].kept if based is not None and based.made else {}
    if not kept:
        return {}
    # Weighted by the size of the update: of a layer that hardly changed, hardly anything can be lost.
    weight = sum(size**2 for size, _ in kept.values())
    share = sum(size**2 * left for size, left in kept.values()) / weight if weight else 0.0
    worst = min(kept, key=lambda n: kept[n][1])
    if not share >= KEPT_LIMIT:
        raise ArtifactError(
            f"only {share:.0%} of the adapter's update is left in {dtype}: the merged model would be nearly the base",
            where=worst,
            why=f"the update is {kept[worst][0]:.1e} of the weight there, and {dtype} rounds coarser than that",
            fix="merge with --dtype float32, or serve the adapter unmerged (lora-ft export --format peft)",
        )
    layers = {n: {"update": size, "left": left} for n, (size, left) in kept.items()}
    return {"weights_kept": share, "least_kept": kept[worst][1], "least_kept_in": worst, "layers": layers}


def _beside(opened: Opened) -> list[Probe]:
    """Answers of the adapter on the base as it was trained, in memory."""
    model = _trained(opened).model
    return exports.probe(model, probe_inputs(opened, model, opened.listener)[0], opened.task.outputs)


def _trained(opened: Opened) -> Any:
    quantised = opened.run.facts["quant"] != "none"
    dtype = None if quantised else "float32"
    return load(opened.run, dtype=dtype, quantised=quantised, listener=opened.listener, given=opened.given)


def _stored(opened: Opened) -> str:
    if opened.task.auto_class is None:
        return str(opened.run.facts["dtype"])
    return stored_dtype(opened.source)


def _artifact(
    opened: Opened, subject: Subject, dtype: str, based: OnBase | None, probes: Sequence[Probe] = ()
) -> Artifact:  # fmt: skip
    trained = partial(_trained, opened)

    def merged() -> Any:
        assert based is not None
        weights = based.merged(getattr(torch, dtype, None))
        if based.config is not None:
            subject.model.config = based.config
        if based.made and based.made[-1].untied:
            subject.model.config.get_text_config().tie_word_embeddings = False
            subject.model.config.tie_word_embeddings = False
        return weights

    def unmerged() -> Any:
        assert based is not None
        return based.unmerged()

    def base() -> Any:
        loaded = trained()
        quantised = opened.run.facts["quant"] != "none"
        return plain_base(loaded, opened.listener, quantised)

    return Artifact(
        subject=subject,
        folder=opened.run.adapter,
        processor=opened.processor,
        base=public_name(opened.recipe.model),
        outputs=opened.task.outputs,
        dtype=dtype,
        generation=opened.task.generation_defaults(subject.model, opened.processor) if opened.processor else {},
        merged=merged,
        unmerged=unmerged,
        load_base=base,
        load_adapted=lambda: trained().model,
        inputs=probes[0].inputs if probes else {},
        read_model=partial(_read_model, opened),
        system=opened.recipe.data.system_prompt or "",
    )


def _read_model(opened: Opened, folder: Path) -> Any:
    """A model from files in Transformers' layout; what a function builds gets their tensors, all and no other."""
    auto_class = opened.task.auto_class
    if auto_class is None:
        spec = base_spec(opened.recipe, opened.task, opened.source, opened.given)
        given: Any = copy.deepcopy(opened.given.model)  # the caller's stays as it is
        model: Any = given if given is not None else spec.open(dtype=torch.float32, device=torch.device("cpu")).model
        state = load_file(folder / "model.safetensors")
        model.load_state_dict(state)
        return model.to(next(iter(state.values())).dtype).eval()
    try:
        model = read_streamed(folder, auto_class)
        if _runs(opened, model):
            return model
    except NotStreamable:
        pass
    kind = getattr(transformers, auto_class)
    return kind.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True).eval()


@torch.inference_mode()
def _runs(opened: Opened, model: Any) -> bool:
    """Whether each part of a model is asked for its answer before its numbers are used; else there is NaN."""
    inputs, _ = probe_inputs(opened, model, Silent())
    return all(bool(opened.task.outputs(model, one).isfinite().all()) for one in inputs[:1])


def unmerge(
    merged: str | Path, run: Run | str | Path, target: str | Path, *, listener: Listener | None = None,
    given: Given | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Take a run's adapter out of a model that it was merged into: the base again, up to rounding.

    Args:
        merged: folder of the merged model.
        run: the run whose adapter is in it.
        target: a folder that does not exist yet.
        listener, given: as for `export`.

    Raises:
        UsageError: the method cannot be taken out.
        ArtifactError: what comes out is not the run's base.
    """
    target = Path(target)
    exports.check_target(target)
    if not (Path(merged) / "config.json").is_file():
        raise ArtifactError("there is no merged model: no config.json", where=str(merged))
    opened = open_run(run, listener or Silent(), given or Given())
    try:
        return dict(unmerge_into(opened, Path(merged), target, _artifact(opened, subject_of(opened), "", None)))
    except UnmergeableError as error:
        raise UsageError(str(error), fix="keep the base's own files") from error
