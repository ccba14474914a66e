"""Write a model's tensors as safetensors files of a limited size, one tensor in memory."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_ft_adapters.weights import DTYPES, Weights

from .behind import write_behind

SHARD_BYTES = 5 * 10**9
NAMES = {v: k for k, v in DTYPES.items()}
ALIGNMENT = 8  # the header is padded to it, as the format asks


def write_shards(
    folder: Path, weights: Weights, dtype: torch.dtype | None, *, shard_bytes: int = SHARD_BYTES
) -> dict[str, torch.dtype]:
    """Write all tensors, floating point ones in `dtype`, in Transformers' layout: one file, or several and an index.

    Args:
        folder: existing.
        weights: read once, in the order of the files.
        dtype: None keeps each one's own.
        shard_bytes: most bytes of tensors in a file, unless a single one is larger.

    Returns:
        The dtype that each tensor was written in.
    """
    dtypes = {n: _written(weights.dtype(n), dtype) for n in weights}
    sizes = {n: weights.numbers(n) * dtypes[n].itemsize for n in weights}
    shards = list(_shards(sizes, shard_bytes))
    homes: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        homes |= dict.fromkeys(names, file)
        write_file(folder / file, names, {n: (dtypes[n], weights.shape(n)) for n in names}, weights.__getitem__)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": homes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return dtypes


def _written(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def _shards(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def write_file(
    path: Path, names: Sequence[str], like: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    get: Callable[[str], Tensor],
) -> None:  # fmt: skip
    """One safetensors file; its header comes first, so dtypes and shapes must be known before the tensors are.

    Raises:
        ValueError: a tensor has another shape than was said.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = like[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb", buffering=0) as file:
        _write(file.write, len(text).to_bytes(8, "little") + text)
        sizes = {n: torch.Size(shape).numel() * dtype.itemsize for n, (dtype, shape) in like.items()}
        write_behind(((sizes[n], partial(_bytes, n, *like[n], get)) for n in names), partial(_write, file.write))


def _bytes(name: str, dtype: torch.dtype, shape: tuple[int, ...], get: Callable[[str], Tensor]) -> memoryview:
    tensor = get(name)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
    held: memoryview = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return held


def _write(write: Callable[[memoryview], int | None], data: bytes | memoryview) -> None:
    """All of it: an unbuffered file takes at most 2 GiB at once."""
    view = memoryview(data)
    while view:
        view = view[write(view) or 0 :]
