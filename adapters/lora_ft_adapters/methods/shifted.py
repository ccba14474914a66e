"""LoRA that starts from a low-rank part of the weights: PiSSA, OLoRA, CorDA, LoRA-GA.

    PEFT:  W <- W - s B0 A0 in the base, and the adapter starts at (A0, B0)
    here:  W stays, and the adapter is s (B A - B0 A0) with B0, A0 frozen, that is a LoRA of rank 2r

Both compute the same function and train the same r rows of A and columns of B. Ours leaves the base bit-identical: the
adapter can be switched off, it fits the original base, and stock PEFT loads it as plain LoRA (PEFT reaches the same
file by a conversion at saving, `path_initial_model_for_weight_conversion`). The price is r more rows to multiply.

PiSSA: Meng et al. 2024, arXiv:2404.02948. OLoRA: Bueyuekakyuez 2024, arXiv:2406.01775. CorDA: Yang et al. 2024,
arXiv:2406.05223. LoRA-GA: Wang et al. 2024, arXiv:2407.05000.
"""

import copy
import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from lora_ft_adapters.behaviour import (
    Behaviour,
    Calibration,
    Driver,
    base_weight,
    need,
    real_rows,
    register_behaviour,
)
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.registry import Method, register
from lora_ft_adapters.shapes import at_most
from lora_ft_adapters.targets import all_linear

from .lora import DEFAULTS

CONSTANT = "_lora_ft_constant_rank"  # on a layer: {adapter name: r}, the rows from r on are the frozen start
_MARKS = ("eigens", "_peft_loraga_grad")  # what PEFT's preprocessing leaves on a base layer for its initialisation


class _Half(Driver):
    """Keeps the frozen half of A and B where it started."""

    def __init__(self, model: PeftModel, name: str) -> None:
        self.held: list[tuple[Tensor, Tensor]] = []
        self.pairs: list[tuple[nn.Parameter, nn.Parameter, int]] = []
        layers: list[Any] = [m for m in model.modules() if name in getattr(m, CONSTANT, {})]
        for layer in layers:
            constant = getattr(layer, CONSTANT)[name]
            self.pairs.append((layer.lora_A[name].weight, layer.lora_B[name].weight, constant))
        self.load_state({})

    def before_step(self) -> None:
        """No gradient for the frozen half, so that optimizers gather no state for it."""
        for a, b, r in self.pairs:
            if a.grad is not None:
                a.grad[r:].zero_()
            if b.grad is not None:
                b.grad[:, r:].zero_()

    def after_step(self, step: int) -> None:
        """Undo weight decay."""
        with torch.no_grad():
            for (a, b, r), (a0, b0) in zip(self.pairs, self.held, strict=True):
                a[r:].copy_(a0)
                b[:, r:].copy_(b0)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The frozen half as it is in the adapter now."""
        self.held = [(a.detach()[r:].clone(), b.detach()[:, r:].clone()) for a, b, r in self.pairs]


def _kind(config: PeftConfig) -> str:
    init = getattr(config, "init_lora_weights", None)
    if not isinstance(init, str) or not isinstance(config, LoraConfig):
        return ""
    return init if init in ("olora", "corda", "lora_ga") else "pissa" if init.startswith("pissa") else ""


class Shifted(Behaviour):
    """Runs PEFT's own initialisation on a throwaway copy of each layer, and adds what it found at rank 2r."""

    def matches(self, config: PeftConfig) -> bool:
        """By init_lora_weights."""
        return bool(_kind(config))

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """A LoRA of rank 2r whose second half is the start, negated and frozen."""
        given: Any = config
        if given.use_dora or given.lora_bias or given.target_parameters:
            raise AdapterError(f"init_lora_weights={given.init_lora_weights!r} is for plain LoRA on linear layers")
        if given.target_modules == "all-linear":  # PEFT's preprocessing takes names only
            named: Any = copy.copy(given)
            if not isinstance(model, PeftModel):  # PEFT's rule leaves classifier heads out, but takes adapters in
                named = _maybe_include_all_linear_layers(named, model)
            else:
                named.target_modules = set(all_linear(model))
            given.target_modules = named.target_modules
        _look_at_data(model, given, data)
        adapted = super().add(model, _doubled(given), adapter_name, None)
        for name, layer in adapted.named_modules():
            if isinstance(layer, LoraLayer):
                _start(name, layer, adapter_name, given)
        return adapted

    def sketch(self, config: PeftConfig) -> PeftConfig:
        """Plain LoRA of rank 2r."""
        made: PeftConfig = _doubled(config)
        delattr(made, CONSTANT)
        return made

    def driver(self, model: PeftModel, adapter_name: str) -> Driver:
        """Keeps the start frozen."""
        return _Half(model, adapter_name)


