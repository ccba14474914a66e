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
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=_can_fuse(parameters))
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate)
    # eps[1] = 1 takes the rate as it is. The default multiplies it by the size of each parameter, at least 1e-3: LoRA's
    # B starts at zero, so it would learn a thousand times too slowly, and nobody would notice.
    return torch.optim.Adafactor(groups, lr=rate, eps=(None, 1.0))


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
    for name, parameter in named:
        mine = by_name.get(name)
        if mine is None:
            if name in fresh:  # not trained yet under gradual unfreezing
                continue
            raise KeyError(name)
        optimizer.state[parameter] = {
            k: v if k == "step" else v.to(parameter.device) if v.dim() else v for k, v in mine.items()
        }
