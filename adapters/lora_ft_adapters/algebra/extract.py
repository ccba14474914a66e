"""A LoRA from a base and a fully fine-tuned model: the difference of their weights, tensor by tensor."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.weights import TensorFolder

from .deltas import Delta, LayerDelta, Layout, SavedDelta, layout_of
from .factor import Cut
from .result import LoraResult, factorise

SHOWN = 3


Weights = Mapping[str, Tensor] | nn.Module | str | Path


def extract(
    base: Weights, tuned: Weights, *, rank: int | None = None, energy: float | None = None,
    model: nn.Module | None = None,
) -> LoraResult:  # fmt: skip
    """A LoRA whose change of each matrix is the best approximation of tuned - base; everything else as it is.

    Linear layers and plain convolutions (with their biases) become LoRA; norms, embeddings and all other modules that
    differ are replaced as a whole (modules_to_save), and so are layers that share their weights.

    Args:
        base: a model, a folder of safetensors files, or tensors by name.
        tuned: the same names and shapes.
        rank: most singular values for each matrix; None keeps all.
        energy: share of the sum of squared singular values to keep in each matrix.
        model: the base's modules, on any device; needed when `base` is no module.

    Raises:
        AdapterError: names or shapes differ (the first 3 are named), or nothing differs.
    """
    if rank is not None and energy is not None:
        raise AdapterError("give rank or energy, not both")
    model = model if model is not None else base if isinstance(base, nn.Module) else None
    if model is None:
        raise AdapterError("weights by name alone do not say which are embeddings", "pass model, which may be on meta")
    return factorise(extract_deltas(base, tuned, model), Cut(rank, energy))


def extract_deltas(base: Weights, tuned: Weights, model: nn.Module) -> Iterator[tuple[str, Delta]]:
    """The change of each module that differs, one module in memory."""
    aliases = _aliases(model)
    before, after = (_open(w, aliases) for w in (base, tuned))
    _check_names(before, after)
    modules = dict(model.named_modules())
    owners: dict[str, list[str]] = {}
    for name in before:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    for owner, names in owners.items():
        if owner not in modules:
            raise AdapterError(f"the weights have {names[0]}, but the model has no module {owner!r}")
        pairs = {n.rpartition(".")[2]: (before[n], after[n]) for n in names}
        if any(
            not torch.equal(b.double(), a.double().to(b.device)) for b, a in pairs.values()
        ):  # whatever dtype each is stored in
            delta = _delta(owner, modules[owner], pairs)
            yield owner, delta
            for second, name in aliases.items():
                if name in names:
                    yield _second(second, name, modules, delta)


def _delta(owner: str, module: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Delta:
    odd = [n for n, (b, a) in pairs.items() if not b.is_floating_point() and not torch.equal(b, a)]
    if odd:
        raise AdapterError(f"{owner}.{odd[0]} differs and is no floating point tensor (quantised weights?)")
    change = {n: a.double().to(b.device) - b.double() for n, (b, a) in pairs.items() if b.is_floating_point()}
    layout = _lora_layout(module, owner)
    if layout is not None and set(change) <= {"weight", "bias"} and "weight" in change:
        bias = change.get("bias")
        dense = layout.matrix(change["weight"]).contiguous()
        return LayerDelta(layout, dense=dense, bias=bias if bias is not None and bool(bias.any()) else None)
    if not owner or any(True for _ in module.children()):
        raise AdapterError(f"{owner or 'the model'} has weights of its own and modules inside, which PEFT cannot save")
    return SavedDelta(
        {n: pairs[n][0].double() for n in change}, change, {n: pairs[n][1].dtype for n in change}
    )  # fmt: skip


def _second(second: str, name: str, modules: Mapping[str, nn.Module], delta: Delta) -> tuple[str, Delta]:
    """The change of a layer that shares a changed weight: PEFT would leave it with the base's weight."""
    owner, _, own = second.rpartition(".")
    others = [n for n, _ in modules[owner].named_parameters(recurse=False) if n != own]
    if others or not isinstance(delta, SavedDelta):
        raise AdapterError(f"{second} shares its weight with {name}, which a LoRA of PEFT cannot express")
    part = name.rpartition(".")[2]
    return owner, SavedDelta({own: delta.base[part]}, {own: delta.change[part]}, {own: delta.dtypes[part]})


def _lora_layout(module: nn.Module, name: str) -> Layout | None:
    """The layout for a LoRA; None for modules that are replaced as a whole."""
    if isinstance(module, nn.Embedding):
        return None
    try:
        return layout_of(module, name)
    except AdapterError:
        return None


def _aliases(model: nn.Module) -> dict[str, str]:
    """Second name of a shared parameter -> its first name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            aliases[name] = first[id(parameter)]
    return aliases


def _open(weights: Weights, aliases: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Tensors by name, without second names of the same tensor."""
    if isinstance(weights, str | Path):
        weights = TensorFolder(weights)
    found = {k: t.detach() for k, t in weights.state_dict().items()} if isinstance(weights, nn.Module) else weights
    for second, name in aliases.items():
        if second in found and name in found and not torch.equal(found[second], found[name]):
            raise AdapterError(f"{second} and {name} are one tensor in the base's model but two in these weights")
    return _Without(found, frozenset(s for s in aliases if aliases[s] in found))


class _Without(Mapping[str, Tensor]):
    """A mapping with some names left out, still read one by one."""

    def __init__(self, inner: Mapping[str, Tensor], hidden: frozenset[str]) -> None:
        self._inner, self._names = inner, [n for n in inner if n not in hidden]

    def __getitem__(self, name: str) -> Tensor:
        return self._inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_names(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    differences = [f"{n} is only in the base" for n in before if n not in after]
    differences += [f"{n} is only in the tuned model" for n in after if n not in before]
    both = [n for n in before if n in after]
    differences += [
        f"{n} has shape {tuple(b)} in the base and {tuple(a)} in the tuned model"
        for n in both
        if (b := before[n].shape) != (a := after[n].shape)
    ]
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise AdapterError(f"the two models do not have the same weights: {'; '.join(differences[:SHOWN])}{more}")
