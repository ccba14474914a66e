"""Checkpoints: staged, listed with their hashes, renamed into place; no pickle.

checkpoints/step-00000120/{adapter_model.safetensors, adapter_config.json, optim.safetensors, state.json, manifest.json}
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from lora_ft.errors import ArtifactError
from lora_ft_adapters import save_adapter
from lora_ft_adapters.behaviour import Driver, detached

from .optim import load_state, state_by_name

KEEP = 2
ADAPTER = "adapter_model.safetensors"
DRIVER, RAW = "driver|", "raw|"  # before names in optim.safetensors


@dataclass
class Progress:
    """Where training stands; all of it is in the checkpoint. Values are of `train.metric_for_best_model`.

    Attributes:
        step: optimizer steps done.
        tokens: real tokens seen.
        seconds: spent in steps.
        data_seconds: of these, waiting for batches.
        best_value: of the best evaluation, None before the first.
        best_step: step that had it, 0 when there was no evaluation.
        waited_value: the last that was better by early_stopping's min_delta; what its patience is counted from.
        bad_evals: evaluations since then.
        plateau_value: the last that was better by reduce_lr_on_plateau's threshold.
        plateau_evals: evaluations since then or since the rate last fell.
        lr_scale: what reduce_lr_on_plateau has made of the rate.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    best_value: float | None = None
    best_step: int = 0
    waited_value: float | None = None
    bad_evals: int = 0
    plateau_value: float | None = None
    plateau_evals: int = 0
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds the state of.

    Attributes:
        model: with the adapter.
        named: the parameters that train, by name; some may be frozen for now.
        optimizer: its state is saved by parameter name.
        driver: the method's hand in the loop.
    """

    model: PeftModel
    named: Sequence[tuple[str, nn.Parameter]]
    optimizer: Optimizer
    driver: Driver

    @property
    def raw(self) -> bool:
        """Whether PEFT's file holds less than what trains: of a prompt network it keeps the outputs only."""
        return any(c.is_prompt_learning for c in self.model.peft_config.values())


def save(root: Path, trained: Trained, progress: Progress, identity: dict[str, Any]) -> Path:
    """Write a checkpoint so that it is there whole or not at all; then prune old ones but the best.

    Args:
        root: the checkpoints folder.
        trained: model, optimizer and driver.
        progress: counters.
        identity: what a resumed run must agree with.
    """
    final = root / f"step-{progress.step:08d}"
    staged = Path(tempfile.mkdtemp(dir=root, prefix=f".tmp-{progress.step}-"))
    with trained.driver.whole():
        save_adapter(trained.model, staged, base=identity["base"])
    tensors = state_by_name(trained.optimizer, trained.named)
    tensors |= {f"{DRIVER}{k}": v for k, v in trained.driver.state().items()}
    if trained.raw:
        tensors |= {f"{RAW}{n}": detached(p) for n, p in trained.named}
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


def restore(path: Path, trained: Trained, identity: dict[str, Any], fresh: frozenset[str] = frozenset()) -> Progress:
    """Put a checkpoint back into model, optimizer and driver.

    Args:
        path: the checkpoint.
        trained: what to put it into.
        identity: what it must agree with.
        fresh: parameters that need no optimizer state because they have not been trained yet.

    Raises:
        ArtifactError: it belongs to another base, data set, method or seed; says which.
    """
    check_identity(path, identity)
    state = json.loads((path / "state.json").read_text())
    load_trained(path, trained)
    tensors = {k: v for k, v in load_file(path / "optim.safetensors").items() if not k.startswith((DRIVER, RAW))}
    try:
        load_state(trained.optimizer, trained.named, tensors, fresh)
    except KeyError as error:
        raise ArtifactError(f"the optimizer state of {error} is missing", where=str(path)) from error
    return Progress(**state["progress"])


def check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of another base, data set, method or seed, or of another version; says which differs."""
    state = json.loads((path / "state.json").read_text())
    if state["progress"].keys() != {f.name for f in fields(Progress)}:
        raise ArtifactError(
            f"{path.name} was written by another version of lora-ft",
            where=str(path),
            fix="resume with that version, or start anew with --overwrite",
        )
    old = state["identity"]
    differ = [k for k, v in identity.items() if old.get(k) != v]
    if differ:
        lines = "; ".join(f"{k}: was {old.get(k)}, now {identity[k]}" for k in differ[:5])
        raise ArtifactError(f"this run cannot go on from {path.name}", where=str(path), why=lines)


def load_trained(path: Path, trained: Trained) -> None:
    """Overwrite the adapter and the driver's state with those of a checkpoint; every tensor must be there."""
    extra = load_file(path / "optim.safetensors")
    if trained.raw:
        with torch.no_grad():
            for name, p in trained.named:
                p.copy_(extra[f"{RAW}{name}"])
    else:
        with trained.driver.whole():
            _load_adapter_tensors(path, trained)
    trained.driver.load_state({k.removeprefix(DRIVER): v for k, v in extra.items() if k.startswith(DRIVER)})


def _load_adapter_tensors(path: Path, trained: Trained) -> None:
    tensors = load_file(path / ADAPTER)
    result: Any = set_peft_model_state_dict(trained.model, tensors)
    absent = set(result.missing_keys)
    names: dict[int, set[str]] = defaultdict(set)  # a parameter that layers share is saved under one of its names
    for name, p in trained.model.named_parameters(remove_duplicate=False):
        names[id(p)].add(name)
    missing = [n for n, p in trained.named if names[id(p)] <= absent]
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
