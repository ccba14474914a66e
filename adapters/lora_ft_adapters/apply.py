"""Put an adapter on a model, freeze the rest, and say what trains."""

import warnings
from collections.abc import Iterator

from peft import PeftConfig, PeftModel, get_peft_model
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
        with warnings.catch_warnings():
            # PEFT asks Transformers through a name that Transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # A model of a user's own has no Transformers config; PEFT only warns that it cannot read one.
            warnings.filterwarnings("ignore", message=".*(config|base_model_name_or_path).*", category=UserWarning)
            adapted = get_peft_model(model, config, adapter_name=adapter_name)  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"the adapter does not fit this model: {error}", "check target_modules") from error
    if not any(True for _ in trainable(adapted)):
        raise AdapterError("nothing is trainable: the adapter added no parameters", "check target_modules")
    return adapted


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
