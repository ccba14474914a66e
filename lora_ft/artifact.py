"""What an export is given: an adapter on its base, and the inputs by which what it writes is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lora_ft_adapters.weights import Weights

    from .records import Batch


@dataclass(frozen=True)
class Probe:
    """One input on which artifacts are compared, with what the base and the adapter on it answer.

    Attributes:
        inputs: a batch of one, as the task's `outputs` takes it.
        base: the outputs without the adapter.
        adapted: the outputs with the adapter.
    """

    inputs: Mapping[str, Tensor]
    base: Tensor
    adapted: Tensor


@dataclass(frozen=True)
class Subject:
    """What is known of an adapter before any weight is read; by it an export format says whether it can take it.

    Attributes:
        task: name of the task.
        auto_class: Transformers' auto class of the base; None where a function builds it.
        method: name of the method in the recipe.
        adapter: its PEFT config.
        model: the base's modules without weights (meta device), with config and generation config.
        new_tokens: whether tokens were added.
        options: the task's, as the recipe sets them.
        processor: the base's tokenizer or processor; None where there is none.
        corrects_quantisation: whether the adapter holds the error of its quantised base (LoftQ), and fits only that.
    """

    task: str
    auto_class: str | None
    method: str
    adapter: Any
    model: Any
    new_tokens: bool = False
    options: Any = None
    processor: Any = None
    corrects_quantisation: bool = False

    @property
    def pooling(self) -> str:
        """Which token vectors make a text's: mean, cls or last; "" where none are pooled."""
        return str(getattr(self.options, "pooling", ""))


@dataclass(frozen=True)
class Artifact:
    """A trained adapter on its base, ready to be exported. What is large is made when it is asked for.

    Attributes:
        subject: what it is.
        folder: the adapter in PEFT's layout.
        processor: the tokenizer or processor.
        base: the base model as the recipe names it, never a path of this machine.
        outputs: the task's answer to a batch, by which artifacts are compared.
        dtype: what numbers are written in, one of the format's `dtypes`; "" for a format that has none.
        generation: settings that its generation config needs.
        merged: the merged model's tensors by the names of its files, in float32 or in the base's own dtype where the
            adapter changes nothing; raises UsageError for a method that cannot be merged.
        unmerged: the base's own tensors in the same way.
        load_base: the plain base in memory, as `load_adapted` has it.
        load_adapted: the PeftModel on its base in memory.
        inputs: of one probe, as the task's `outputs` takes them.
        read_model: a model from a folder in Transformers' layout, with little memory.
        system: the system text that every training row had; "" for none.
    """

    subject: Subject
    folder: Path
    processor: Any
    base: str
    outputs: Callable[[Any, Batch], Tensor]
    dtype: str
    generation: Mapping[str, Any]
    merged: Callable[[], Weights]
    unmerged: Callable[[], Weights]
    load_base: Callable[[], Any]
    load_adapted: Callable[[], Any]
    inputs: Mapping[str, Tensor]
    read_model: Callable[[Path], Any]
    system: str = ""
