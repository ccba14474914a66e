"""What the adapter and its base answered at the end of training: every later copy is held against it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_ft.artifact import Probe
from lora_ft.errors import ArtifactError
from lora_ft.records import Batch

from .probe_file import FACTS_FILE, GOLDEN_FILE

ROWS, COLUMNS = 16, 256  # of an output that are kept; all of them where there are at most 16 and 512
SEALED = ("adapter_model.safetensors", "adapter_config.json")
# Largest difference relative to the largest number, and share of the adapter's effect; both must be passed to fail.
# Measured on SmolLM2 in bfloat16: 0 on one machine, 0.033 and 0.031 between CPUs with and without AVX-512 (oneDNN's
# ONEDNN_MAX_CPU_ISA=AVX2) or bfloat16 products. float16 has three more bits.
SAME = {"float32": (1e-4, 5e-4), "bfloat16": (5e-2, 0.1), "float16": (1e-2, 0.03)}
NOISE = 2.5  # measured: 1.1 between float32 and bfloat16; a halved scaling is at 3 or more
OTHER = (5e-2, 0.5)
MOST = 0.2  # relative to the largest number; further off than this no rounding to 16 bits is


class Form(Enum):
    """What a model has in common with that of training."""

    SAME = "dtype, quantisation and kind of device"
    ROUNDED = "quantisation"
    REQUANTISED = "nothing"


def write_golden(folder: Path, probes: Sequence[Probe], facts: Mapping[str, Any]) -> None:
    """Write the answers, reduced to some rows and columns, and what belongs to them.

    Args:
        folder: with the adapter's files.
        probes: inputs and answers.
        facts: of the run: dtype, quant, fingerprint, norms.
    """
    tensors: dict[str, Tensor] = {}
    for i, probe in enumerate(probes):
        rows, columns = _places(probe.adapted)
        tensors[f"{i}.rows"] = rows
        if columns is not None:
            tensors[f"{i}.columns"] = columns
        for side, output in (("base", probe.base), ("adapted", probe.adapted)):
            tensors[f"{i}.{side}"], tensors[f"{i}.{side}_sum"] = _reduced(output, rows, columns)
    save_file(tensors, folder / GOLDEN_FILE)
    told = {
        **facts,
        "inputs": [inputs_hash(p.inputs) for p in probes],
        "sha256": {name: file_hash(folder / name) for name in SEALED},
    }
    (folder / FACTS_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """What was written beside the answers; {} for an adapter without any."""
    path = folder / FACTS_FILE
    if not path.exists() and not (folder / GOLDEN_FILE).exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError("the adapter's record of its probes is missing or unreadable", where=str(path)) from error
    if not isinstance(found, dict):
        raise ArtifactError("the adapter's record of its probes is not a JSON object", where=str(path))
    return found


def check_files(folder: Path) -> None:
    """Refuse an adapter whose files are not those that training wrote."""
    for name, wanted in read_facts(folder).get("sha256", {}).items():
        path = folder / name
        if not path.is_file() or file_hash(path) != wanted:
            raise ArtifactError(
                f"{name} is not the file that training wrote",
                where=str(path),
                why="it is damaged, or was changed by hand",
                fix="copy the run's adapter folder again; to change an adapter: lora-ft combine, compress or convert",
            )


def check_template(folder: Path, processor: Any) -> None:
    """Refuse a chat template or special tokens that are not those of training."""
    wanted = read_facts(folder).get("template")
    if wanted is not None and wanted != template_hash(processor):
        raise ArtifactError(
            "the tokenizer's chat template or special tokens are not those of training",
            where=str(folder),
            fix="put the run's own tokenizer files back",
        )


def check_golden(folder: Path, probes: Sequence[Probe], form: Form) -> dict[str, float]:
    """Hold answers against those at the end of training.

    Args:
        folder: the adapter's.
        probes: the same inputs, with the answers of now.
        form: of the model that gave them.

    Returns:
        golden_difference: largest difference of the adapter's answers, relative to the largest number; golden_kl: mean
        Kullback-Leibler divergence (nats), what is not kept in one lump; golden_top1: share of equal first choices.

    Raises:
        ArtifactError: the base or the adapter answers otherwise.
    """
    facts = read_facts(folder)
    if not facts or not probes:
        return {}
    golden = _read(folder)
    found: dict[str, list[float]] = {"difference": [], "kl": [], "top1": []}
    for i, probe in enumerate(probes):
        rows, columns = golden[f"{i}.rows"], golden.get(f"{i}.columns")
        effect = float((golden[f"{i}.adapted"] - golden[f"{i}.base"]).norm())
        limits = _limits(str(facts.get("dtype")), form)
        for side, output in (("base", probe.base), ("adapted", probe.adapted)):
            wanted = golden[f"{i}.{side}"]
            got, total = _reduced(output, rows, columns)
            if got.shape != wanted.shape:
                raise ArtifactError(
                    f"outputs have shape {tuple(got.shape)}, at the end of training {tuple(wanted.shape)}"
                )
            difference, lost = _distance(got, wanted, effect)
            fresh = side == "base" and not bool(output.any())  # a head that only the adapter has answers nothing here
            if not fresh and not limits.hold(difference, lost):
                raise _differs(side, difference, lost, folder)
            if side == "base" and form is not Form.SAME and not fresh:
                limits = limits.after(difference, lost)
            if side == "adapted":
                found["difference"].append(difference)
                found["kl"].append(_kl(wanted, golden[f"{i}.adapted_sum"], got, total))
                found["top1"].append(float((wanted.argmax(-1) == got.argmax(-1)).float().mean()))
    return {
        "golden_difference": max(found["difference"]),
        "golden_kl": sum(found["kl"]) / len(found["kl"]),
        "golden_top1": sum(found["top1"]) / len(found["top1"]),
    }


@dataclass(frozen=True)
class _Limits:
    """Largest difference, share of the adapter's effect, and the difference that is too large whatever the effect."""

    difference: float
    lost: float
    most: float

    def hold(self, difference: float, lost: float) -> bool:
        return difference <= self.most and (difference <= self.difference or lost <= self.lost)

    def after(self, difference: float, lost: float) -> "_Limits":
        """The base's own rounding says what the adapter's may be."""
        return replace(self, difference=max(1e-3, NOISE * difference), lost=max(0.02, NOISE * lost))


