"""What a family of models looks like in GGUF; each file of `families/` describes some."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
from torch import Tensor

from lora_ft.errors import UsageError, did_you_mean

Change = Callable[[str, Tensor, Any], Tensor]


def same(name: str, tensor: Tensor, config: Any) -> Tensor:
    """The tensor as it is."""
    return tensor


def no_more(config: Any) -> Iterable[tuple[str, Tensor]]:
    """No further tensors."""
    return ()


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp and the Transformers models that are written as it.

    Attributes:
        types: `model_type` of their configs.
        arch: llama.cpp's name.
        parameters: writes what the config says.
        change: a tensor of Transformers -> the tensor in the file.
        undo: the way back, for reading what was written.
        rename: a tensor's name before llama.cpp's own table of names is asked.
        leave_out: whether a tensor has no place in the file.
        more: tensors that Transformers computes and the file holds.
        auto_classes: what may be written; a head of another kind has no place in the format.
        rows: what `change` does to the rows of a weight, for the B of a LoRA.
        cannot: why llama.cpp would compute something else than this config says; "" where it does not. Nothing that is
            read back with the config can tell.
        reader: how a file is read back: by Transformers with our config, "alone" by Transformers as another model of
            the same form, or through this "table" where Transformers reads no such file.
    """

    types: tuple[str, ...]
    arch: Any
    parameters: Callable[[Any, Any], None]
    change: Change = same
    undo: Change = same
    rename: Callable[[str], str] = str
    leave_out: Callable[[str], bool] = lambda name: False
    more: Callable[[Any], Iterable[tuple[str, Tensor]]] = no_more
    auto_classes: tuple[str, ...] = ("AutoModelForCausalLM",)
    rows: Change = same
    cannot: Callable[[Any], str] = lambda config: ""
    reader: str = "config"

    def names(self, blocks: int) -> Callable[[str], str]:
        """A function from a tensor's name in Transformers to that in the file.

        Args:
            blocks: number of them.
        """
        table = gguf.get_tensor_name_map(self.arch, blocks)

        def find(name: str) -> str:
            found = table.get_name(self.rename(name), try_suffixes=(".weight", ".bias"))
            if found is None:
                raise UsageError(
                    f"the tensor {name} has no place in a GGUF file of a {gguf.MODEL_ARCH_NAMES[self.arch]} model",
                    fix="lora-ft export --format merged",
                )
            return str(found)

        return find


@cache
def families() -> dict[str, Family]:
    """All of them by `model_type`."""
    folder = importlib.import_module(f"{__package__}.families")
    found: dict[str, Family] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(folder.__path__)):
        for family in importlib.import_module(f"{folder.__name__}.{module}").FAMILIES:
            found |= dict.fromkeys(family.types, family)
    return found


def family_of(config: Any) -> Family:
    """The family of a Transformers config.

    Raises:
        UsageError: it has none.
    """
    kind = str(config.model_type)
    if kind not in families():
        raise UsageError(
            f"a {kind} model cannot be written as GGUF; {did_you_mean(kind, families())}",
            why=f"possible are {', '.join(sorted(families()))}",
            fix="lora-ft export --format merged, then llama.cpp's own converter",
        )
    found = families()[kind]
    if reason := found.cannot(config):
        raise UsageError(f"llama.cpp would answer otherwise: {reason}", fix="--format merged, or --format onnx")
    return found
