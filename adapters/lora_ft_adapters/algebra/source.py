"""The exact change that an adapter on a model makes, module by module, through PEFT's own merge in float64."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lora_ft_adapters.apply import state_of
from lora_ft_adapters.errors import AdapterError

from .deltas import Delta, LayerDelta, SavedDelta, TokenDelta, layout_of
from .factor import ROUNDING
from .merging import merge_layer, outputs_kept

PREFIX = "base_model.model."
CANNOT_MERGE = (NotImplementedError, AttributeError, RuntimeError, ValueError, TypeError, KeyError)


class AdapterDeltas(Mapping[str, Delta]):
    """The changes of one adapter by module name; each is computed when it is asked for, one layer in memory.

    Args:
        model: PeftModel.
        adapter_name: which of its adapters.
        base: the model as it was before the adapter was loaded. Needed where loading an adapter changes the base
            itself (`bias` other than none, PiSSA and its kin); everything else is the same without it.

    Raises:
        AdapterError: the method has parameters that are no change of a weight, so that they would be lost.
    """

    def __init__(self, model: Any, adapter_name: str = "default", base: nn.Module | None = None) -> None:
        if adapter_name not in getattr(model, "peft_config", {}):
            raise AdapterError(f"the model has no adapter {adapter_name!r}")
        self.model, self.adapter_name = model, adapter_name
        self.config = model.peft_config[adapter_name]
        self._base = dict(base.named_parameters(remove_duplicate=False)) if base is not None else None
        self._check_method()
        self._found: dict[str, Callable[[], Delta]] = {}
        owned = [m for n, m in self._modules() if self._owns(n, m)]
        if not self._found:
            raise AdapterError(f"{self._method} changes no layer of this model, so there is nothing to compute with")
        self._check_complete(owned)

    def __getitem__(self, name: str) -> Delta:
        with torch.no_grad():
            return self._found[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def ranks(self) -> set[int]:
        """The ranks of plain LoRA layers; empty where the method has none."""
        layers = [m for _, m in self._modules() if isinstance(m, LoraLayer)]
        return {int(m.r[self.adapter_name]) for m in layers if self.adapter_name in m.r}

    @property
    def _method(self) -> str:
        return str(getattr(self.config.peft_type, "value", self.config.peft_type)).lower()

    def _check_method(self) -> None:
        if getattr(self.config, "is_prompt_learning", False):
            raise AdapterError(f"{self._method} adds to the input and changes no weight: it cannot be merged")
        if getattr(self.config, "target_parameters", None):
            raise AdapterError("adapters on target_parameters (stacked experts) are not supported here")
        if getattr(self.config, "bias", "none") not in ("none", False) and self._base is None:
            raise AdapterError(
                f"bias={self.config.bias!r} overwrites the base's own biases, so their change cannot be known",
                "pass the model as it was before the adapter was loaded",
            )

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        inside = ""
        for name, module in self.model.named_modules():
            if inside and name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                inside = f"{name}."
            yield name, module

    def _owns(self, name: str, module: nn.Module) -> bool:
        """Note what of `module` the adapter changes; whether the adapter has tensors of its own there."""
        short = "" if f"{name}." == PREFIX else name.removeprefix(PREFIX)
        if isinstance(module, ModulesToSaveWrapper):
            if self.adapter_name in module.modules_to_save:
                self._found[short] = partial(self._saved, short, module)
            return True
        if isinstance(module, TrainableTokensWrapper):
            if self.adapter_name in module.token_adapter.token_indices and not module.token_adapter.tied_adapter:
                self._found[short] = partial(self._tokens, module.token_adapter)
            return True
        if isinstance(module, BaseTunerLayer):
            if self.adapter_name in module._all_available_adapter_names():
                self._found[short] = partial(self._layer, short, module)
            return True
        if self._base is not None and any(self._changed(short, module)):
            if not short:
                raise AdapterError("the adapter's file overwrites parameters of the model's outermost module")
            self._found[short] = partial(self._overwritten, short, module)
            return True
        return False

    def _changed(self, name: str, module: nn.Module) -> Iterator[str]:
        """Names of the module's own parameters that are not the base's any more."""
        for own, parameter in module.named_parameters(recurse=False):
            before = (self._base or {}).get(f"{name}.{own}" if name else own)
            if before is not None and not _same(before, parameter):
                yield own

    def _check_complete(self, owned: list[nn.Module]) -> None:
        """Refuse an adapter with a tensor that no changed module holds."""
        reached = {
            t.data_ptr() for m in owned for t in itertools.chain(m.parameters(), m.buffers()) if t.numel()
        }  # fmt: skip
        state = state_of(self.model, self.adapter_name)
        base = {p.data_ptr() for n, p in self.model.named_parameters() if n.removeprefix(PREFIX) in (self._base or {})}
        held = reached | base
        lost = [n for n, t in state.items() if t.is_floating_point() and t.numel() and t.data_ptr() not in held]
        if lost:
            raise AdapterError(
                f"{self._method} has {len(lost)} tensors outside the layers that it adapts, for example {lost[0]}, "
                "so that merging the layers would lose them"
            )

    def _layer(self, name: str, layer: BaseTunerLayer) -> LayerDelta | SavedDelta:
        base: Any = layer.get_base_layer()
        if isinstance(layer, MultiheadAttention | ParamWrapper):
            raise AdapterError(f"{name}: adapters on {type(base).__name__} are not supported here")
        if getattr(getattr(base, "weight", None), "ndim", 0) == 1:  # a norm: no low rank, but a small copy
            return _saved_delta(name, base.state_dict(), self._merged(name, layer).state_dict())
        layout = layout_of(base, name)
        before = {n: (self._base or {}).get(f"{name}.{n}") for n in ("weight", "bias")}
        moved = {n: b for n, b in before.items() if b is not None and not _same(b, getattr(base, n))}
        factors = None if "weight" in moved else _factors(layer, self.adapter_name)
        if factors is not None:
            bias = _lora_bias(layer, self.adapter_name)
            if "bias" in moved:
                shift = base.bias.double() - moved["bias"].double().to(base.bias.device)
                bias = shift if bias is None else bias + shift
            return LayerDelta(layout, *factors, bias=bias)
        merged = self._merged(name, layer)
        old = moved.get("weight", base.weight).double().to(merged.weight.device)
        dense = layout.matrix(merged.weight.data - old).contiguous()
        if dense.norm() <= ROUNDING * old.norm():
            dense = torch.zeros_like(dense)
        shift = None
        if layout.has_bias:
            shift = merged.bias.data - moved.get("bias", base.bias).double().to(merged.bias.device)
        return LayerDelta(layout, dense=dense, bias=shift if shift is not None and shift.any() else None)

    def _merged(self, name: str, layer: BaseTunerLayer) -> Any:
        """The base layer with the adapter merged, in float64."""
        base: Any = layer.get_base_layer()
        if not base.weight.is_floating_point() or layer.quantization_backend is not None:
            raise AdapterError(
                f"{name}: the change that {self._method} makes depends on the base's weight, which is quantised here",
                "load the base unquantised",
            )
        try:
            merged = merge_layer(layer, self.adapter_name, torch.float64)
            try:
                kept = outputs_kept(layer, self.adapter_name, torch.float64)
            except RuntimeError:  # the method's own forward makes float32 tensors, although its merge does not
                kept = outputs_kept(layer, self.adapter_name, torch.float32)
        except CANNOT_MERGE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise AdapterError(f"{name}: {self._method} cannot be merged: {reason}") from error
        if not kept:
            raise AdapterError(
                f"{name}: PEFT's merge of {self._method} on a {type(base).__name__} is not what the adapter computes"
            )
        return merged.get_base_layer()

    def _saved(self, name: str, wrapper: ModulesToSaveWrapper) -> SavedDelta:
        new = wrapper.modules_to_save[self.adapter_name].state_dict()
        old = wrapper.original_module.state_dict()
        old = {n: (self._base or {}).get(f"{name}.{n}", t) for n, t in old.items()}
        return _saved_delta(name, old, new)

    def _overwritten(self, name: str, module: nn.Module) -> SavedDelta:
        new = dict(module.named_parameters(recurse=False))
        old = {n: (self._base or {})[f"{name}.{n}" if name else n] for n in new}
        return _saved_delta(name, old, new)

    def _tokens(self, layer: Any) -> TokenDelta:
        ids = [int(i) for i in layer.token_indices[self.adapter_name]]
        new, weight = layer.trainable_tokens_delta[self.adapter_name], layer.get_base_layer().weight
        rows = {i: (weight[i].double(), n.double() - weight[i].double()) for i, n in zip(ids, new.data, strict=True)}
        return TokenDelta(rows, new.dtype)


def delta_weights(model: Any, adapter_name: str = "default") -> Iterator[tuple[str, Delta]]:
    """The change that the adapter makes to each module: dW = W' - W, db = b' - b, in float64.

    Plain LoRA stays in factors (B * scaling, A); every other method goes through PEFT's own merge of one layer.

    Raises:
        AdapterError: the method cannot be merged, or its base is quantised and the change depends on it.
    """
    yield from AdapterDeltas(model, adapter_name).items()


def share(model: nn.Module) -> nn.Module:
    """A second tree of modules over the same weights: an adapter put on it leaves `model` as it was.

    Vectors are copied, because PEFT writes into them in place (`bias: all`); matrices share their storage.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if parameter.ndim > 1:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, memo)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() or bool(torch.equal(a.to(b.device), b))


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """(B * scaling, A) of plain LoRA, or None for everything that merges in another way."""
    plain = isinstance(layer, LoraLayer) and type(layer).__module__.startswith("peft.tuners.lora.")  # not AdaLoRA
    if not plain or adapter in layer.lora_variant:
        return None
    scaling = layer.scaling[adapter]
    if adapter in layer.lora_embedding_A:
        left, right = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    else:
        left, right = layer.lora_B[adapter].weight.flatten(1), layer.lora_A[adapter].weight.flatten(1)
    return left.data.double() * scaling, right.data.double()


def _lora_bias(layer: Any, adapter: str) -> Tensor | None:
    bias = getattr(layer.lora_B[adapter], "bias", None) if adapter in layer.lora_B else None
    return None if bias is None else bias.data.double() * layer.scaling[adapter]


def _saved_delta(name: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> SavedDelta:
    if old.keys() != new.keys() or any(old[n].shape != new[n].shape for n in new):
        raise AdapterError(f"{name}: the adapter's copy of this module has other tensors than the base's")
    whole = [n for n, t in new.items() if not t.is_floating_point()]
    if any(not torch.equal(old[n], new[n]) for n in whole):
        raise AdapterError(f"{name}: the adapter changes {whole[0]}, which is no floating point tensor")
    names = [n for n in new if n not in whole]
    base = {n: old[n].detach().double() for n in names}
    change = {n: new[n].detach().double() - base[n] for n in names}
    # A merge was done in float64; a copy that the adapter trained keeps its own dtype.
    dtypes = {n: old[n].dtype if new[n].dtype == torch.float64 else new[n].dtype for n in names}
    return SavedDelta(base, change, dtypes)
