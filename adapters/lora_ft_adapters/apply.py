"""Put an adapter on a model, freeze the rest, and say what trains."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn

from .errors import AdapterError
from .targets import check_targets


def add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> PeftModel:
    """Wrap `model` with the adapter that `config` describes; every other parameter is frozen.

    Raises:
        AdapterError: a target that matches nothing, options that PEFT refuses for this model, or nothing to train.
    """
    check_targets(model, getattr(config, "target_modules", None))
    try:
        with _quiet():
            adapted = get_peft_model(model, config, adapter_name=adapter_name)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise AdapterError(f"the adapter does not fit this model: {error}", "check target_modules") from error
    if hasattr(adapted.base_model, "update_and_allocate"):
        raise AdapterError("this method moves rank between layers while it trains, which the loop does not drive yet")
    if not any(True for _ in trainable(adapted)):
        raise AdapterError("nothing is trainable: the adapter added no parameters", "check target_modules")
    return adapted


def load_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Put the adapter saved in `folder` (PEFT's layout) on `model`, frozen, in evaluation mode.

    Raises:
        AdapterError: the folder holds no adapter, or one that does not fit this model.
    """
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise AdapterError(f"{folder} has no adapter_model.safetensors; adapters in pickle files are not read")
    try:
        with _quiet():
            adapted: PeftModel = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise AdapterError(f"the adapter cannot be loaded: {str(error).splitlines()[0]}") from error
    return adapted.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT asks Transformers through a name that Transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # A model of a user's own has no Transformers config; PEFT only warns that it cannot read one.
        warnings.filterwarnings("ignore", message=".*(config|base_model_name_or_path).*", category=UserWarning)
        yield


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