def _limits(dtype: str, form: Form) -> _Limits:
    if form is Form.REQUANTISED:  # its files tell whether it is the base; the adapter's answers are bounded by its own
        return _Limits(float("inf"), float("inf"), float("inf"))
    return _Limits(*(SAME.get(dtype, OTHER) if form is Form.SAME else OTHER), MOST)


def _distance(got: Tensor, wanted: Tensor, effect: float) -> tuple[float, float]:
    """(relative to the largest number, relative to the adapter's effect)."""
    scale = max(1.0, float(wanted.abs().max()))
    off = float((got - wanted).norm())
    return float((got - wanted).abs().max()) / scale, off / effect if effect else (0.0 if off == 0 else float("inf"))


def _differs(side: str, difference: float, lost: float, folder: Path) -> ArtifactError:
    cause = {
        "base": "the base is not the one of training, or its files were changed",
        "adapted": "the adapter is not the one of training, or was put on otherwise",
    }
    who = {"base": "the base alone", "adapted": "the adapter on its base"}
    return ArtifactError(
        f"{who[side]} answers otherwise than at the end of training: by {difference:.1e} of the largest number, "
        f"{lost:.0%} of the adapter's effect",
        where=str(folder),
        why=cause[side],
    )


def _places(output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which rows of an output are kept, and which columns of each: the largest."""
    flat = output.reshape(-1, output.shape[-1]) if output.dim() else output.reshape(1, 1)
    count = min(ROWS, flat.shape[0])
    rows = torch.arange(count) * (flat.shape[0] - 1) // max(1, count - 1)
    if flat.shape[1] <= 2 * COLUMNS:
        return rows, None
    return rows, flat[rows].topk(COLUMNS, dim=-1).indices.sort(dim=-1).values


def _reduced(output: Tensor, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """(kept numbers (rows, columns), log of the sum of exponentials of each whole row)."""
    flat = (output.reshape(-1, output.shape[-1]) if output.dim() else output.reshape(1, 1)).float()
    if int(rows.max()) >= flat.shape[0] or (columns is not None and int(columns.max()) >= flat.shape[1]):
        raise ArtifactError(f"outputs have shape {tuple(output.shape)}, smaller than at the end of training")
    kept = flat[rows]
    total = kept.logsumexp(-1)
    return (kept if columns is None else kept.gather(-1, columns)).contiguous(), total.contiguous()


def _kl(wanted: Tensor, wanted_sum: Tensor, got: Tensor, got_sum: Tensor) -> float:
    """Mean over rows; numbers that were not kept count as one."""
    p, q = ((x - s[:, None]).double().exp() for x, s in ((wanted, wanted_sum), (got, got_sum)))
    p, q = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp(min=1e-12)], -1) for x in (p, q))
    return float((p * (p.clamp(min=1e-30) / q.clamp(min=1e-30)).log()).sum(-1).mean())


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(folder / GOLDEN_FILE)
    except (OSError, SafetensorError) as error:
        where = str(folder / GOLDEN_FILE)
        raise ArtifactError("the adapter's record of its answers is missing or unreadable", where=where) from error
    return found


def inputs_hash(inputs: Batch | Mapping[str, Any]) -> str:
    """SHA-256 of one probe's inputs."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        tensor = torch.as_tensor(inputs[name]).cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def template_hash(processor: Any) -> str:
    """Of the chat template and the special tokens."""
    tokenizer = getattr(processor, "tokenizer", processor)
    special = {k: str(v) for k, v in (getattr(tokenizer, "special_tokens_map", None) or {}).items()}
    text = json.dumps([getattr(processor, "chat_template", None), special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