class Half(Shifted):
    """The driver of an adapter that `Shifted` made; its config is plain LoRA by then."""

    def matches(self, config: PeftConfig) -> bool:
        """By the mark that `_doubled` leaves."""
        return bool(getattr(config, CONSTANT, False))

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """Such a config describes an adapter that exists; a fresh one would be plain LoRA."""
        raise AdapterError("this config is of an adapter that exists already; build a new one")


def _doubled(config: Any) -> Any:
    """Plain LoRA of rank 2r with the same scaling: s = alpha / r, or alpha / sqrt(r) with rsLoRA."""
    grow = 2**0.5 if config.use_rslora else 2
    made = copy.copy(config)
    made.r, made.lora_alpha, made.init_lora_weights = 2 * config.r, grow * config.lora_alpha, True
    made.rank_pattern = {k: 2 * v for k, v in (config.rank_pattern or {}).items()}
    ranked = dict.fromkeys(made.rank_pattern, config.lora_alpha)
    made.alpha_pattern = {k: grow * v for k, v in (ranked | (config.alpha_pattern or {})).items()}
    made.corda_config = made.lora_ga_config = None
    setattr(made, CONSTANT, True)
    return made


def _look_at_data(model: nn.Module, config: Any, data: Calibration | None) -> None:
    kind = _kind(config)
    if kind in ("corda", "lora_ga") and isinstance(model, PeftModel):
        raise AdapterError(f"{kind} looks at the plain base, and must be the first adapter of a model")
    if kind == "corda":
        if any(hasattr(m, "quant_state") or hasattr(m.weight, "SCB") for m in model.modules() if hasattr(m, "weight")):
            raise AdapterError("corda decomposes the weights themselves and needs a base that is not quantised")
        _find_directions(model, config, need(data, "corda"))
    if kind == "lora_ga":
        seen = need(data, "lora_ga")
        config.lora_ga_config = config.lora_ga_config or LoraGAConfig()
        preprocess_loraga(model, config, partial(_backward, seen, model))


def _backward(data: Calibration, model: nn.Module) -> None:
    for batch in data.batches:
        loss: Any = data.loss(model, batch)
        loss.backward()


