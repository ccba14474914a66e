"""What a method needs beyond PEFT's layers: data before it starts, a hand in every step, state of its own.

A file of `methods/` subclasses `Behaviour` and registers an instance; `add_adapter`, `load_adapter` and the training
loop ask for the one whose `matches(config)` is true and never name a method.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from .errors import AdapterError


@dataclass(frozen=True)
class Calibration:
    """The user's data, for methods that look at it before they start.

    Attributes:
        batches: dicts of tensors, on the model's device.
        loss: model, batch -> mean loss, differentiable.
        original: name of a base weight -> its value before the base was quantised; None where that is not known.
    """

    batches: Sequence[Mapping[str, Tensor]]
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    original: Callable[[str], Tensor | None] | None = None


class Driver:
    """A method's hand in the training loop; this one does nothing.

    The loop calls, in each optimizer step: `penalty` once, `before_step` when the gradients are those of the mean loss
    and before they are clipped, `after_step` when the optimizer has moved (gradients are still there).
    """

    needs_all_gradients = False

    def penalty(self) -> Tensor | None:
        """A differentiable term added to the mean loss of the step."""
        return None

    def before_step(self) -> None:
        """Change gradients in place."""

    def after_step(self, step: int) -> None:
        """React to optimizer step number `step`, from 1."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the adapter's tensors."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; the adapter's tensors are in place already."""

    def whole(self) -> AbstractContextManager[None]:
        """A context in which saving and loading keep every tensor in its training shape, for checkpoints."""
        return nullcontext()

    def finish(self) -> None:
        """Training is over: leave the adapter as it is to be saved."""


class Behaviour:
    """How a method is put on a model and trained; the default is PEFT's own way."""

    needs_data = False
    changes_outputs = ""  # why a fresh adapter is not a no-op, or ""
    corrects_quantisation = False  # the adapter holds part of the base: it fits only the quantised one

    def matches(self, config: PeftConfig) -> bool:
        """Whether this config is of the method."""
        raise NotImplementedError

    def prepare(self, config: PeftConfig, total_steps: int) -> None:
        """Fill in what depends on the length of training, before the adapter exists."""

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """Put a fresh adapter on `model`, or beside the adapters that a PeftModel has, and make it the active one."""
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=adapter_name)
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
        return model

    def sketch(self, config: PeftConfig) -> PeftConfig:
        """A config of the same parameters that needs no data, to count them on a model without weights."""
        return config

    def attach(self, model: PeftModel) -> None:
        """What the adapted model needs to run; called after `add` and after loading."""

    def driver(self, model: PeftModel, adapter_name: str) -> Driver:
        """The method's hand in the training loop."""
        return Driver()


class _Plain(Behaviour):
    def matches(self, config: PeftConfig) -> bool:
        return True


_BEHAVIOURS: list[Behaviour] = []


def register_behaviour(behaviour: Behaviour) -> Behaviour:
    """Add a behaviour; it is asked before those registered earlier."""
    _BEHAVIOURS.insert(0, behaviour)
    return behaviour


def behaviour_of(config: PeftConfig) -> Behaviour:
    """The behaviour of an adapter with this config."""
    from .registry import list_methods  # the methods register their behaviours when they are listed

    list_methods()
    return next((b for b in _BEHAVIOURS if b.matches(config)), _Plain())


def driver_of(model: PeftModel, adapter_name: str = "default") -> Driver:
    """The hand in the training loop of an adapter that is on a model."""
    return behaviour_of(model.peft_config[adapter_name]).driver(model, adapter_name)


def need(data: Calibration | None, what: str) -> Calibration:
    """`data`, or the error that says that `what` cannot start without."""
    if data is None or not data.batches:
        raise AdapterError(
            f"{what} looks at training data before it starts, and was given none",
            "train with lora-ft, or add_adapter(model, config, data=Calibration(batches, loss))",
        )
    return data


# Warnings of PEFT that a user can do nothing about, as (message, category).
_NOISE = (
    # It asks Transformers through a name that Transformers 5.23 has renamed.
    (".*is_gradient_checkpointing.*", FutureWarning),
    # A model of a user's own has no Transformers config; PEFT only warns that it cannot read one.
    (".*(config|base_model_name_or_path).*", UserWarning),
    # It offers conversions of files that we make ourselves, and hints on memory while EVA starts.
    (".*path_initial_model_for_weight_conversion.*", UserWarning),
    (".*`?init_lora_weights`? is '(eva|corda|lora_ga)' but .* is not specified.*", UserWarning),
    (".*with eva initialization used with low_cpu_mem", UserWarning),
    # load_adapter refuses such a file by itself.
    ("Found missing adapter keys while loading the checkpoint", UserWarning),
    # AdaLoRA's pattern of kept ranks is not LoRA's pattern of ranks.
    (".*rank_pattern keys.*lora_E", RuntimeWarning),
    # AdaLoRA prunes layers whole; PEFT takes their empty factors for those of a torn distributed run.
    ("Adapter .* LoRA tensor.*have invalid shape", UserWarning),
    # LoRA-GA counts gradients with a hook on modules, and the first of them has no input that needs a gradient.
    ("Full backward hook is firing", UserWarning),
    # BOFT runs in plain torch without its CUDA extension.
    ("Failed to load the CUDA extension", UserWarning),
    ("Setting boft_n_butterfly_factor to 1", UserWarning),
    # Merging refuses with the same words when it is asked for.
    ("Detected that the base layer has no bias term", UserWarning),
    # Norm layers of Transformers are no torch classes; what ln_tuning does with them is tested.
    ("Unsupported layer type .*Norm", UserWarning),
    # Transformers' Conv1D stores its weight transposed; PEFT sees that and says so.
    ("fan_in_fan_out is set to False but the target module is `Conv1D`", UserWarning),
    # A trained head is no longer tied to the embedding; PEFT writes that into the model's config and says so.
    (".*tie_word_embeddings.*", UserWarning),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of PEFT that a user can do nothing about."""
    with warnings.catch_warnings():
        for message, category in _NOISE:
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


def detached(tensor: Tensor) -> Tensor:
    """A copy on the CPU for a checkpoint."""
    return tensor.detach().cpu().contiguous().clone()


def keep_frozen(layer: Any, adapter_name: str, parts: Iterable[str]) -> None:
    """Freeze parts of a PEFT layer's adapter, so that PEFT freezes them again when it switches adapters."""
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: tuple(parts)}
    layer._freeze_non_trainable_peft_weights(adapter_name)


@torch.no_grad()
def base_weight(layer: Any) -> Tensor:
    """A copy of the weight of a tuner layer's base in float32, dequantised if need be; shape as the layer stores it."""
    from peft.utils.integrations import dequantize_module_weight

    base = getattr(layer, "get_base_layer", lambda: layer)()
    weight: Tensor = dequantize_module_weight(base)
    return weight.detach().float().clone()


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """(N, D) float32: a layer's inputs at real positions, whatever shape (..., D) they have."""
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return x[mask.bool()].float()
    return x.reshape(-1, x.shape[-1]).float().contiguous()
