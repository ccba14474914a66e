"""A model as an ONNX graph with named inputs and axes, and an ONNX file that answers as a model does."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from lora_ft.errors import ArtifactError
from lora_ft.records import Batch

Answer = Callable[[Any, Batch], Tensor]
HEADS = ("logits", "start_logits", "end_logits", "pred_boxes")
EMBEDDING = "sentence_embedding"  # as sentence-transformers calls it
SAID: Any = ModelOutput  # Transformers leaves it without types
TEXT = ("input_ids", "attention_mask", "token_type_ids")
LENGTH = 12  # tokens in the traced text: a size of 1, or that of the batch, would be taken for a constant


class Graph(nn.Module):
    """The outputs of a model that users read, in float32, from its inputs in order.

    Args:
        model: from Transformers.
        inputs: an example of what it takes.
        answer: the task's `outputs`: a model without a head gives this, beside its hidden states.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], answer: Answer) -> None:
        super().__init__()
        self.model, self.answer, self.inputs = model, answer, tuple(inputs)
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        with torch.inference_mode():
            self.names = tuple(self._outputs(*inputs.values()))

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """In the order of `names`."""
        return tuple(self._outputs(*values).values())

    def _outputs(self, *values: Tensor) -> dict[str, Tensor]:
        batch = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in zip(self.inputs, values, strict=True)}
        answer = self.model(**batch)
        found = {k: answer[k].float() for k in HEADS if k in answer}
        if not found:
            hidden = answer.last_hidden_state.float()
            embedding = self.answer(_Said(SAID(last_hidden_state=hidden)), batch)
            found = {"last_hidden_state": hidden, EMBEDDING: embedding.float()}
        return found


class _Said(nn.Module):
    """A model that has answered already."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.said = answer

    def forward(self, **inputs: Tensor) -> Any:
        return self.said


class Session(nn.Module):
    """An ONNX file in onnxruntime; takes and gives what the model in Transformers does.

    Args:
        path: the file.
        config: of that model.

    Raises:
        ArtifactError: onnxruntime cannot read it.
    """

    def __init__(self, path: Path, config: Any) -> None:
        super().__init__()
        self.config = config
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class
            raise ArtifactError(f"onnxruntime cannot read the graph: {_first_line(error)}", where=path.name) from error
        self.inputs = {i.name: i.shape for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # says device and dtype of what it takes

    def forward(self, **given: Tensor) -> Any:
        """Its outputs by name; a mask or token types that were not given are made."""
        batch = full_inputs(given, self.inputs)
        try:
            found = self.session.run(self.outputs, {k: batch[k].contiguous().numpy() for k in self.inputs})
        except Exception as error:  # its errors share no class
            shapes = {k: tuple(v.shape) for k, v in batch.items()}
            raise ArtifactError(f"onnxruntime fails on inputs of shape {shapes}: {_first_line(error)}") from error
        return SAID({k: torch.from_numpy(v) for k, v in zip(self.outputs, found, strict=True)})


def full_inputs(given: Mapping[str, Tensor], names: Any) -> Batch:
    """Those of `names`; masks that are missing are all ones, and token types 0."""
    batch = dict(given)
    if "input_ids" in batch:
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        batch.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
    if "pixel_values" in batch:
        pixels = batch["pixel_values"]
        batch.setdefault("pixel_mask", pixels.new_ones(pixels.shape[:1] + pixels.shape[-2:], dtype=torch.long))
    return {k: batch[k] for k in names}


def example(inputs: Mapping[str, Tensor], names: Any) -> Batch:
    """Two rows of a probe, of which the second has padding, to trace a model with.

    Args:
        inputs: a batch of one.
        names: what the model takes.
    """
    written = "input_ids" in inputs
    batch = full_inputs(inputs, [n for n in names if n in inputs or (written and n == "attention_mask")])
    for name in TEXT if written else ():
        if name in batch and batch[name].shape[-1] < LENGTH:
            times = -(-LENGTH // batch[name].shape[-1])
            batch[name] = batch[name].repeat(*[1] * (batch[name].dim() - 1), times)
    batch = {k: torch.cat([v, v]) for k, v in batch.items()}
    if written and "attention_mask" in batch:
        batch["attention_mask"][1, ..., -2:] = 0
    return batch


def axes(name: str, value: Tensor) -> dict[int, Any]:
    """The axes that may change; where AUTO stands, torch keeps those fixed that the model cannot have otherwise."""
    auto = torch.export.Dim.AUTO
    if name in TEXT and value.dim() == 3:
        return {0: "batch", 1: "choices", 2: "sequence"}
    if value.dim() == 2:  # text, sound and their masks
        return {0: "batch", 1: "sequence"}
    images = name in ("pixel_values", "pixel_mask")
    return {0: "batch"} | dict.fromkeys(range(value.dim() - 2, value.dim()) if images else (1,), auto)


def export(graph: Graph, batch: Batch, path: Path) -> None:
    """Write a graph; weights of more than 2 GB go to a file beside it.

    Raises:
        ArtifactError: the exporter cannot.
    """
    shapes = (tuple(axes(k, v) for k, v in batch.items()),)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph, tuple(batch.values()), dynamo=True, verbose=False, input_names=list(batch),
                output_names=list(graph.names), dynamic_shapes=shapes,
            )  # fmt: skip
        except Exception as error:  # ours, of torch.export, or of any pass in between
            reason = f"{type(error).__name__}: {_first_line(error)}"
            fix = "lora-ft export --format merged, and its own exporter where the model has one"
            raise ArtifactError(f"torch.onnx cannot export this model: {reason}", fix=fix) from error
        if program is None:
            raise ArtifactError("torch.onnx gave no graph for this model")
        program.save(str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks on its own passes kept from the terminal; what it wrote is judged afterwards."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    chatter = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    """Of the error that was first: the exporter wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
