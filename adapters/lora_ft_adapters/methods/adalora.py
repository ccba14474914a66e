"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): W + P L Q, whose singular values L are pruned while it trains.

The rank budget falls from init_r to target_r along a cubic schedule over the steps that training really takes: no
pruning in the first tenth, none in the last three tenths, in between every `deltaT` steps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel
from torch import Tensor

from lora_ft_adapters.behaviour import Behaviour, Driver, detached, register_behaviour
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.registry import Method, register

AUTO = -1  # of tinit and tfinal: set from the number of steps
WARMUP, FINAL = 0.1, 0.3  # shares of the steps without pruning, at the start and at the end
_KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class _Budget(Driver):
    """Moves rank between layers, and keeps P and Q near orthogonal."""

    needs_all_gradients = True

    def __init__(self, model: PeftModel, name: str) -> None:
        self.tuner: Any = model.base_model
        self.config: Any = model.peft_config[name]
        self.part = f"lora_E.{name}"
        part = (f"lora_A.{name}", f"lora_B.{name}")
        self.factors = [(n, p) for n, p in model.named_parameters() if any(x in n for x in part)]

    def penalty(self) -> Tensor:
        """orth_reg_weight x mean over P and Q of |Q Q^T - I|_F."""
        total = torch.zeros((), device=self.factors[0][1].device)
        for name, p in self.factors:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            total = total + torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device, dtype=p.dtype))
        scaled: Tensor = self.config.orth_reg_weight * total / len(self.factors)
        return scaled

    def after_step(self, step: int) -> None:
        """Update importances and the budget."""
        self.tuner.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        """Importances and the rank pattern."""
        allocator = self.tuner.rankallocator
        found = {f"{k}/{n}": detached(t) for k in _KINDS for n, t in getattr(allocator, k).items()}
        pattern = {f"rank/{n}": torch.tensor(v, dtype=torch.uint8) for n, v in (self.config.rank_pattern or {}).items()}
        return found | pattern

    @contextmanager
    def whole(self) -> Iterator[None]:
        """PEFT cuts pruned ranks away when it saves, and resizes the layers when it loads."""
        held, self.config.rank_pattern = self.config.rank_pattern, None
        try:
            yield
        finally:
            self.config.rank_pattern = held

    def finish(self) -> None:
        """The rank pattern is what is not zero; between two prunings a pruned value may have moved again."""
        kept = {
            n: p.detach().ne(0).flatten().tolist() for n, p in self.tuner.model.named_parameters() if self.part in n
        }
        self.config.rank_pattern = kept if not all(all(v) for v in kept.values()) else None

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put importances and the rank pattern back."""
        device = self.factors[0][1].device
        allocator = self.tuner.rankallocator
        allocator.reset_ipt()
        pattern: dict[str, list[bool]] = {}
        for key, value in state.items():
            kind, name = key.split("/", 1)
            if kind == "rank":
                pattern[name] = value.bool().tolist()
            else:
                getattr(allocator, kind)[name] = value.to(device)
        self.config.rank_pattern = pattern or None


class AdaLora(Behaviour):
    """Gives PEFT the number of steps, and keeps its penalty out of the reported loss."""

    def matches(self, config: PeftConfig) -> bool:
        """AdaLoRA's config class."""
        return isinstance(config, AdaLoraConfig)

    def prepare(self, config: PeftConfig, total_steps: int) -> None:
        """Fit the schedule to the steps of this training, where the user left it open."""
        made: Any = config
        if total_steps < 4:
            raise AdapterError(f"adalora prunes while it trains, and {total_steps} steps are too few; at least 4")
        if made.target_r > made.init_r:
            raise AdapterError(
                f"adalora prunes from init_r {made.init_r} to target_r {made.target_r}: give a smaller one"
            )
        if made.deltaT < 1:
            raise AdapterError(f"adalora: deltaT is {made.deltaT}, and must be at least 1")
        made.total_step = total_steps
        made.tinit = round(WARMUP * total_steps) if made.tinit == AUTO else made.tinit
        made.tfinal = round(FINAL * total_steps) if made.tfinal == AUTO else made.tfinal
        if made.tinit + made.tfinal >= total_steps:
            raise AdapterError(
                f"adalora: tinit {made.tinit} + tfinal {made.tfinal} leave no step of {total_steps} to prune in",
                "make them smaller or train longer",
            )

    def attach(self, model: PeftModel) -> None:
        """PEFT adds the penalty to any loss that the model returns, also in evaluation; the driver adds it instead."""
        tuner: Any = model.base_model
        tuner.forward = tuner.model.forward
        for name, p in model.named_parameters():
            if ".ranknum." in name:  # a constant that PEFT unfreezes when it casts it on a 16-bit base
                p.requires_grad_(False)

    def driver(self, model: PeftModel, adapter_name: str) -> Driver:
        """The budget."""
        return _Budget(model, adapter_name)


register_behaviour(AdaLora())
register(
    Method(
        "adalora",
        "LoRA as an SVD whose singular values are pruned while it trains, so rank goes where it helps.",
        AdaLoraConfig,
        # As PEFT's, but pruned from 12 to 8 and sooner: deltaT 1 leaves even short trainings enough prunings.
        defaults={"total_step": 10**9, "tinit": AUTO, "tfinal": AUTO, "deltaT": 1, "lora_alpha": 32},
        family="LoRA",
    )
)
