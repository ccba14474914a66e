"""The merged model as an ONNX graph (torch.onnx, dynamo) with a processor's files, checked in onnxruntime."""

import importlib.util
import inspect
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports._onnx import EMBEDDING, Graph, Session, example, export
from lora_ft.exports.mergeable import check_mergeable
from lora_ft.records import Batch
from lora_ft.registry import EXPORTS

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOGETHER = 4  # probes in the batch that is compared with each of them alone
LIMIT = {"float32": 1e-3, "float16": 5e-2}  # of an output, where it stands beside others; of the largest output
TWO_PARTS = "its encoder runs once and its decoder for each token, which are two graphs"
REFUSED = {
    "AutoModelForSeq2SeqLM": TWO_PARTS,
    "AutoModelForSpeechSeq2Seq": TWO_PARTS,
    "AutoModelForImageTextToText": "where its images go depends on the tokens, which a graph cannot follow",
}


class OnnxFormat:
    """One graph from the processor's tensors to the task's outputs by their usual names."""

    name = "onnx"
    description = "The merged model as an ONNX graph, any batch size and text length; decoders give logits, no cache."
    full_precision = True
    dtypes: tuple[str, ...] = ("float32", "float16")
    targets: tuple[str, ...] = ("onnx", "onnxruntime")

    def default_dtype(self, stored: str) -> str:
        """float32, which onnxruntime computes in on every machine."""
        return "float32"

    def check(self, subject: Subject) -> None:
        """A model of one graph, a method that merges, and the packages."""
        missing = [p for p in PACKAGES if importlib.util.find_spec(p) is None]
        if missing:
            raise UsageError(f"the format onnx needs {', '.join(missing)}", fix="pip install 'lora-ft[onnx]'")
        kind = subject.auto_class
        if kind is None:
            raise UsageError("a model that a function builds is not exported to ONNX", fix="--format merged")
        if kind in REFUSED:
            raise UsageError(
                f"a {subject.task} model is not exported to ONNX", why=REFUSED[kind], fix="--format merged"
            )
        check_mergeable(subject)

    def write(self, artifact: Artifact, folder: Path) -> None:
        """Merge into a folder that goes again, load that with Transformers, trace it."""
        with tempfile.TemporaryDirectory(dir=folder.parent) as held:
            EXPORTS.get("merged").write(artifact, Path(held))
            model = _load(held, str(artifact.subject.auto_class), artifact.dtype)
            for path in Path(held).iterdir():
                if not path.name.endswith((".safetensors", ".safetensors.index.json")):
                    shutil.move(path, folder / path.name)
            if hasattr(model.config, "use_cache"):
                model.config.use_cache = False
            batch = example(artifact.inputs, inspect.signature(model.forward).parameters)
            export(Graph(model, batch, artifact.outputs), batch, folder / FILE)

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """As a merged model, read by onnxruntime; then several probes in one batch against each alone."""
        session = Session(folder / FILE, artifact.subject.model.config)
        fixed = [n for n, shape in session.inputs.items() if isinstance(shape[0], int)]
        if fixed:
            raise ArtifactError(f"the graph takes one size of batch alone ({fixed[0]})", where=FILE)
        pooled = EMBEDDING in session.outputs
        outputs = _embedding if pooled else artifact.outputs
        read_back = replace(artifact, outputs=outputs, read_model=lambda _: session)
        figures = EXPORTS.get("merged").verify(read_back, folder, probes)
        off = _apart(session, read_back, probes[:TOGETHER])
        if not off <= LIMIT[artifact.dtype]:
            raise ArtifactError(f"rows of a batch differ by {off:.1e} from the same rows alone", where=FILE)
        return figures


def _load(folder: str, auto_class: str, dtype: str) -> torch.nn.Module:
    remarks: Any = transformers.logging
    shows = remarks.is_progress_bar_enabled()
    remarks.disable_progress_bar()
    try:
        model: torch.nn.Module = getattr(transformers, auto_class).from_pretrained(folder, dtype=getattr(torch, dtype))
    finally:
        if shows:
            remarks.enable_progress_bar()
    return model.eval()


def _embedding(model: Session, batch: Batch) -> Tensor:
    found: Tensor = model(**batch)[EMBEDDING]
    return found


def _apart(session: Session, artifact: Artifact, probes: Sequence[Probe]) -> float:
    """Largest difference of an output in a batch from the same row alone, of the largest output or 1."""
    pad = getattr(session.config, "pad_token_id", None) or 0
    same = [p for p in probes if "input_ids" in p.inputs or _shapes(p) == _shapes(probes[0])]
    if len(same) == 1:
        same *= 2
    alone = [artifact.outputs(session, dict(p.inputs)) for p in same]
    batch = {k: _stacked([p.inputs[k] for p in same], pad if k == "input_ids" else 0) for k in same[0].inputs}
    if "input_ids" in batch and "attention_mask" not in batch:
        lengths = [p.inputs["input_ids"] for p in same]
        batch["attention_mask"] = _stacked([torch.ones_like(x) for x in lengths], 0)
    together = artifact.outputs(session, batch)
    largest, off = 1.0, 0.0
    for row, one in zip(together, alone, strict=True):
        there = row[tuple(slice(0, n) for n in one[0].shape)]
        largest = max(largest, float(one.abs().max()))
        off = max(off, float((there - one[0]).abs().max()))
    return off / largest


def _shapes(probe: Probe) -> list[torch.Size]:
    return [v.shape for v in probe.inputs.values()]


def _stacked(rows: Sequence[Tensor], fill: int) -> Tensor:
    """Batches of one as one batch, filled up on the right."""
    shape = [max(sizes) for sizes in zip(*(r.shape[1:] for r in rows), strict=True)]
    out = rows[0].new_full((len(rows), *shape), fill)
    for place, row in zip(out, rows, strict=True):
        place[tuple(slice(0, n) for n in row.shape[1:])] = row[0]
    return out


EXPORTS.register(OnnxFormat())
