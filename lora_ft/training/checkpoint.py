"""Checkpoints: staged, listed with their hashes, renamed into place; no pickle.

checkpoints/step-00000120/{adapter_model.safetensors, adapter_config.json, optim.safetensors, state.json, manifest.json}
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from lora_ft.errors import ArtifactError
from lora_ft_adapters import trainable

from .optim import load_state, state_by_name

KEEP = 2
ADAPTER = "adapter_model.safetensors"


@dataclass
class Progress:
    """Where training stands; all of it is in the checkpoint.

    Attributes:
        step: optimizer steps done.
        tokens: real tokens seen.
        seconds: spent in steps.
        best_loss: lowest evaluation loss.
        best_step: step that had it, 0 when there was no evaluation.
        waited_loss: the last loss that was better by min_delta; what patience is counted from.
        bad_evals: evaluations since then.
        lr_scale: what reduce_lr_on_plateau has made of the rate.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = float("inf")
    best_step: int = 0
    waited_loss: float = float("inf")
    bad_evals: int = 0
    lr_scale: float = 1.0


def save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    """The adapter in PEFT's layout. `base` is what the config says it belongs to, never a path of this machine."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of empty headings; ours is written at the end


def save(root: Path, model: PeftModel, optimizer: Optimizer, progress: Progress, identity: dict[str, Any]) -> Path:
    """Write a checkpoint so that it is there whole or not at all; then prune old ones but the best.

    Args:
        root: the checkpoints folder.
        model: with the adapter.
        optimizer: its state is saved by parameter name.
        progress: counters.
        identity: what a resumed run must agree with.
    """
    final = root / f"step-{progress.step:08d}"
    staged = Path(tempfile.mkdtemp(dir=root, prefix=f".tmp-{progress.step}-"))
    save_adapter(model, staged, identity["base"])
    tensors = state_by_name(optimizer, trainable(model))
    tensors["rng|cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng|cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, staged / "optim.safetensors")
    (staged / "state.json").write_text(json.dumps({"progress": asdict(progress), "identity": identity}))
    listed = {p.name: [p.stat().st_size, _sha256(p)] for p in sorted(staged.iterdir())}
    (staged / "manifest.json").write_text(json.dumps(listed, indent=1))
    for path in (*staged.iterdir(), staged):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    _sync(root)
    _prune(root, progress.best_step)
    return final


def latest(root: Path) -> Path:
    """The newest checkpoint whose files are all as its manifest says.

    Raises:
        ArtifactError: there is none; names each one and its fault.
    """
    faults = []
    for path in sorted(root.glob("step-*"), reverse=True):
        fault = check(path)
        if not fault:
            return path
        faults.append(f"{path.name}: {fault}")
    raise ArtifactError(
        "there is no checkpoint to resume from",
        where=str(root),
        why="; ".join(faults) or "none was saved yet",
        fix="start anew with --overwrite",
    )


def check(path: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    try:
        listed = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json is missing or unreadable"
    for name, (size, digest) in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _sha256(file) != digest:
            return f"{name} has changed since it was saved"
    return ""


def restore(path: Path, model: PeftModel, optimizer: Optimizer, identity: dict[str, Any]) -> Progress:
    """Put a checkpoint back into model, optimizer and random state.

    Raises:
        ArtifactError: it belongs to another base, data set, method or seed; says which.
    """
    check_identity(path, identity)
    state = json.loads((path / "state.json").read_text())
    load_adapter_tensors(path, model)
    tensors = load_file(path / "optim.safetensors")
    torch.set_rng_state(tensors.pop("rng|cpu"))
    cuda = tensors.pop("rng|cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    try:
        load_state(optimizer, trainable(model), tensors)
    except KeyError as error:
        raise ArtifactError(f"the optimizer state of {error} is missing", where=str(path)) from error
    return Progress(**state["progress"])


def check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of another base, data set, method or seed; says which differs."""
    old = json.loads((path / "state.json").read_text())["identity"]
    differ = [k for k, v in identity.items() if old.get(k) != v]
    if differ:
        lines = "; ".join(f"{k}: was {old.get(k)}, now {identity[k]}" for k in differ[:5])
        raise ArtifactError(f"this run cannot go on from {path.name}", where=str(path), why=lines)


def load_adapter_tensors(path: Path, model: PeftModel) -> None:
    """Overwrite the adapter's tensors with those of a folder in PEFT's layout; every one must be there."""
    tensors = load_file(path / ADAPTER)
    result: Any = set_peft_model_state_dict(model, tensors)
    missing = [k for k in result.missing_keys if any(k == n for n, _ in trainable(model))]
    if missing or result.unexpected_keys:
        what = f"lacks {missing[0]}" if missing else f"has the unknown tensor {result.unexpected_keys[0]}"
        raise ArtifactError(f"the adapter file {what}", where=str(path / ADAPTER))


def clean(root: Path) -> None:
    """Remove what a killed process left half-written; call it under the run's lock."""
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _prune(root: Path, best_step: int) -> None:
    for path in sorted(root.glob("step-*"))[:-KEEP]:
        if int(path.name.removeprefix("step-")) != best_step:
            doomed = path.rename(root / f".tmp-del-{path.name}")
            shutil.rmtree(doomed)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
