"""LoRA that looks at the user's data or at the quantisation error before it starts: EVA and LoftQ.

EVA (Paischer et al. 2024, arXiv:2410.07170): A starts at the principal directions of each layer's inputs on the
training data, B at zero; ranks are shared out by explained variance.

LoftQ (Li et al. 2023, arXiv:2310.08659): on a quantised base Q, s B A starts as the best rank-r approximation of W - Q,
so the adapted model starts nearer to the unquantised one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import EvaConfig, LoraLayer
from torch import Tensor, nn

from lora_ft_adapters.behaviour import Behaviour, Calibration, base_weight, need, real_rows, register_behaviour
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.registry import Method, register
from lora_ft_adapters.shapes import at_most

from .lora import DEFAULTS

MOST_PASSES = 50  # over the calibration batches; PEFT's loop has no end of its own


class Eva(Behaviour):
    """Runs PEFT's incremental SVD over the calibration batches."""

    needs_data = True

    def matches(self, config: PeftConfig) -> bool:
        """By init_lora_weights."""
        return isinstance(config, LoraConfig) and config.init_lora_weights == "eva"

    def sketch(self, config: PeftConfig) -> PeftConfig:
        """Plain LoRA; what ranks the data will choose is not known, but their sum."""
        return plain_start(config)

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """A plain LoRA whose A is set from the data; the saved config needs no data any more."""
        seen = need(data, "eva")
        given: Any = config
        if given.trainable_token_indices:
            raise AdapterError("eva does not go with new tokens: PEFT takes their rows for a layer", "use lora")
        _check_size(given, seen)
        calls = iter(range(MOST_PASSES * len(seen.batches)))

        def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
            if next(calls, None) is None:
                raise AdapterError(
                    f"eva: the data's directions have not settled after {MOST_PASSES} passes over the sample",
                    "lower eva_config.tau or eva_config.rho",
                )
            seen.loss(model, batch)

        adapted: Any = super().add(model, config, adapter_name, data)
        initialize_lora_eva_weights(
            adapted,
            dataloader=[dict(b) for b in seen.batches],
            forward_fn=forward,
            prepare_model_inputs_fn=lambda batch, _: batch.get("attention_mask"),
            prepare_layer_inputs_fn=lambda x, mask, _: real_rows(x[0] if isinstance(x, tuple) else x, mask),
            adapter_name=adapter_name,
            show_progress_bar=False,
        )
        made = adapted.peft_config[adapter_name]
        made.init_lora_weights, made.eva_config = True, None
        given.rank_pattern, given.alpha_pattern = made.rank_pattern, made.alpha_pattern
        return adapted  # type: ignore[no-any-return]


def _check_size(config: Any, data: Calibration) -> None:
    """PEFT skips a batch with fewer positions than components, and goes round for ever when all are skipped."""
    needed = round(config.r * config.eva_config.rho)
    small = min(_positions(b) for b in data.batches)
    if small < needed:
        raise AdapterError(
            f"eva needs r x rho = {needed} tokens in every calibration batch, and one has {small}",
            "make r smaller, or give more and longer rows",
        )


def _positions(batch: Mapping[str, Tensor]) -> int:
    """Of a batch: its real tokens, or the vectors of its first tensor."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    first = next(iter(batch.values()))
    return first.numel() // (first.shape[-1] if first.is_floating_point() else 1)


LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}


class LoftQ(Behaviour):
    """Decomposes the quantisation error of each layer."""

    needs_data = True
    changes_outputs = "it starts by correcting the quantisation error"
    corrects_quantisation = True

    def matches(self, config: PeftConfig) -> bool:
        """By init_lora_weights."""
        return isinstance(config, LoraConfig) and config.init_lora_weights == "loftq"

    def sketch(self, config: PeftConfig) -> PeftConfig:
        """Plain LoRA."""
        return plain_start(config)

    def add(self, model: nn.Module, config: PeftConfig, adapter_name: str, data: Calibration | None) -> PeftModel:
        """A plain LoRA with s B A the best rank-r approximation of W - Q."""
        given: Any = config
        original = data.original if data else None
        if original is None:
            raise AdapterError(
                "loftq corrects the error of a quantised base, and needs its original weights too",
                "train with quant: nf4 or int8, or give Calibration(original=...)",
            )
        if given.use_dora:
            raise AdapterError("loftq does not go with DoRA, whose magnitudes would be those of the uncorrected base")
        if given.loftq_config != LOFTQ:
            raise AdapterError(f"loftq_config must be {LOFTQ}: the base is quantised once, as quant says")
        given.init_lora_weights, given.loftq_config = True, {}
        adapted = super().add(model, config, adapter_name, data)
        if not _correct_all(adapted, adapter_name, original):
            raise AdapterError("loftq corrects the error of a quantised base; this base is not quantised", "quant: nf4")
        return adapted


def plain_start(config: Any) -> PeftConfig:
    """The same LoRA, starting as LoRA does."""
    made: PeftConfig = dataclasses.replace(config, init_lora_weights=True, eva_config=None, loftq_config={})
    return made


@torch.no_grad()
def _correct_all(model: nn.Module, adapter: str, original: Any) -> bool:
    """Set A and B of every layer; False when no layer differs from its original."""
    differs = False
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        held = base_weight(layer)
        wanted = original(name.removeprefix("base_model.model.") + ".weight")
        if wanted is None or wanted.shape != held.shape:
            raise AdapterError(f"loftq: the original weight of {name} is missing or of another shape")
        error = wanted.to(held) - held
        differs = differs or bool(error.abs().max() > 1e-6 * wanted.abs().max())
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        r = layer.r[adapter]
        root = s[:r].sqrt()
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        a.data = (root[:, None] * vh[:r]).to(a.dtype)
        b.data = (u[:, :r] * root / layer.scaling[adapter]).to(b.dtype)
    return differs


def _defaults(**extra: Any) -> Mapping[str, Any]:
    return {**DEFAULTS, **extra}


register_behaviour(Eva())
register_behaviour(LoftQ())
register(
    Method(
        "eva",
        "LoRA whose A starts at the principal directions of your data's activations (arXiv:2410.07170).",
        LoraConfig,
        defaults=_defaults(eva_config=EvaConfig()),
        fixed={"init_lora_weights": "eva"},
        fit=at_most("r", DEFAULTS["r"], lambda i, o: i // 2),  # rho = 2 directions for each rank
        family="LoRA",
    )
)
register(
    Method(
        "loftq",
        "LoRA that starts by correcting the error of a quantised base (arXiv:2310.08659).",
        LoraConfig,
        defaults=_defaults(loftq_config=LOFTQ),
        fixed={"init_lora_weights": "loftq"},
        family="LoRA",
    )
)
