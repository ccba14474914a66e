"""Put adapters on a model, freeze the rest, switch, save and load them, and say what trains."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .behaviour import Calibration, behaviour_of, quiet
from .check import check_names
from .errors import AdapterError
from .targets import check_targets, resolve_targets

# What PEFT raises for a model, an option or a file that does not fit.
_MISFITS = (
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    IndexError,
    KeyError,
    RuntimeError,
    AssertionError,
)


def add_adapter(
    model: nn.Module, config: PeftConfig, adapter_name: str = "default", data: Calibration | None = None
) -> PeftModel:
    """Put the adapter that `config` describes on `model`; every other parameter is frozen.

    Args:
        model: any module, or a PeftModel that gets a further adapter beside those it has; the new one is active.
        config: from `build_config`, or any PEFT config.
        adapter_name: names the adapter where there are several.
        data: for methods that look at training data before they start (EVA, CorDA, LoRA-GA, LoftQ).

    Raises:
        AdapterError: a target that matches nothing, options that PEFT refuses for this model, or nothing to train.
    """
    if "." in adapter_name or not adapter_name:
        raise AdapterError(f"adapter name {adapter_name!r}: a dot would split it in the saved tensors' names")
    targets: Any = getattr(config, "target_modules", None)
    check_targets(model, targets)
    check_names(model, config)
    if targets and not isinstance(targets, str):
        config.__dict__["target_modules"] = set(resolve_targets(model, targets))
    try:
        with quiet():
            adapted = _put(model, config, adapter_name, data)
    except AdapterError:
        raise
    except _MISFITS as error:
        why = str(error) or type(error).__name__
        raise AdapterError(f"the adapter does not fit this model: {why}", "check its options and targets") from error
    if not any(p.numel() for _, p in trainable(adapted)):
        raise AdapterError("nothing is trainable: the adapter added no parameters", "check its options and targets")
    return adapted


def _put(model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
    behaviour = behaviour_of(config)
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise AdapterError(f"there is an adapter called {adapter_name!r} already", "choose another adapter_name")
    adapted = behaviour.add(model, config, adapter_name, data)
    behaviour.attach(adapted)
    _show_sizes(adapted)
    return adapted


def _show_sizes(model: nn.Module) -> None:
    """Let PEFT's wrappers of convolutions tell stride, kernel and the like, as MobileNetV2 reads them to pad."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), _ConvNd):
            for name in _ConvNd.__constants__:
                if not hasattr(layer, name):
                    setattr(layer, name, getattr(layer.get_base_layer(), name))


