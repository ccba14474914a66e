"""Which tensor of a checkpoint is which tensor of the model, by Transformers' own rules."""

from collections.abc import Iterable
from typing import Any

from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping


def natural(key: str) -> list[Any]:
    """Sorts layer 2 before layer 10, as Transformers reads them: some of its rules depend on the order."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def model_names(model: Any, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Model's tensor -> (its key in the files, whether that key is also what the model would save it as).

    Tensors that several of the files' make up together (stacked experts) are left out, and so are those of the files
    that the model has not.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, core_model_loading.WeightRenaming)]
    converters = [r for r in rules if isinstance(r, core_model_loading.WeightConverter)]
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", "") or None
    found: dict[str, tuple[str, bool]] = {}
    for key in sorted(keys, key=natural):
        plain, converted = core_model_loading.rename_source_key(key, renamings, converters)
        name, _ = core_model_loading.rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            plain = name = key
            converted = None
        if name in state and converted is None:
            found[name] = (key, plain == name)
    return found
