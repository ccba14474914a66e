"""Put one saved adapter in the place of another, with no module built anew."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .apply import read_config, state_of
from .behaviour import quiet
from .errors import AdapterError
from .weights import read_file

# What may differ between two adapters of one form.
_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")


class AdapterSlot:
    """The place of a loaded adapter, whose numbers those of other saved adapters of the same form can take.

    What `load_adapter` does in tenths of seconds, mostly by building modules, `put` does in the time in which the
    file is read: for serving many adapters on one base. The model keeps its modules, so what holds on to them stays
    valid.

    Args:
        model: with the adapter, from `load_adapter` or `add_adapter`.
        adapter_name: which one.

    Raises:
        AdapterError: there is none of this name, or its saved form is not what the model computes with.
    """

    def __init__(self, model: PeftModel, adapter_name: str = "default") -> None:
        if adapter_name not in model.peft_config:
            raise AdapterError(f"there is no adapter {adapter_name!r}; there are: {', '.join(model.peft_config)}")
        self._config = _form(model.peft_config[adapter_name])
        with quiet():
            self._places = {n: t.detach() for n, t in state_of(model, adapter_name).items()}
        own = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
        foreign = [n for n, t in self._places.items() if t.numel() and t.data_ptr() not in own]
        if foreign:
            raise AdapterError(
                f"{foreign[0]} of the adapter's file is not a tensor that the model computes with",
                "load_adapter under another name",
            )
        self._layers: tuple[nn.Module, ...] = tuple(m for m in model.modules() if isinstance(m, BaseTunerLayer))

    def put(self, folder: str | Path) -> None:
        """Give the adapter the numbers of the one saved in `folder`; nothing changes where that cannot be done.

        Raises:
            AdapterError: the folder holds no adapter, or one of another form; or the model's is merged at present.
        """
        folder = Path(folder)
        with quiet():
            theirs = _form(read_config(folder))
        differs = sorted(k for k in theirs.keys() | self._config.keys() if theirs.get(k) != self._config.get(k))
        if differs:
            raise AdapterError(
                f"the adapter in {folder} has another {differs[0]} than the one whose place it is to take",
                "load_adapter under another name",
            )
        found = read_file(folder / "adapter_model.safetensors")
        self._check(folder, found)
        with torch.no_grad():
            places = list(self._places.values())
            torch._foreach_copy_(places, [found[n].to(p.device, non_blocking=True) for n, p in self._places.items()])

    def _check(self, folder: Path, found: dict[str, Tensor]) -> None:
        lost, more = self._places.keys() - found.keys(), found.keys() - self._places.keys()
        if lost or more:
            what = f"lacks {min(lost)}" if lost else f"has the unknown tensor {min(more)}"
            raise AdapterError(f"the adapter in {folder} {what}", "the file is damaged")
        wrong = [n for n, t in found.items() if t.shape != self._places[n].shape]
        if wrong:
            raise AdapterError(f"{wrong[0]} of the adapter in {folder} has shape {tuple(found[wrong[0]].shape)}")
        if any(getattr(layer, "merged", False) for layer in self._layers):
            raise AdapterError("the adapter is merged into its base at present", "unmerge it first")


def _form(config: PeftConfig) -> dict[str, Any]:
    """All of a config that the saved tensors have to fit, in plain values."""
    plain = {k: v for k, v in config.to_dict().items() if k not in _ORIGIN}
    return {k: sorted(v, key=str) if isinstance(v, set | frozenset | list) else v for k, v in plain.items()}