def load_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Put the adapter saved in `folder` (PEFT's layout) on `model`, frozen, in evaluation mode.

    Args:
        model: any module, or a PeftModel that gets a further adapter; the loaded one is active.
        folder: with adapter_config.json and adapter_model.safetensors.
        adapter_name: any name, whatever it was called when it was saved.

    Raises:
        AdapterError: the folder holds no adapter, or one that does not fit this model.
    """
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise AdapterError(f"{folder} has no adapter_model.safetensors; adapters in pickle files are not read")
    try:
        with quiet():
            config = read_config(folder)
            if isinstance(model, PeftModel):
                adapted = model
                adapted.load_adapter(str(folder), adapter_name)
                adapted.set_adapter(adapter_name, inference_mode=True)
            else:
                adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name, config=config)
            _check_complete(adapted, Path(folder), adapter_name)
            behaviour_of(config).attach(adapted)
            _show_sizes(adapted)
    except (*_MISFITS, OSError, SafetensorError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"the adapter cannot be loaded: {_first(error)}") from error
    return adapted.eval()


def _first(error: Exception) -> str:
    """What is wrong, without the rest of a long list; torch's own heading says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    wrong = [line for line in lines if line.startswith("size mismatch for ")]
    if not wrong:
        return lines[0]
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"the base has other shapes than the one it was trained on: {' '.join(wrong[:3])}{more}"


def read_config(folder: str | Path) -> PeftConfig:
    """The PEFT config saved in `folder`; methods of ours are registered first."""
    from .registry import list_methods

    list_methods()
    try:
        kind = PeftConfig._get_peft_type(str(folder))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{folder}: adapter_config.json is damaged, or not an adapter's: no peft_type") from error
    known = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise AdapterError(f"the adapter is of type {kind!r}, which neither PEFT nor this version knows")
    config: PeftConfig = known[kind].from_pretrained(str(folder))
    config.inference_mode = True
    return config


def _check_complete(model: PeftModel, folder: Path, adapter_name: str) -> None:
    """PEFT loads what is there and only warns of a tensor that is missing or that belongs to nothing."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    wanted = set(state_of(model, adapter_name))
    # PEFT itself may have saved whole embeddings beside the adapter; they are loaded into the base.
    extra = [k for k in saved - wanted if not k.endswith(("embed_tokens.weight", "lm_head.weight"))]
    if wanted - saved or extra:
        what = f"lacks {min(wanted - saved)}" if wanted - saved else f"has the unknown tensor {min(extra)}"
        raise AdapterError(f"the adapter file {what}", "the file is damaged, or of another version of the adapter")


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default", base: str = "") -> Path:
    """Write one adapter in PEFT's layout into `folder` itself, whatever its name; returns the folder.

    Args:
        model: with the adapter.
        folder: made if need be.
        adapter_name: which adapter.
        base: what the config says it belongs to, never a path of this machine.

    Raises:
        AdapterError: there is no adapter of this name.
    """
    if adapter_name not in model.peft_config:
        raise AdapterError(f"there is no adapter {adapter_name!r}; there are: {', '.join(model.peft_config)}")
    folder = Path(folder)
    model.peft_config[adapter_name].base_model_name_or_path = base
    with quiet():
        model.save_pretrained(
            str(folder), safe_serialization=True, save_embedding_layers=False, selected_adapters=[adapter_name]
        )
    inner = folder / adapter_name
    if adapter_name != "default" and inner.is_dir():  # PEFT puts every adapter but "default" into a folder of its own
        for path in inner.iterdir():
            path.replace(folder / path.name)
        inner.rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of empty headings
    return folder


def state_of(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors that are saved for an adapter, by the names they are saved under."""
    held: dict[str, Tensor]
    with quiet():
        held = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return held


def unsaved(model: PeftModel, adapter_name: str = "default") -> list[str]:
    """Names of parameters that train but would not be saved.

    PEFT keeps of a prompt network only what it puts out, which is all that is needed to use it.
    """
    if model.peft_config[adapter_name].is_prompt_learning:
        return []
    kept = {t.data_ptr() for t in state_of(model, adapter_name).values()}
    return [n for n, p in trainable(model) if p.numel() and p.data_ptr() not in kept]


@contextmanager
def active(model: PeftModel, *adapter_names: str) -> Iterator[PeftModel]:
    """In this context exactly these adapters are active, and none when no name is given; then as before."""
    if not adapter_names:
        grads = {n: p.requires_grad for n, p in model.named_parameters()}
        try:
            with model.disable_adapter():
                yield model
        finally:  # PEFT unfreezes every tensor of the adapter again, also those that its method keeps frozen
            for name, p in model.named_parameters():
                p.requires_grad_(grads[name])
        return
    unknown = [n for n in adapter_names if n not in model.peft_config]
    if unknown:
        raise AdapterError(f"there is no adapter {unknown[0]!r}; there are: {', '.join(model.peft_config)}")
    before = model.active_adapters
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    _activate(model, list(adapter_names))
    try:
        yield model
    finally:
        _activate(model, list(before))
        for name, p in model.named_parameters():
            p.requires_grad_(grads[name])


def _activate(model: PeftModel, names: list[str]) -> None:
    if len(names) == 1:
        model.set_adapter(names[0])
    else:
        tuner: Any = model.base_model
        tuner.set_adapter(names)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of all that training will change."""
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of parameters; a 4-bit weight counts as the numbers it stands for."""
    train = total = 0
    for p in model.parameters():
        shape = getattr(getattr(p, "quant_state", None), "shape", p.shape)
        size = int(shape.numel())
        total += size
        train += size if p.requires_grad else 0
    return train, total
