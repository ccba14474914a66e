"""Publish an artifact only after it was read back from disk and gave the same answers."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ft.artifact import Artifact, Probe
from lora_ft.errors import ArtifactError, ResourceError, UsageError
from lora_ft.records import Batch, moved
from lora_ft.registry import ArtifactForm
from lora_ft.runs import make_readable
from lora_ft_adapters import active

Answer = Callable[[Any, Batch], Tensor]


def probe(model: Any, inputs: Sequence[Mapping[str, Any]], answer: Answer) -> list[Probe]:
    """Answers of the base and of the adapter on it for each input.

    Args:
        model: PeftModel.
        inputs: batches of one, as nested lists.
        answer: the task's `outputs`.

    Raises:
        ArtifactError: the adapter gives numbers that are not finite, or changes nothing at all.
    """
    probes = answers(model, inputs, answer)
    if not all(bool(p.adapted.isfinite().all()) for p in probes):
        raise ArtifactError("the adapter gives NaN or infinite outputs", fix="go back to an earlier checkpoint")
    if probes and all(torch.equal(p.base, p.adapted) for p in probes):
        raise ArtifactError("the adapter changes nothing: base and adapter give the same outputs")
    return probes


def answers(model: Any, inputs: Sequence[Mapping[str, Any]], answer: Answer) -> list[Probe]:
    """The same, whatever they are."""
    probes = []
    device = next(model.parameters()).device
    with torch.inference_mode():
        for one in inputs:
            tensors = {k: torch.as_tensor(v).to(device) for k, v in one.items()}
            adapted = answer(model, tensors).float().cpu()
            with active(model):
                base = answer(model, tensors).float().cpu()
            adapted = _last(adapted, base.shape[1]) if base.dim() > 1 else adapted
            probes.append(Probe({k: v.cpu() for k, v in tensors.items()}, base, adapted))
    return probes


def _last(logits: Tensor, positions: int) -> Tensor:
    """Those of the input itself, where virtual tokens stand before it."""
    return logits[:, -positions:] if logits.dim() == 3 else logits


def differences(model: Any, probes: Sequence[Probe], answer: Answer) -> dict[str, float]:
    """How far a model that was read back is from the adapter on its base.

    Returns:
        max_difference: largest absolute difference of a logit.
        relative_difference: that, beside the largest logit of the adapter.
        kl: mean Kullback-Leibler divergence from the adapter's distribution over the last axis, in nats.
        top1_agreement: share of positions with the same first choice.
        update_kept: 1 - distance to the adapted outputs / distance of base and adapted outputs (L2 over all logits).

    Raises:
        ArtifactError: shapes differ, or numbers are not finite.
    """
    device = next(model.parameters()).device
    largest, size, same, positions, off, change, diverged = 0.0, 0.0, 0, 0, 0.0, 0.0, 0.0
    with torch.inference_mode():
        for p in probes:
            got = answer(model, moved(p.inputs, device)).float().cpu()
            got = _last(got, p.adapted.shape[1]) if p.adapted.dim() > 1 else got
            if got.shape != p.adapted.shape:
                raise ArtifactError(f"outputs have shape {tuple(got.shape)}, expected {tuple(p.adapted.shape)}")
            if not bool(got.isfinite().all()):
                raise ArtifactError("what was read back gives NaN or infinite outputs")
            largest = max(largest, float((got - p.adapted).abs().max()))
            size = max(size, float(p.adapted.abs().max()))
            same += int((got.argmax(-1) == p.adapted.argmax(-1)).sum())
            count = got.argmax(-1).numel()
            positions += count
            wanted, found = p.adapted.double().log_softmax(-1), got.double().log_softmax(-1)
            diverged += float((wanted.exp() * (wanted - found)).sum())
            off += float((got - p.adapted).double().square().sum())
            change += float((p.base - p.adapted).double().square().sum())
    return {
        "max_difference": largest,
        "relative_difference": largest / max(size, 1e-30),
        "kl": max(0.0, diverged / max(1, positions)),
        "top1_agreement": same / max(1, positions),
        "update_kept": 1.0 - (off / max(change, 1e-30)) ** 0.5,
    }


KEPT_LIMIT = 0.5  # share of what an adapter changes that an artifact must keep at least
SAME = {torch.float32: 1e-4, torch.float16: 5e-3}  # largest difference of a logit; other dtypes 1e-2


def check_same(figures: Mapping[str, float], model: Any, what: str, *, exact: bool = True) -> None:
    """Refuse a file whose adapter, on the base, does not give the adapter's own outputs.

    Args:
        figures: of `differences`.
        model: what they were measured on.
        what: the file.
        exact: whether its numbers are in float32; else a fiftieth of the update may be lost.

    Raises:
        ArtifactError: it differs.
    """
    limit = SAME.get(next(iter(model.parameters())).dtype, 1e-2)
    good = figures["max_difference"] <= limit or (not exact and figures["update_kept"] >= 0.98)
    if not good:
        raise ArtifactError(
            f"the adapter read back differs by {figures['max_difference']:.1e} in a logit (allowed {limit:.0e})",
            where=what,
        )


def publish(
    artifact: Artifact,
    target: Path,
    export: ArtifactForm,
    probes: Sequence[Probe],
    finish: Callable[[Path, Mapping[str, float]], None],
) -> dict[str, float]:
    """Write `artifact` to a folder beside `target`, verify it there, and rename it to `target`.

    Args:
        artifact: used up by formats that merge.
        target: must not exist, or be an empty folder.
        export: the format.
        probes: what the artifact must reproduce.
        finish: adds what is not the format's own, such as the model card; gets the folder and the figures.

    Raises:
        UsageError: the target is in use.
        ArtifactError: what was read back differs; nothing is left on disk.
    """
    check_target(target)
    staged = _stage(target)
    try:
        with _disk_errors(target):
            export.write(artifact, staged)
        figures = export.verify(artifact, staged, probes)
        finish(staged, figures)
        make_readable(staged)
        if target.exists():
            target.rmdir()
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return figures


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"the artifact could not be written: {error.strerror or error}",
            where=str(target),
            why=f"{shutil.disk_usage(target.parent).free / 1e9:.1f} GB are free there",
            fix="make room, or --out on another disk; nothing was left behind",
        ) from error


def check_space(target: Path, needed: int) -> None:
    """Refuse before anything is read what the disk cannot hold.

    Args:
        target: of `check_target`.
        needed: bytes.
    """
    above = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise ResourceError(
            f"the artifact needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=str(target),
            fix="make room, or --out on another disk",
        )


def check_target(target: Path) -> None:
    """Refuse a target that holds something, or that cannot be made."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError("the output directory is in use", where=str(target), fix="--out ANOTHER_DIR")
    if target.is_symlink() or target.resolve() == Path.cwd():
        raise UsageError("the output directory must be a new one", where=str(target), fix="--out ANOTHER_DIR")
    above = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    if not above.is_dir():
        raise UsageError(f"{above} is a file, so there is no folder in it", where=str(target), fix="--out ANOTHER_DIR")
    if not os.access(above, os.W_OK):
        raise _unwritable(target, f"no permission to write in {above}")


def _unwritable(target: Path, why: str) -> ResourceError:
    return ResourceError("the output directory cannot be written", where=str(target), why=why, fix="--out ANOTHER_DIR")


def _stage(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise _unwritable(target, str(error.strerror)) from error
    folder.chmod(0o755)
    return folder
