"""Base models read from their files tensor by tensor, under the names of the model's own modules."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from lora_ft.errors import ArtifactError
from lora_ft_adapters import AdapterError
from lora_ft_adapters.hollow import hollow_out, lend
from lora_ft_adapters.modules import embedding_ends
from lora_ft_adapters.weights import TensorFolder, Weights

from .file_names import model_names
from .fingerprint import fingerprint_of_files
from .load import grow_embeddings, local_folder
from .opening import BaseSpec


class NotStreamable(Exception):
    """This model's files do not hold its modules' tensors one by one; says why."""


class BaseWeights(Weights):
    """A base's tensors by the names of the model's state; new rows of a grown embedding are the mean of the old ones.

    Args:
        files: the base's files.
        model: its modules; any device.
        fresh: modules that the files may lack; their tensors are left out then.

    Raises:
        NotStreamable: a tensor of the model is in no file, or has another shape there.
    """

    def __init__(self, files: Weights, model: nn.Module, fresh: tuple[str, ...] = ()) -> None:
        self._files, self._names = files, model_names(model, files)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ends = {id(m.weight) for m in embedding_ends(model) if m is not None and hasattr(m, "weight")}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            try:
                self._check(name, tensor)
            except NotStreamable:
                if any(name.startswith(f"{f}.") or f".{f}." in f".{name}" for f in fresh):
                    continue
                raise
            self._shapes[name] = tuple(tensor.shape)

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self._names:
            raise NotStreamable(f"{name} is not in its files, or in another form")
        old, new = self._files.shape(self._names[name][0]), tuple(tensor.shape)
        grown = id(tensor) in self._ends and old[1:] == new[1:] and old[0] < new[0]
        if old != new and not grown:
            raise NotStreamable(f"{name} has shape {old} in the files and {new} in the model")

    def ungrown(self) -> "BaseWeights":
        """The same without new rows."""
        same = copy.copy(self)
        same._shapes = {n: self._files.shape(self._names[n][0]) for n in self._shapes}
        return same

    def saved_name(self, name: str) -> str:
        """What a saved model calls a tensor of the model: as its files do, unless they are of a bare encoder."""
        key, same = self._names.get(name, (name, True))
        return key if same else name

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._files[self._names[name][0]]
        more = self._shapes[name][0] - tensor.shape[0] if tensor.dim() else 0
        if not more:
            return tensor
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(more, *mean.shape[1:])])

    def values_at(self, name: str, index: Tensor) -> Tensor:
        """Read from their places alone, where the tensor is as it is in the file."""
        key = self._names[name][0]
        same = self._files.shape(key) == self._shapes[name]
        return self._files.values_at(key, index) if same else super().values_at(name, index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, as the model has it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, in its file."""
        return self._files.dtype(self._names[name][0])


class SavedWeights(Weights):
    """Weights under the names that a saved model has."""

    def __init__(self, weights: Weights, base: BaseWeights) -> None:
        self._weights, self._names = weights, {base.saved_name(n): n for n in weights}

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._weights.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self._weights.dtype(self._names[name])


def hollow_base(spec: BaseSpec, tokens: int = 0, fresh: tuple[str, ...] = ()) -> tuple[Any, BaseWeights]:
    """The base's modules with hollow parameters and real buffers, and the weights to fill them with.

    Args:
        spec: which base; of Transformers.
        tokens: rows that its embeddings must have at least.
        fresh: modules that its files may lack.

    Raises:
        NotStreamable: its files hold its tensors in another form.
    """
    if spec.auto_class is None:
        raise NotStreamable("a function builds it")
    folder = local_folder(spec.source)
    with ExitStack() as stack:
        from accelerate import init_empty_weights

        stack.enter_context(init_empty_weights(include_buffers=False))
        stack.enter_context(initialization.no_init_weights())
        model: Any = spec.skeleton(device=None)
    files = TensorFolder(folder)
    model.tie_weights()
    _part(model, files)
    if tokens:
        grow_embeddings(model, tokens)
    try:
        weights = BaseWeights(files, model, fresh)
    except AdapterError as error:
        raise NotStreamable(str(error)) from error
    _load_buffers(model, weights)
    hollow_out(model, torch.float32)
    return model.eval(), weights


def _part(model: Any, files: Weights) -> None:
    """What the config ties and the files hold apart, with other values, is not tied: as `from_pretrained` has it."""
    names = model_names(model, files)
    for target, source in model.all_tied_weights_keys.items():
        keys = [names[n][0] for n in (target, source) if n in names]
        if len(set(keys)) == 2 and not torch.equal(files[keys[0]], files[keys[1]]):
            path, _, own = target.rpartition(".")
            module = model.get_submodule(path)
            module._parameters[own] = nn.Parameter(module._parameters[own].detach().clone(), requires_grad=False)


def files_fingerprint(spec: BaseSpec, fresh: tuple[str, ...], dtype: torch.dtype) -> str:
    """Of the tensors in a base's files, whatever they are quantised to when they are loaded; "" where that is unknown.

    Args:
        spec, fresh: as for `hollow_base`.
        dtype: of training.
    """
    try:
        model, weights = hollow_base(spec, fresh=fresh)
    except NotStreamable:
        return ""
    return fingerprint_of_files(model, weights, fresh, dtype)


def read_streamed(folder: Path, auto_class: str) -> Any:
    """A model from a folder in Transformers' layout that reads each part when it runs, in float32.

    Raises:
        ArtifactError: the files lack a tensor, or have one that the model has not.
        NotStreamable: they hold the tensors in another form.
    """
    model, weights = hollow_base(BaseSpec(str(folder), auto_class))
    extra = set(TensorFolder(folder)) - {weights.saved_name(n) for n in weights}
    if extra:
        raise ArtifactError(f"the files have {min(extra)}, which the model has not", where=str(folder))
    lend(model, weights, torch.float32)
    return model


def _load_buffers(model: nn.Module, weights: BaseWeights) -> None:
    """Running statistics and the like, which are small, are read at once."""
    for path, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            name = f"{path}.{own}" if path else own
            if name in weights:
                module._buffers[own] = weights[name].to(buffer.dtype)
