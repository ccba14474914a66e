"""Publish the outcome of adapter algebra: written, read back by stock PEFT, compared, and only then renamed."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_ft import exports
from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError
from lora_ft.exports import PROBES_FILE
from lora_ft.exports.publish import differences
from lora_ft.report import public_name
from lora_ft_adapters import algebra, load_adapter

from .algebra_inputs import Input, as_artifact_error

EXACT = 1e-6  # a relative error below this is float32 rounding
LOGIT_LIMIT = 1e-3  # of an exact result, as for a float32 merge
PROBES, PROBE_LENGTH = 4, 16
COMPANIONS = (
    PROBES_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class NewAdapter:
    """An adapter that was written, read back and compared.

    Attributes:
        out: its folder.
        rank: the largest of its ranks.
        error: relative Frobenius error of its weight changes, all modules together.
        modules: name, rank and error of each module.
        parameters: numbers in its file.
        figures: outputs of the adapter that was read back against those it should give.
        losses: held-out loss (of the whole adapter, of the new one) where a guard was asked for.
        notes: what a user should know.
    """

    out: Path
    rank: int
    error: float
    modules: tuple[algebra.ModuleError, ...]
    parameters: int
    figures: Mapping[str, float]
    losses: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """All of it for JSON."""
        modules = [{"name": m.name, "rank": m.rank, "error": m.error} for m in self.modules]
        losses = dict(zip(("loss_whole", "loss_new"), self.losses, strict=True)) if self.losses else {}
        return {
            "out": str(self.out), "rank": self.rank, "error": self.error, "parameters": self.parameters,
            **self.figures, **losses, "notes": list(self.notes), "modules": modules,
        }  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What is to be published: the result, the base, the model it should be like, and where companions are from."""

    base: Any
    expected: Any
    result: algebra.LoraResult
    first: Input
    task_type: str | None


def publish(work: Work, target: Path, what: str, losses: tuple[float, float] | None = None) -> NewAdapter:
    """Write, read back under another name, compare with the expected outputs and weights, and only then rename."""
    result = work.result
    probes = _probes(work)
    notes = _notes(result)
    task = work.first.task
    artifact = Artifact(
        subject=Subject(task.name, task.auto_class, "lora", None, None), folder=work.first.folder, processor=None,
        base=public_name(work.first.base), outputs=task.outputs, dtype="", generation={}, merged=_unused,
        unmerged=_unused, load_base=lambda: algebra.share(work.base), load_adapted=_unused, inputs={},
        read_model=_unused,
    )  # fmt: skip

    def finish(folder: Path, figures: Mapping[str, float]) -> None:
        for name in COMPANIONS:
            if (work.first.folder / name).is_file():
                shutil.copyfile(work.first.folder / name, folder / name)
        (folder / "README.md").write_text(_card(what, artifact.base, result, figures), encoding="utf-8")

    figures = exports.publish(artifact, target, _PlainLora(result, work.task_type), probes, finish)
    return NewAdapter(target, result.rank, result.error, result.modules, result.parameters, figures, losses, notes)


def _unused(*_: Any) -> Any:
    raise NotImplementedError("a plain LoRA is written from its factors alone")


class _PlainLora:
    """How a result is written and verified."""

    def __init__(self, result: algebra.LoraResult, task_type: str | None) -> None:
        self.result, self.task_type = result, task_type

    def write(self, artifact: Artifact, folder: Path) -> None:
        """The two files of an adapter; its config names the base as the recipe does."""
        with as_artifact_error():
            config = self.result.config(artifact.load_base(), base_name=artifact.base, task_type=self.task_type)
            self.result.write(folder, config)

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """Stock PEFT reads it under another name; its weights must be the result's, its outputs the expected ones."""
        with as_artifact_error():
            again = load_adapter(artifact.load_base(), folder, "read_back")
            off = self.result.difference(algebra.AdapterDeltas(again, "read_back"))
        figures = differences(again, probes, artifact.outputs)
        if off > EXACT or (self.result.error < EXACT and figures["max_difference"] > LOGIT_LIMIT):
            raise ArtifactError(
                f"the adapter read back differs: its weights by {off:.0e}, its logits by "
                f"{figures['max_difference']:.1e} (allowed {LOGIT_LIMIT:.0e} for an exact result)",
                where=str(folder),
            )
        return figures


def _probes(work: Work) -> list[Probe]:
    """The first input's own probe inputs, or seeded token ids, with the outputs of the base and the expected ones."""
    device = next(work.base.parameters()).device
    probes = []
    with torch.inference_mode():
        for inputs in work.first.probes() or _made_up(work.base):
            tensors = {k: torch.as_tensor(v).to(device) for k, v in inputs.items()}
            before, after = (work.first.task.outputs(m, tensors).float().cpu() for m in (work.base, work.expected))
            probes.append(Probe({k: v.cpu() for k, v in tensors.items()}, before, after))
    if not all(bool(p.adapted.isfinite().all()) for p in probes):
        raise ArtifactError("the new adapter would give NaN or infinite outputs")
    return probes


def _made_up(model: Any) -> list[dict[str, list[list[int]]]]:
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (PROBES, PROBE_LENGTH), generator=generator).tolist()
    return [{"input_ids": [i]} for i in ids]


def _notes(result: algebra.LoraResult) -> tuple[str, ...]:
    notes = []
    if result.saved:
        notes.append(f"{len(result.saved)} modules are replaced as a whole, for example {next(iter(result.saved))}")
    if result.unmergeable:
        notes.append(
            f"{len(result.unmergeable)} layers without a bias of their own get one of zeros "
            f"({result.unmergeable[0]}): the adapter works, but PEFT cannot merge it"
        )
    return tuple(notes)


def _card(what: str, base: str, result: algebra.LoraResult, figures: Mapping[str, float]) -> str:
    """A model card without any path of this machine."""
    worst = max(result.modules, key=lambda m: m.error, default=None)
    lines = [
        "---", "library_name: peft", "tags: [lora-ft, lora]", "---", "", f"# LoRA for {base}", "",
        f"Made by lora-ft: {what}.", "",
        f"- {len(result.modules)} modules, rank up to {result.rank}, {result.parameters:,} numbers",
        f"- relative error of the weight changes: {result.error:.1e}"
        + (f", at most {worst.error:.1e} ({worst.name})" if worst else ""),
        f"- read back and compared: largest logit difference {figures['max_difference']:.1e}, "
        f"same first choice at {figures['top1_agreement']:.1%} of positions",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
