"""Models whose weights stay on disk: hollow parameters, filled while a module runs or is merged, one part in memory."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from .apply import state_of
from .behaviour import quiet
from .errors import AdapterError, UnmergeableError
from .modules import wrappers
from .weights import Weights

Held = list[tuple[nn.Module, str, "Hollow"]]


class Hollow(nn.Parameter):
    """A parameter without numbers: its shape, its dtype, and the name under which a file has it.

    Whatever computes with it gets NaN, so a part that was not filled in time shows in the result.
    """

    stored_name: str

    def __new__(cls, like: Tensor, name: str, dtype: torch.dtype | None = None) -> "Hollow":
        """As `like`, but of one number that all places share."""
        dtype = dtype if dtype is not None and like.is_floating_point() else like.dtype
        one = torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype)
        made: Hollow = torch.Tensor._make_subclass(cls, one.expand(like.shape), False)
        made.stored_name = name
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A copy is an ordinary parameter: adapters that train copies of the base's modules write into them."""
        return nn.Parameter(torch.full(self.shape, float("nan"), dtype=self.dtype), requires_grad=False)


def hollow_out(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every parameter by a hollow one; shared ones stay shared and keep their first name."""
    made: dict[int, Hollow] = {}
    for path, module in model.named_modules():
        for own, p in list(module._parameters.items()):
            if p is not None:
                name = f"{path}.{own}" if path else own
                module._parameters[own] = made.setdefault(id(p), Hollow(p, name, dtype))


def fill(module: nn.Module, weights: Weights, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> Held:
    """Give the hollow parameters of a module and all inside their numbers; returns what `empty` needs.

    Args:
        module: any.
        weights: by stored name.
        dtype: of the filled ones; None keeps the file's.
        device: where they go.
    """
    held: Held = []
    made: dict[int, nn.Parameter] = {}
    for inner in module.modules():
        for own, p in list(inner._parameters.items()):
            if isinstance(p, Hollow):
                if p.stored_name not in weights:
                    continue  # a head that the base's files lack, and that the adapter holds
                if id(p) not in made:
                    value = weights[p.stored_name]
                    value = value.to(device, dtype if value.is_floating_point() else None)
                    made[id(p)] = nn.Parameter(value, requires_grad=False)
                held.append((inner, own, p))
                inner._parameters[own] = made[id(p)]
    return held


def empty(held: Held) -> None:
    """Make them hollow again."""
    for inner, own, p in held:
        inner._parameters[own] = p


def lend(model: nn.Module, weights: Weights, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> None:
    """Let a hollow model run: each part gets its numbers when it is called and gives them back after.

    A part is as large as the largest layer at most. What lies between parts stays filled.
    """
    limit = max((_own_size(m) for m in model.modules()), default=0)
    for part in _parts(model, limit):
        _lend_part(part, weights, dtype, device)


def _own_size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False) if isinstance(p, Hollow))


def _parts(module: nn.Module, limit: int) -> Iterator[tuple[nn.Module, bool]]:
    """(module, whether all inside belongs to the part): small modules whole, large ones without their children."""
    size = sum(p.numel() for p in module.parameters() if isinstance(p, Hollow))
    called = type(module).forward is not nn.Module.forward
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or (called and size <= limit):
        if size:
            yield module, True
        return
    yield module, False
    for child in module.children():
        yield from _parts(child, limit)


def _lend_part(
    part: tuple[nn.Module, bool], weights: Weights, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    module, whole = part
    if not whole:
        for own, p in list(module._parameters.items()):
            if isinstance(p, Hollow) and p.stored_name in weights:
                module._parameters[own] = nn.Parameter(weights[p.stored_name].to(device, dtype), requires_grad=False)
        return
    depth: list[Held] = []

    def enter(_: nn.Module, args: Any) -> None:
        depth.append(fill(module, weights, dtype, device))

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        empty(depth.pop())

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


class MergedWeights(Weights):
    """The tensors of a base with its adapter merged, or of a merged model with it taken out again, layer by layer.

    Each is computed in float32 by PEFT's own merge of the one layer. Read every name once: what a layer gives beside
    the tensor that was asked for is kept until it is asked for too.

    Args:
        model: PeftModel on a hollow base.
        base: the base's own tensors, or those of the merged model.
        back: take the adapter out instead.
        rounded: the dtype that the result will be written in, to measure what of each update is left then.

    Attributes:
        kept: of each changed tensor, the size of its update beside the weight, and the share of it that is left.
        untied: whether a head that shared the embedding's weight has one of its own now.

    Raises:
        UnmergeableError: the adapter is no change of weights.
        AdapterError: it depends on the base's weights in a way that cannot be followed layer by layer.
    """

    def __init__(
        self, model: PeftModel, base: Weights, adapter: str = "default", *, back: bool = False,
        rounded: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if not hasattr(model, "merge_and_unload"):
            raise UnmergeableError("the method cannot be merged: it adds inputs, not weights")
        self.model, self.base, self.adapter, self.back, self.rounded = model, base, adapter, back, rounded
        self.kept: dict[str, tuple[float, float]] = {}
        self._owner: dict[str, nn.Module] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ready: dict[str, Tensor] = {}
        self.untied = False
        saved = {t.data_ptr() for t in state_of(model, adapter).values()}
        for name, module in wrappers(model):
            self._claim(name, module, saved)
        if back and any(isinstance(m, ModulesToSaveWrapper) for m in self._owner.values()):
            raise UnmergeableError("modules that the adapter replaced as a whole (a head) are not in the merged model")
        self._names = [*base, *(n for n in self._owner if n not in base)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._shapes[name] if name in self._shapes else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """float32 where the adapter changes something, else the base's own."""
        return torch.float32 if name in self._owner else self.base.dtype(name)

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes."""
        return frozenset(self._owner)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._owner:
            return self.base[name]
        if name not in self._ready:
            with torch.no_grad(), quiet():
                self._ready |= self._compute(self._owner[name])
        return self._ready.pop(name)

    def _claim(self, name: str, module: nn.Module, saved: set[int]) -> None:
        """Note which stored tensors a wrapper changes."""
        if isinstance(module, ModulesToSaveWrapper):
            if self.adapter in module.modules_to_save:
                own = module.modules_to_save[self.adapter].state_dict()
                stored = {p.stored_name for p in module.original_module.parameters() if isinstance(p, Hollow)}
                for key, tensor in own.items():
                    self._owner[f"{name}.{key}"], self._shapes[f"{name}.{key}"] = module, tuple(tensor.shape)
                    self.untied |= f"{name}.{key}" not in stored or self._shared(f"{name}.{key}")
            return
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter:
            return  # its embedding has the same rows
        if isinstance(module, BaseTunerLayer) and self.adapter not in module._all_available_adapter_names():
            return
        if isinstance(module, BaseTunerLayer):
            self._check_saved(name, module, saved)
        for p in module.parameters():
            if isinstance(p, Hollow):
                if p.stored_name in self._owner:
                    raise AdapterError(f"two adapted layers share {p.stored_name}")
                self._owner[p.stored_name] = module

    def _shared(self, name: str) -> bool:
        bare = self.model.get_base_model()
        hits = [p for _, p in bare.named_parameters(remove_duplicate=False) if getattr(p, "stored_name", "") == name]
        return len(hits) > 1

    def _check_saved(self, name: str, layer: nn.Module, saved: set[int]) -> None:
        """What an adapter computes from the base when it is loaded cannot be had from a hollow base."""
        if any(isinstance(m, BaseTunerLayer) for m in layer.modules() if m is not layer):
            raise AdapterError(f"{name} is adapted, and so are layers inside it")
        for own, t in (*layer.named_parameters(), *layer.named_buffers()):
            if "base_layer." not in own and t.is_floating_point() and t.numel() and t.data_ptr() not in saved:
                raise AdapterError(f"{name}.{own} is not in the adapter's file: it comes from the base's weights")

    def _compute(self, module: nn.Module) -> dict[str, Tensor]:
        if isinstance(module, ModulesToSaveWrapper):
            name = next(n for n, m in wrappers(self.model) if m is module)
            return {f"{name}.{k}": t for k, t in module.modules_to_save[self.adapter].state_dict().items()}
        alone: Any = _copied(module)
        layer = alone.token_adapter if isinstance(module, TrainableTokensWrapper) else alone
        parameters: list[tuple[str, Any]] = list(layer.get_base_layer().named_parameters())
        names = {path: p.stored_name for path, p in parameters if isinstance(p, Hollow)}
        held = fill(layer, self.base, torch.float32)
        before: dict[str, Tensor] = {}
        if self.rounded is not None:
            before = {p.stored_name: getattr(inner, own).detach().clone() for inner, own, p in held}
        self._fold(layer)
        base = layer.get_base_layer()
        found: dict[str, Tensor] = {name: base.get_parameter(path).detach() for path, name in names.items()}
        # NaN and infinity stay in a sum, which is many times faster than a look at every number.
        lost = [n for n, t in found.items() if not (t.sum().isfinite() or t.isfinite().all())]
        if lost:
            raise AdapterError(f"{lost[0]} would hold NaN or infinite numbers")
        if self.rounded is not None:
            self.kept |= {n: kept(before[n], t, self.rounded) for n, t in found.items()}
        return found

    def _fold(self, layer: Any) -> None:
        kind = type(layer).__name__
        try:
            if self.back:
                layer.merged_adapters.append(self.adapter)
                layer.unmerge()
                return
            layer.merge(safe_merge=False, adapter_names=[self.adapter])  # what comes out is checked below
        except (NotImplementedError, AttributeError, KeyError, IndexError) as error:
            what = "taken out" if self.back else "merged"
            why = str(error) or "PEFT has no way to do it"
            raise UnmergeableError(f"the adapter cannot be {what} ({kind}): {why}") from error
        except ValueError as error:
            if "NaN" in str(error):
                raise AdapterError(f"merging failed: {error}") from error
            raise UnmergeableError(f"the adapter cannot be merged ({kind}): {error}") from error
        if self.adapter not in layer.merged_adapters:
            raise UnmergeableError(f"the adapter cannot be merged ({kind}): PEFT's merge does nothing")


def _copied(module: nn.Module) -> nn.Module:
    """Modules and their containers anew, tensors shared: merging puts other tensors in their places."""
    new = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, dict | list | set):
            new.__dict__[key] = copy.copy(value)
    new._modules = {n: None if m is None else _copied(m) for n, m in module._modules.items()}
    return new


def kept(before: Tensor, after: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Size of an update relative to its weight, and the share of it that is left when the result is rounded.

    The share is the length of the written update along the wanted one: 1 all of it, 0 none.
    """
    update = (after - before).flatten()
    written = (after.to(dtype).to(after.dtype) - before).flatten()
    size = float(update.dot(update))
    share = float(written.dot(update)) / size if size > 0 else 1.0
    return (size / max(float(before.flatten().dot(before.flatten())), 1e-30)) ** 0.5, share
