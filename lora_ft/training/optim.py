"""Optimizers by name, over named parameters, with state that can be saved by name."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_ft.recipe import TrainSection


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], settings: TrainSection, scales: Mapping[str, float]
) -> Optimizer:
    """The recipe's optimizer. Vectors (biases, norms) get no weight decay.

    Args:
        named: the parameters that train.
        settings: the train section.
        scales: factor on the learning rate by parameter name; each group keeps its own as "scale".
    """
    named = list(named)
    parameters = [p for _, p in named]
    sorted_in: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, p in named:
        sorted_in[settings.weight_decay if p.dim() > 1 else 0.0, scales.get(name, 1.0)].append(p)
    groups: list[dict[str, Any]] = [
        {"params": chosen, "weight_decay": decay, "scale": scale} for (decay, scale), chosen in sorted_in.items()
    ]
    rate = settings.learning_rate
    if settings.optimizer in ("adam", "adamw"):
        rule = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        betas = _given(settings.adam_beta1, 0.9), _given(settings.adam_beta2, 0.999)
        return rule(groups, lr=rate, betas=betas, eps=_given(settings.adam_epsilon, 1e-8), fused=_can_fuse(parameters))
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=_given(settings.momentum, 0.9))
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate, momentum=_given(settings.momentum, 0.0))
    # eps[1] = 1 takes the rate as it is. The default multiplies it by the size of each parameter, at least 1e-3: LoRA's
    # B starts at zero, so it would learn a thousand times too slowly, and nobody would notice.
    return torch.optim.Adafactor(groups, lr=rate, eps=(None, 1.0))


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def state_by_name(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Optimizer state as `<parameter name>|<key>` -> tensor."""
    flat = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                flat[f"{name}|{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return flat


def load_state(
    optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]], flat: dict[str, Tensor], fresh: frozenset[str]
) -> None:
    """Put back what `state_by_name` gave; KeyError for a parameter without state that is not in `fresh`."""
    by_name: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in flat.items():
        name, what = key.split("|", 1)
        by_name[name][what] = value
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named:
        mine, group = by_name.get(name), groups[id(parameter)]
        if mine is not None:
            optimizer.state[parameter] = {
                k: _placed(k, v, parameter, fused=bool(group.get("fused"))) for k, v in mine.items()
            }
        elif name not in fresh and not _keeps_nothing(optimizer, group):  # fresh: asleep under gradual unfreezing
            raise KeyError(name)


def _placed(key: str, value: Tensor, parameter: nn.Parameter, *, fused: bool) -> Tensor:
    """The value where the optimizer expects it: with the parameter, but the count of steps only of a fused one."""
    return value.to(parameter.device) if fused or key != "step" else value


def _keeps_nothing(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and group["momentum"] == 0
