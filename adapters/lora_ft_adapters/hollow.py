"""Models whose weights stay on disk: hollow parameters, filled while a module runs or is merged, one part in memory."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

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
