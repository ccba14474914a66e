"""Optimizers by name, over named parameters, with state that can be saved by name."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_ft.recipe import TrainSection


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], settings: TrainSection) -> Optimizer:
    """The recipe's optimizer. Vectors (biases, norms) get no weight decay."""
    parameters = [p for _, p in named]
    decay = [p for p in parameters if p.dim() > 1]
    rest = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": chosen, "weight_decay": rate}
        for chosen, rate in ((decay, settings.weight_decay), (rest, 0.0))
        if chosen
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


def load_state(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]], flat: dict[str, Tensor]) -> None:
    """Put back what `state_by_name` gave; a parameter without state is left to start afresh only at step 0."""
    for name, parameter in named:
        mine = {k.split("|", 1)[1]: v for k, v in flat.items() if k.split("|", 1)[0] == name}
        if not mine:
            raise KeyError(name)
        optimizer.state[parameter] = {
            k: v if k == "step" else v.to(parameter.device) if v.dim() else v for k, v in mine.items()
        }
