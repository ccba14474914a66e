"""The merged model as ONNX (torch.onnx, dynamo), with axes that may change, checked in onnxruntime."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports.mergeable import check_mergeable
from lora_ft.exports.publish import differences
from lora_ft.registry import EXPORTS

FILE = "model.onnx"
OUTPUT = "logits"
OPSET = 20
LIMIT = 1e-3  # of a logit
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Two inputs, or a loop of its own: what the exporter makes of them cannot be compared in one pass.
NOT_YET = {
    "AutoModelForSeq2SeqLM": "it runs an encoder once and a decoder for each token, which are two graphs",
    "AutoModelForSpeechSeq2Seq": "it runs an encoder once and a decoder for each token, which are two graphs",
    "AutoModelForObjectDetection": "its boxes and classes are two outputs, which are not compared here",
    "AutoModelForImageTextToText": "its images enter at places that the text decides",
}
TEXT = ("input_ids", "attention_mask", "token_type_ids")


class OnnxFormat:
    """One graph from the processor's tensors to the logits, in float32."""

    name = "onnx"
    description = "The merged model as an ONNX graph from a processor's tensors to logits; decoders without cache."
    full_precision = True
    dtypes: tuple[str, ...] = ("float32",)
    targets: tuple[str, ...] = ("onnx", "onnxruntime")

    def default_dtype(self, stored: str) -> str:
        """float32: onnxruntime on a CPU computes nothing else for all operators."""
        return "float32"

    def check(self, subject: Subject) -> None:
        """The packages, a model of one graph, and a method that merges."""
        lacking = [p for p in PACKAGES if importlib.util.find_spec(p) is None]
        if lacking:
            raise UsageError(f"--format onnx needs {', '.join(lacking)}", fix="pip install 'lora-ft[onnx]'")
        if subject.auto_class is None:
            raise UsageError("a model that a function builds is not exported to ONNX", fix="--format merged")
        if subject.auto_class in NOT_YET:
            raise UsageError(
                f"a {subject.task} model is not exported to ONNX",
                why=NOT_YET[subject.auto_class],
                fix="--format merged",
            )
        check_mergeable(subject)

    def write(self, artifact: Artifact, folder: Path) -> None:
        """Merge into a temporary folder, read that, trace it on the probes' kind of input."""
        with TemporaryDirectory(dir=folder.parent) as held:
            merged = Path(held)
            EXPORTS.get("merged").write(artifact, merged)
            kind = getattr(transformers, str(artifact.subject.auto_class))
            model = kind.from_pretrained(held, dtype=torch.float32, attn_implementation="eager").eval()
            for path in merged.iterdir():
                if path.suffix != ".safetensors" and "index" not in path.name:
                    (folder / path.name).write_bytes(path.read_bytes())
        _export(_Graph(model, artifact), artifact.inputs, folder / FILE)

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """onnxruntime on each probe, and on two of them in one batch."""
        session = _Session(folder / FILE)
        figures = differences(session, probes, artifact.outputs)
        if not figures["max_difference"] <= LIMIT * max(1.0, *(float(p.adapted.abs().max()) for p in probes)):
            raise ArtifactError(
                f"the ONNX graph differs from the adapter on its base by {figures['max_difference']:.1e} in a logit "
                f"(allowed {LIMIT:.0e} of the largest)",
                where=FILE,
            )
        one = probes[0]
        twice = session(**{k: torch.cat([v, v]) for k, v in one.inputs.items()}).logits
        if twice.shape[0] != 2 * one.adapted.shape[0]:
            raise ArtifactError("the ONNX graph takes batches of one alone", where=FILE)
        return figures


class _Answer(dict[str, Tensor]):
    """What a model of Transformers returns, as far as tasks read it."""

    @property
    def logits(self) -> Tensor:
        return self[OUTPUT]


class _Graph(nn.Module):
    """The model with the answer that artifacts are compared by as its one output."""

    def __init__(self, model: Any, artifact: Artifact) -> None:
        super().__init__()
        self.model, self.outputs, self.names = model, artifact.outputs, tuple(artifact.inputs)

    def forward(self, *values: Tensor) -> Tensor:
        return self.outputs(self.model, dict(zip(self.names, values, strict=True)))


class _Session(nn.Module):
    """An ONNX file that answers as a model does."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # says which device its tensors are on

    def forward(self, **inputs: Any) -> _Answer:
        known = {i.name for i in self.session.get_inputs()}
        given = {k: np.ascontiguousarray(v.numpy()) for k, v in inputs.items() if k in known}
        return _Answer({OUTPUT: torch.from_numpy(self.session.run([OUTPUT], given)[0])})


def _export(graph: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    batch = {k: torch.cat([v, v]) for k, v in inputs.items()}
    axes = {name: _axes(name, value) for name, value in batch.items()}
    chatter = io.StringIO()
    level = logging.getLogger("torch.onnx").level
    try:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(chatter), redirect_stderr(chatter), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about its own internals
            program = torch.onnx.export(
                graph, tuple(batch.values()), dynamo=True, opset_version=OPSET, verbose=False,
                dynamic_shapes={"values": tuple(axes[name] for name in batch)}, input_names=list(batch),
                output_names=[OUTPUT],
            )  # fmt: skip
            assert program is not None
            program.save(str(path))
    except Exception as error:  # the exporter raises what it likes
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtifactError(
            f"torch.onnx cannot export this model: {type(error).__name__}: {first[:200]}", fix="--format merged"
        ) from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _axes(name: str, value: Tensor) -> dict[int, Any]:
    """The axes that may change: batch, and the length of text or sound; images keep the processor's size."""
    axes: dict[int, Any] = {0: "batch"}
    if name in TEXT or (value.dim() == 2 and name != "labels"):
        axes[1] = "length"
    return {axis: torch.export.Dim(kind) for axis, kind in axes.items()} if axes else {}


EXPORTS.register(OnnxFormat())
