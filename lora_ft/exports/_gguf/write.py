"""A model's tensors -> one GGUF file, one tensor in memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from lora_ft.artifact import Artifact
from lora_ft.exports.behind import write_behind
from lora_ft_adapters.weights import Weights

from .family import Family, family_of
from .vocabulary import write_vocabulary
from .writer import Writer

TYPES = {
    "float32": (GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
WHOLE = ("position_embd.weight", "token_types.weight", "rope_freqs.weight")  # llama.cpp reads these as float32 alone
ENDS = ("token_embd.weight", "output.weight")  # fewer than 8 bits cost more here than anywhere else


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name there, how it is written, its shape in torch's order, and how to make it."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_gguf(artifact: Artifact, path: Path) -> None:
    """The merged model of an artifact, with tokenizer and chat template."""
    config = artifact.subject.model.config.get_text_config()
    family = family_of(config)
    writer: Any = Writer(path, gguf.MODEL_ARCH_NAMES[family.arch])
    kind, file_type = TYPES[artifact.dtype]
    writer.add_type("model")
    writer.add_name(artifact.base.rsplit("/", 1)[-1])
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    family.parameters(writer, config)
    if artifact.subject.pooling:
        writer.add_pooling_type(gguf.PoolingType[artifact.subject.pooling.upper()])
    stops = artifact.generation.get("eos_token_id") or []
    stops = list(stops) if isinstance(stops, list | tuple) else [stops]
    write_vocabulary(writer, artifact.processor, artifact.folder, int(config.vocab_size), stops)
    entries = _entries(artifact, family, config, kind)
    for entry in entries:
        plain = entry.kind in _PLAIN
        shape = entry.shape if plain else quants.quant_shape_to_byte_shape(entry.shape, entry.kind)
        dtype: Any = _PLAIN[entry.kind] if plain else np.dtype(np.uint8)
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(entry.name, shape, dtype, size, None if plain else entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    made = ((math.prod(e.shape) * 4, partial(_stored, e)) for e in entries)
    write_behind(made, writer.write_tensor_data)
    writer.close()


_PLAIN = {GGMLQuantizationType.F32: np.dtype(np.float32), GGMLQuantizationType.F16: np.dtype(np.float16)}
_CAST = {
    GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}  # fmt: skip


def _entries(artifact: Artifact, family: Family, config: Any, kind: GGMLQuantizationType) -> list[Entry]:
    weights = artifact.merged()
    find = family.names(int(getattr(config, "num_hidden_layers", None) or config.n_layer))
    more = family.more(config)
    found = [Entry(name, GGMLQuantizationType.F32, tuple(t.shape), partial(_same, t)) for name, t in more]
    for name in weights:
        if family.leave_out(name):
            continue
        with torch.device("meta"):
            shape = tuple(family.change(name, torch.empty(weights.shape(name)), config).shape)
        place = find(name)
        make = partial(_changed, family, config, weights, name)
        found.append(Entry(place, _kind(place, shape, kind), shape, make))
    return found


def _changed(family: Family, config: Any, weights: Weights, name: str) -> Tensor:
    return family.change(name, weights[name], config)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _kind(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """How one tensor is written: vectors and norms whole, rows that blocks do not divide in 16 bits."""
    if len(shape) < 2 or name in WHOLE or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    if name in ENDS and block > 1 and size / block < 1:
        wanted = GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _stored(entry: Entry) -> Any:
    """The tensor as the file holds it."""
    tensor = entry.make().detach()
    if entry.kind in _CAST:  # what gguf does with numpy, to the last bit, many times faster
        cast = tensor.to(_CAST[entry.kind]).contiguous()
        return cast.numpy() if entry.kind in _PLAIN else cast.view(torch.uint8).numpy()
    return quants.quantize(tensor.float().contiguous().numpy(), entry.kind)
