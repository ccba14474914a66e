"""What adapter formats of other programs share: a LoRA of plain matrices A and B on linear layers, and nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lora_ft.artifact import Subject
from lora_ft.errors import UsageError
from lora_ft.exports.mergeable import KEPT_APART, check_mergeable, sketch
from lora_ft_adapters.modules import is_linear

CONVERT = "lora-ft convert RUN --out DIR makes a plain LoRA of it; or --format merged"
Factors = dict[str, tuple[Tensor, Tensor]]  # module -> A (r, in), B (out, r) with the scaling in it


def check_plain_lora(subject: Subject, program: str) -> None:
    """Refuse an adapter that is more than a plain LoRA.

    Args:
        subject: the adapter.
        program: who would read it, for the message.

    Raises:
        UsageError: with the reason, and the nearest way out.
    """
    config = subject.adapter
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UsageError(f"{program} reads LoRA alone, and this is {subject.method}", fix=_way_out(subject))
    odd = {
        "use_dora": bool(config.use_dora),
        "bias": config.bias not in ("none", False),
        "lora_bias": bool(getattr(config, "lora_bias", False)),
        "modules_to_save": bool(_held(subject)),
        "trainable_token_indices": bool(getattr(config, "trainable_token_indices", None)),
        "target_parameters": bool(getattr(config, "target_parameters", None)),
        "layer_replication": bool(getattr(config, "layer_replication", None)),
    }
    wrong = [name for name, is_odd in odd.items() if is_odd]
    if wrong:
        fix = "--format merged" if set(wrong) & {"modules_to_save", "trainable_token_indices"} else CONVERT
        raise UsageError(f"{program} has no place for {wrong[0]} of this adapter", fix=fix)
    if subject.new_tokens:
        raise UsageError(f"{program} has no place for new tokens in an adapter", fix="--format merged")


def _way_out(subject: Subject) -> str:
    try:
        check_mergeable(subject)
    except UsageError:
        return KEPT_APART
    return CONVERT


def check_original(subject: Subject, program: str) -> None:
    """Refuse an adapter that does not fit the original weights, for a program that brings those.

    Raises:
        UsageError: with the nearest way out.
    """
    if subject.corrects_quantisation:
        raise UsageError(
            f"{program} would put it on the original weights, and a {subject.method} adapter holds the error of its "
            "quantised base, which they do not have",
            fix="--format merged --into dequantised",
        )


def _held(subject: Subject) -> list[str]:
    """Modules that are saved whole; PEFT also names some that a model does not have."""
    wanted = getattr(subject.adapter, "modules_to_save", None) or ()
    names = [n for n, _ in subject.model.named_modules()] if subject.model is not None else []
    return [m for m in wanted if any(f".{n}".endswith(f".{m}") for n in names)]


def check_linear(subject: Subject, program: str) -> list[str]:
    """Names of the adapted layers, all of which must be linear; found on the modules without weights."""
    layers = _layers(sketch(subject), "default")
    for name, layer in layers:
        base: Any = layer.get_base_layer()
        if not is_linear(base):
            fix = "leave it out of target_modules, or --format merged"
            kind = type(base).__name__
            raise UsageError(f"{program} takes LoRA on linear layers alone, and {name} is a {kind}", fix=fix)
    return [n for n, _ in layers]


def _layers(model: Any, adapter: str) -> list[tuple[str, Any]]:
    modules = model.get_base_model().named_modules()
    return [(n, m) for n, m in modules if isinstance(m, LoraLayer) and adapter in m.scaling]


def factors(model: Any, adapter: str = "default") -> Factors:
    """The matrices of every LoRA layer of a PeftModel, float32 on the CPU."""
    found: Factors = {}
    for name, layer in _layers(model, adapter):
        a, b = (side[adapter].weight.detach().float().cpu() for side in (layer.lora_A, layer.lora_B))
        found[name] = (a, b * float(layer.scaling[adapter]))
    return found


def one_rank(found: Factors) -> Factors:
    """The same with one rank for all: smaller ones get rows and columns of zeros."""
    rank = max(a.shape[0] for a, _ in found.values())
    return {
        name: (nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])), nn.functional.pad(b, (0, rank - b.shape[1])))
        for name, (a, b) in found.items()
    }


def put_back(model: Any, found: Mapping[str, tuple[Tensor, Tensor]], adapter: str = "default") -> Any:
    """A PeftModel with its LoRA matrices replaced by these, to run what a file holds.

    Raises:
        KeyError: a layer is missing.
    """
    with torch.no_grad():
        for name, layer in _layers(model, adapter):
            a, b = found[name]
            rank = layer.lora_A[adapter].weight.shape[0]
            if bool(a[rank:].any()) or bool(b[:, rank:].any()):
                raise KeyError(f"{name} has a higher rank in the file")
            for side, value in ((layer.lora_A, a[:rank]), (layer.lora_B, b[:, :rank] / layer.scaling[adapter])):
                side[adapter].weight.copy_(value.to(side[adapter].weight))
    return model.eval()
