"""Optimizers by name, over named parameters, with state that can be saved by name."""

import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_ft.errors import UsageError
from lora_ft.recipe import TrainSection

# Transformers' name -> class of bitsandbytes, and the default of its second decay.
BITSANDBYTES = {
    "adamw_8bit": ("AdamW8bit", 0.999),
    "paged_adamw_32bit": ("PagedAdamW32bit", 0.999),
    "paged_adamw_8bit": ("PagedAdamW8bit", 0.999),
    "lion_8bit": ("Lion8bit", 0.99),
    "paged_lion_32bit": ("PagedLion32bit", 0.99),
    "paged_lion_8bit": ("PagedLion8bit", 0.99),
}
SHARED = ("qmap1", "qmap2")  # tables of 8-bit values: one for all parameters, made anew with each state


def check_optimizer(name: str, device: torch.device) -> None:
    """Raise UsageError for an optimizer whose package is missing or that does not run on this device."""
    if name not in BITSANDBYTES:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"optimizer {name} needs bitsandbytes", where="train.optimizer", fix="pip install 'lora-ft[quant]'"
        )
    if name.startswith("paged_") and device.type != "cuda":
        plain = {"adamw_32bit": "adamw"}.get(name.removeprefix("paged_"), name.removeprefix("paged_"))
        raise UsageError(
            f"optimizer {name} moves its state out of a GPU, and this run is on {device.type}",
            where="train.optimizer",
            fix="adamw_8bit or adamw" if plain == "lion_32bit" else plain,
        )


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
    if settings.optimizer in BITSANDBYTES:
        return _from_bitsandbytes(groups, settings, parameters[0].device)
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


def _from_bitsandbytes(groups: list[dict[str, Any]], settings: TrainSection, device: torch.device) -> Optimizer:
    check_optimizer(settings.optimizer, device)
    from bitsandbytes import optim

    kind, second = BITSANDBYTES[settings.optimizer]
    betas = _given(settings.adam_beta1, 0.9), _given(settings.adam_beta2, second)
    more = {} if "lion" in settings.optimizer else {"eps": _given(settings.adam_epsilon, 1e-8)}
    made: Optimizer = getattr(optim, kind)(groups, lr=settings.learning_rate, betas=betas, **more)
    return made


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def state_by_name(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Optimizer state as `<parameter name>|<key>` -> tensor."""
    flat = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None and key not in SHARED:
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
    places = {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    for name, parameter in named:
        mine, place = by_name.get(name), places[id(parameter)]
        group = optimizer.param_groups[place[0]]
        if mine is not None and hasattr(optimizer, "init_state"):
            _fill(optimizer, group, parameter, place, mine)
        elif mine is not None:
            optimizer.state[parameter] = {
                k: _placed(k, v, parameter, fused=bool(group.get("fused"))) for k, v in mine.items()
            }
        elif name not in fresh and not _keeps_nothing(optimizer, group):  # fresh: asleep under gradual unfreezing
            raise KeyError(name)


def _fill(
    optimizer: Any, group: dict[str, Any], parameter: nn.Parameter, place: tuple[int, int], saved: Mapping[str, Tensor]
) -> None:
    """State of bitsandbytes: it makes the tensors, which may lie in paged memory, and gets its numbers back."""
    optimizer.state[parameter] = {}
    optimizer.init_state(group, parameter, *place)
    state = optimizer.state[parameter]
    for key, value in saved.items():
        if isinstance(state[key], Tensor):
            state[key].copy_(value)
        else:
            state[key] = int(value)


def _placed(key: str, value: Tensor, parameter: nn.Parameter, *, fused: bool) -> Tensor:
    """The value where the optimizer expects it: with the parameter, but the count of steps only of a fused one."""
    return value.to(parameter.device) if fused or key != "step" else value


def _keeps_nothing(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and group["momentum"] == 0
