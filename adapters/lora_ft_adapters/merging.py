"""Adapters in the base's own weights, for good or for a while."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .behaviour import quiet
from .errors import AdapterError, UnmergeableError
from .modules import embedding_ends


def merge(model: PeftModel) -> nn.Module:
    """The base with the active adapters merged into its weights, without any adapter layer.

    Raises:
        UnmergeableError: the method cannot be merged into this base; says why.
        AdapterError: the merged weights are not finite.
    """
    if not hasattr(model, "merge_and_unload"):
        raise UnmergeableError(f"{_kind(model)} cannot be merged: it adds inputs, not weights")
    if any(getattr(c, "layer_replication", None) for c in model.peft_config.values()):
        _unshare(model)
    try:
        fold: Any = model.merge_and_unload
        with quiet():
            merged: nn.Module = fold(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        why = str(error) or "PEFT has no merge for it"
        raise UnmergeableError(f"{_kind(model)} cannot be merged: {why}") from error
    except ValueError as error:
        if "NaN" in str(error):
            raise AdapterError(f"merging failed: {error}") from error
        raise UnmergeableError(f"{_kind(model)} cannot be merged: {error}") from error
    return merged


def check_mergeable(model: PeftModel) -> None:
    """Try PEFT's merge on one layer of each kind, filled with small numbers; the model may be on the meta device.

    Raises:
        UnmergeableError: the method cannot be merged into this base; says why.
    """
    if not hasattr(model, "merge_and_unload"):
        raise UnmergeableError(f"{_kind(model)} cannot be merged: it adds inputs, not weights")
    layers = {(type(m), type(m.get_base_layer())): m for m in model.modules() if isinstance(m, BaseTunerLayer)}
    for layer in layers.values():
        trial: Any = copy.deepcopy(layer).to_empty(device="cpu")
        if not hasattr(trial, "merge"):  # torch copies a parametrised layer as its own kind; merging tells
            continue
        with torch.no_grad(), quiet(), torch.random.fork_rng(devices=[]):
            for tensor in (*trial.parameters(), *trial.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.01)
                else:
                    tensor.zero_()  # an index, say: what memory happened to hold would point anywhere
            try:
                trial.merge(safe_merge=False)
            except (NotImplementedError, AttributeError, ValueError, TypeError) as error:
                why = str(error) or "PEFT has no merge for it"
                raise UnmergeableError(f"{_kind(model)} cannot be merged: {why}") from error


@contextmanager
def merged(model: PeftModel) -> Iterator[PeftModel]:
    """In this context the active adapters are merged into the base's weights; then the base has its bits back.

    PEFT's own unmerge subtracts what it added, which leaves rounding behind.

    Raises:
        UnmergeableError: the method cannot be merged.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    held = [(p, p.detach().clone()) for layer in layers for p in layer.get_base_layer().parameters()]
    try:
        with quiet():
            model.merge_adapter(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError) as error:
        with suppress(UnmergeableError):
            _unmerge(model, held)  # some layers are merged by now
        raise UnmergeableError(f"{_kind(model)} cannot be merged: {error}") from error
    try:
        yield model
    finally:
        _unmerge(model, held)


def _unmerge(model: PeftModel, held: list[tuple[nn.Parameter, Tensor]]) -> None:
    try:
        model.unmerge_adapter()
    except NotImplementedError as error:
        raise UnmergeableError(f"{_kind(model)} cannot be unmerged: {error}; load base and adapter again") from error
    finally:
        with torch.no_grad():
            for p, value in held:
                p.copy_(value)


def _unshare(model: PeftModel) -> None:
    """Give repeated layers weights of their own; PEFT would merge each one's adapter into the weight they share."""
    bare: Any = model.get_base_model()
    seen = {id(p) for end in embedding_ends(bare) if end is not None for p in end.parameters()}
    held: set[int] = set()
    for module in bare.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) in held and id(p) not in seen:
                setattr(module, name, nn.Parameter(p.detach().clone(), requires_grad=False))
            held.add(id(p))


def _kind(model: PeftModel) -> str:
    kind = model.peft_config[model.active_adapters[0]].peft_type
    return str(getattr(kind, "value", kind)).lower().removeprefix("lora_ft_")
