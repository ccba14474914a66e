"""The train section of a recipe."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, FiniteFloat, ValidationInfo, field_validator, model_validator

from lora_ft.errors import did_you_mean

from ._section import Positive, Section

# Which optimizers look at which key; the others would ignore it. The names with a number of bits are Transformers'.
ADAMS = ("adam", "adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
LIONS = ("lion_8bit", "paged_lion_32bit", "paged_lion_8bit")
OPTIMIZER_KEYS = {
    "momentum": ("sgd", "rmsprop"),
    "adam_beta1": ADAMS + LIONS,
    "adam_beta2": ADAMS + LIONS,
    "adam_epsilon": ADAMS,
}


class ScheduleOption(NamedTuple):
    """One number of a schedule: its default, and what it may be, as a sentence and as a check."""

    default: float
    allowed: str
    fits: Callable[[float], bool]


# The names are those of torch's schedulers, which Transformers passes on under the same key.
SCHEDULE_OPTIONS: dict[str, dict[str, ScheduleOption]] = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "step": {
        "step_size": ScheduleOption(
            1 / 3,
            "a share of the steps below 1, or a whole number of steps",
            lambda v: v > 0 and (v < 1 or v.is_integer()),
        ),
        "gamma": ScheduleOption(0.1, "above 0 and at most 1", lambda v: 0 < v <= 1),
    },
    "one_cycle": {
        "pct_start": ScheduleOption(0.3, "0 to 1", lambda v: 0 <= v <= 1),
        "div_factor": ScheduleOption(25.0, "above 0", lambda v: v > 0),
        "final_div_factor": ScheduleOption(1e4, "above 0", lambda v: v > 0),
    },
    "reduce_lr_on_plateau": {
        "factor": ScheduleOption(0.5, "above 0 and below 1", lambda v: 0 < v < 1),
        "patience": ScheduleOption(0.0, "a whole number from 0", lambda v: v >= 0 and v.is_integer()),
        "threshold": ScheduleOption(1e-4, "from 0 and below 1", lambda v: 0 <= v < 1),
    },
}


class EarlyStopping(Section):
    """When to stop before the last step."""

    patience: Positive = Field(3, description="Evaluations without a better value before training stops.")
    min_delta: float = Field(
        0.0, ge=0, description="Smallest improvement of metric_for_best_model that counts, in its own unit."
    )


def _stopping(value: Any) -> Any:
    return {"patience": value} if isinstance(value, int) and not isinstance(value, bool) else value


class TrainSection(Section):
    """The training loop."""

    epochs: float | None = Field(None, gt=0, description="Passes over the training rows (default 3); or give steps.")
    steps: Positive | None = Field(None, description="Optimizer steps; instead of epochs.")
    batch_size: Positive = Field(16, description="Samples per optimizer step, whatever the memory.")
    learning_rate: float = Field(
        2e-4, gt=0, lt=10, description="Peak rate; adapters want about 10x that of full fine-tuning."
    )
    optimizer: Literal[
        "adamw", "adam", "sgd", "rmsprop", "adafactor", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
        "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    ] = Field(
        "adamw",
        description="Update rule. 8bit: state of large tensors in 8 bits; paged: state moves to the computer's memory "
        "when the GPU is full. Both need bitsandbytes, paged also a GPU.",
    )  # fmt: skip
    momentum: float | None = Field(
        None, ge=0, lt=1, description="Of sgd (default 0.9) and rmsprop (default 0, as in torch)."
    )
    adam_beta1: float | None = Field(
        None, ge=0, lt=1, description="Decay of the mean of gradients of the adam and lion family (default 0.9)."
    )
    adam_beta2: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Decay of the adam family's mean of squared gradients (default 0.999), and of what the lion "
        "family keeps (default 0.99).",
    )
    adam_epsilon: float | None = Field(
        None, ge=0, description="Added to the denominator of the adam family (default 1e-8)."
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled for the adamw and lion family; added to the gradient for the others."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "step", "one_cycle", "reduce_lr_on_plateau"] = Field(
        "cosine", description="How the rate falls after the warm-up; one_cycle has a rise of its own."
    )
    lr_scheduler_kwargs: dict[str, FiniteFloat] = Field(
        default_factory=dict,
        description="Of the schedule. step: step_size (steps, or below 1 a share of those after the warm-up; 1/3), "
        "gamma (0.1). one_cycle: pct_start (0.3), div_factor (25), final_div_factor (10000). "
        "reduce_lr_on_plateau: factor (0.5), patience in evaluations (0), threshold as a share (0.0001).",
    )
    warmup_ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the steps in which the rate rises linearly (default 0.03); not for one_cycle.",
    )
    layer_lr_decay: float | None = Field(
        None, gt=0, le=1, description="Factor on the rate from each block to the next lower one; null for none."
    )
    lr_multipliers: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Glob over parameter names -> factor on the rate; the first match counts."
    )
    unfreeze_every: Positive | None = Field(
        None,
        description="Gradual unfreezing: steps until the next lower block trains too; null for all at once.",
    )
    calibration_rows: Positive = Field(
        64, description="Training rows that methods which start from data (eva, corda, loraga) look at."
    )
    probes: Positive = Field(4, description="Held-out samples whose answers are kept to prove the adapter by later.")
    probe_text: bool = Field(True, description="Keep their inputs too; false keeps their hashes and the answers alone.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the global gradient norm here; null for never.")
    eval_every: Positive | None = Field(
        None, description="Steps between evaluations; default once an epoch, null with no held-out rows."
    )
    save_every: Positive | None = Field(None, description="Steps between checkpoints; default once an epoch.")
    metric_for_best_model: str = Field(
        "loss",
        description="Held-out metric that picks the adapter to keep, and that early stopping and "
        "reduce_lr_on_plateau follow.",
    )
    early_stopping: Annotated[EarlyStopping | None, BeforeValidator(_stopping)] = Field(
        None, description="Stop when that metric no longer improves: a patience, or {patience, min_delta}."
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Of the base's own dropout layers, all of them; null: as the model's config says.",
    )
    few_shot: bool = Field(
        False,
        description="For a few labels a class: the frozen part is computed once for all rows, and only the new head "
        "is fitted, to the end.",
    )
    tokens_per_micro_batch: Positive | None = Field(
        None, description="Tokens computed at once, padding included; changes memory and speed, never the result."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the frozen base; adapters stay float32. auto: bfloat16 where the hardware has it."
    )

    @field_validator(*OPTIMIZER_KEYS)
    @classmethod
    def _optimizer_uses_it(cls, value: float | None, info: ValidationInfo) -> float | None:
        users, chosen = OPTIMIZER_KEYS[str(info.field_name)], info.data.get("optimizer")
        if value is not None and chosen is not None and chosen not in users:
            raise ValueError(f"optimizer {chosen} does not use it, only {' and '.join(users)} do; leave it out or null")
        return value

    @field_validator("lr_scheduler_kwargs")
    @classmethod
    def _schedule_knows_them(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        chosen = info.data.get("lr_scheduler_type")
        known = SCHEDULE_OPTIONS.get(str(chosen))
        if known is None:  # an unknown schedule is a problem of its own
            return value
        for name, number in value.items():
            if not known:
                raise ValueError(f"{chosen} takes none, so leave {name!r} out")
            if name not in known:
                raise ValueError(f"{chosen} has no {name!r}; {did_you_mean(name, known)}")
            if not known[name].fits(number):
                raise ValueError(f"{name} of {chosen} must be {known[name].allowed}")
        return value

    @field_validator("warmup_ratio")
    @classmethod
    def _one_cycle_has_its_own(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("lr_scheduler_type") == "one_cycle":
            raise ValueError("one_cycle has its own rise; leave it out or null, and set lr_scheduler_kwargs.pct_start")
        return value

    def schedule_options(self) -> dict[str, float]:
        """`lr_scheduler_kwargs`, with the schedule's defaults for what was left out."""
        return {n: o.default for n, o in SCHEDULE_OPTIONS[self.lr_scheduler_type].items()} | self.lr_scheduler_kwargs

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self