@torch.no_grad()
def _find_directions(model: nn.Module, config: Any, data: Calibration) -> None:
    """Leave on each targeted layer what PEFT's corda_init reads.

    The covariance of inputs is ours: PEFT's hook takes one unpadded sequence at a time and only three-dimensional
    inputs. As there, every batch counts the same, scaled by its largest entry.
    """
    try:  # PEFT imports the package attrs there and does not depend on it
        corda: Any = importlib.import_module("peft.tuners.lora.corda")
    except ImportError as error:
        raise AdapterError(f"corda needs a package: {error}", "pip install 'lora-ft[methods]'") from error
    layers: list[Any] = [m for _, m in corda.target_modules(model, config)]
    mask: list[Tensor | None] = [None]

    def gather(layer: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        x = real_rows(inputs[0], mask[0])
        x = x / x.abs().max().clamp_min(1e-12)
        layer.covariance_matrix = layer.covariance_matrix + x.T @ x
        layer.sample_count += 1

    handles = [layer.register_forward_hook(gather) for layer in layers]
    for layer in layers:
        layer.covariance_matrix, layer.sample_count = 0, 0
    for batch in data.batches:
        mask[0] = batch.get("attention_mask")
        data.loss(model, batch)
    for handle in handles:
        handle.remove()
    for name, layer in corda.target_modules(model, config):
        if not layer.sample_count:
            raise AdapterError(f"corda: no data reaches {name}", "leave it out of target_modules")
        layer.covariance_matrix = layer.covariance_matrix / layer.sample_count
        layer.corda_method = config.corda_config.corda_method
        layer.rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    corda.collect_eigens(model, config, False)
    corda.crop_corda_eigens(model, config)
    for layer in layers:
        del layer.covariance_matrix, layer.sample_count, layer.corda_method, layer.rank


def _start(name: str, layer: Any, adapter: str, config: Any) -> None:
    """Fill the adapter of one layer: A = [A0; A0], B = [B0, -B0]."""
    base = layer.get_base_layer()
    weight = base_weight(layer) if adapter in layer.lora_A else torch.empty(0)
    if weight.dim() != 2:
        raise AdapterError(f"init_lora_weights={config.init_lora_weights!r}: {name} is no linear layer")
    r = layer.r[adapter] // 2
    flat = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    stub = nn.Linear(flat.shape[1], flat.shape[0], bias=False, device=weight.device)
    stub.weight.data = flat.contiguous()
    most = min(flat.shape) // (2 if _kind(config) == "lora_ga" else 1)
    if r > most:
        raise AdapterError(f"r={r} is more than {name} allows: it is {tuple(flat.shape)}", f"r: {most} or less")
    for mark in _MARKS:
        if hasattr(base, mark):
            found = getattr(base, mark)
            turned = isinstance(found, Tensor) and getattr(layer, "fan_in_fan_out", False)
            setattr(stub, mark, found.T if turned else found)
            delattr(base, mark)
    alpha = layer.scaling[adapter] * r
    throwaway: Any = LoraLinear(stub, adapter, LoraConfig(r=r, lora_alpha=alpha), r=r, lora_alpha=alpha)
    _initialise(throwaway, adapter, config)
    a0, b0 = throwaway.lora_A[adapter].weight.data, throwaway.lora_B[adapter].weight.data
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    a.data = torch.cat([a0, a0]).to(a.dtype)
    b.data = torch.cat([b0, -b0], 1).to(b.dtype)
    setattr(layer, CONSTANT, {**getattr(layer, CONSTANT, {}), adapter: r})


def _initialise(layer: Any, adapter: str, config: Any) -> None:
    kind = _kind(config)
    with torch.no_grad():
        if kind == "pissa":
            layer.pissa_init(adapter, config.init_lora_weights)
        elif kind == "olora":
            layer.olora_init(adapter)
        elif kind == "corda":
            layer.corda_init(adapter, config.init_lora_weights)
        else:
            layer.lora_ga_init(adapter, config.lora_ga_config)


register_behaviour(Shifted())
register_behaviour(Half())


def _variant(name: str, description: str, init: str, **extra: Any) -> None:
    room = 2 if init == "lora_ga" else 1  # LoRA-GA takes 2r directions of the gradient
    fit = at_most("r", DEFAULTS["r"], lambda i, o: min(i, o) // room)
    defaults, fixed = {**DEFAULTS, **extra}, {"init_lora_weights": init}
    register(Method(name, description, LoraConfig, defaults=defaults, fixed=fixed, fit=fit, family="LoRA"))


_variant("pissa", "LoRA that starts at the largest singular directions of W (arXiv:2404.02948).", "pissa")
_variant("olora", "LoRA that starts at the QR factors of W (arXiv:2406.01775).", "olora")
_variant(
    "corda",
    "LoRA that starts at directions of W weighted by the covariance of your data's activations (arXiv:2406.05223).",
    "corda",
    corda_config=CordaConfig(corda_method="kpm"),
)
_variant(
    "loraga",
    "LoRA that starts along the gradient of full fine-tuning on your data (arXiv:2407.05000).",
    "lora_ga",
    lora_ga_config=LoraGAConfig(),
)
