"""Merging and unmerging layer by layer, by PEFT's own merge of each, with the tensors of a base that stays on disk."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from .apply import state_of
from .behaviour import quiet
from .copies import Copy, CopyLayer
from .errors import AdapterError, UnmergeableError
from .hollow import Hollow, fill
from .modules import wrappers
from .weights import Weights

_REPLACED = (ModulesToSaveWrapper, CopyLayer, TrainableTokensWrapper, TrainableTokensLayer, LNTuningLayer)


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
        self._places: dict[nn.Module, dict[str, str]] = {}  # of each layer: its parameters and the tensors they become
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ready: dict[str, Tensor] = {}
        self.untied = False
        if back and any(isinstance(m, _REPLACED) for _, m in wrappers(model)):
            raise UnmergeableError(
                "what the adapter replaced as a whole (a head, a norm, rows of tokens) is not in the merged model"
            )
        saved = {t.data_ptr() for t in state_of(model, adapter).values()}
        for name, module in wrappers(model):
            self._claim(name, module, saved)
        self._left = dict(self._left_behind())
        self._names = [*base, *(n for n in (*self._owner, *self._left) if n not in base)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._shapes[name] if name in self._shapes else self.base.shape(self._left.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        """float32 where the adapter changes something, else the base's own."""
        return torch.float32 if name in self._owner else self.base.dtype(self._left.get(name, name))

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes."""
        return frozenset(self._owner)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._owner:
            return self.base[self._left.get(name, name)]
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
                    self.untied |= f"{name}.{key}" not in stored or self._places_of(f"{name}.{key}") > 1
            return
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter:
            return  # its embedding has the same rows
        if isinstance(module, BaseTunerLayer) and self.adapter not in module._all_available_adapter_names():
            return
        if isinstance(module, BaseTunerLayer):
            self._check_saved(name, module, saved)
        places = self._places[module] = {}
        layer: Any = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        for path, p in layer.get_base_layer().named_parameters():
            target = self._target(name, module, path, p) if isinstance(p, Hollow) else None
            if target is None:
                continue
            if target in self._owner:
                raise AdapterError(f"two adapted layers share {target}")
            self._owner[target], self._shapes[target], places[path] = module, tuple(p.shape), target

    def _target(self, name: str, module: nn.Module, path: str, p: Hollow) -> str | None:
        """The tensor that a parameter becomes: its stored one, or one of its own; None when a tied layer writes it."""
        if not isinstance(module, CopyLayer):
            return p.stored_name
        adapter = module.adapters[self.adapter]
        assert isinstance(adapter, Copy)
        if path in adapter.ties:
            return None
        copies = [m for _, m in wrappers(self.model) if isinstance(m, CopyLayer) and self.adapter in m.adapters]
        held = sum(any(q is p for q in m.parameters()) for m in copies)
        if held == self._places_of(p.stored_name):
            return p.stored_name
        if held > 1:
            raise AdapterError(f"{p.stored_name} is shared by {held} adapted layers and by others")
        self.untied = True
        return f"{name}.{path}"

    def _left_behind(self) -> Iterator[tuple[str, str]]:
        """Places that keep a shared weight which the adapter replaced at another one, and the base's name for it."""
        inside = tuple(f"{name}." for name, _ in wrappers(self.model))
        for path, p in self.model.get_base_model().named_parameters(remove_duplicate=False):
            if not isinstance(p, Hollow) or path == p.stored_name or path.startswith(inside):
                continue
            if isinstance(self._owner.get(p.stored_name), ModulesToSaveWrapper | CopyLayer):
                yield path, p.stored_name

    def _places_of(self, stored: str) -> int:
        bare = self.model.get_base_model()
        return sum(getattr(p, "stored_name", "") == stored for _, p in bare.named_parameters(remove_duplicate=False))

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
        fill(layer, self.base, torch.float32)
        before = {}
        if self.rounded is not None:
            before = {name: t.clone() for name, t in self._own(module, layer).items()}
        self._fold(layer)
        found = self._own(module, layer)
        # NaN and infinity stay in a sum, which is many times faster than a look at every number.
        lost = [n for n, t in found.items() if not (t.sum().isfinite() or t.isfinite().all())]
        if lost:
            raise AdapterError(f"{lost[0]} would hold NaN or infinite numbers")
        if self.rounded is not None:
            self.kept |= {n: kept(before[n], t, self.rounded) for n, t in found.items()}
        return found

    def _own(self, module: nn.Module, layer: Any) -> dict[str, Tensor]:
        base = layer.get_base_layer()  # some merges put another in its place
        return {name: base.get_parameter(path).detach() for path, name in self._places[module].items()}

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
