"""The recipe: every key a user may write, its type, its default and one sentence about it.

The sentence feeds the JSON schema, the comments that `lora-ft init` writes, and the docs.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataSection(_Section):
    """Where rows come from and how they become tokens."""

    train: str = Field(
        description="Training rows: a .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file, a folder of these, "
        "a hub dataset id (org/name or org/name:split), or builtin:NAME."
    )
    eval: str | None = Field("10%", description="Held-out rows: the same kinds, or a share such as 10%, or null.")
    format: str = Field("auto", description="Row layout (`lora-ft list formats`), or auto to detect it.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Column names of the format -> names in the file, where they differ."
    )
    max_length: Positive = Field(2048, description="Most tokens in one sample.")
    overlong: Literal["drop", "truncate_prompt", "error"] = Field(
        "drop", description="What to do with a row longer than max_length; an answer is never cut."
    )
    system_prompt: str | None = Field(None, description="Put before every conversation that has no system message.")
    add_tokens: tuple[Annotated[str, Field(pattern=r"\S")], ...] = Field(
        (), description="New tokens for the tokenizer; only their embedding rows train, beside the adapter."
    )
    template: Literal["auto", "none"] = Field(
        "auto", description="auto: the tokenizer's chat template where it has one; none: prompt and answer as they are."
    )


class MethodSection(BaseModel):
    """How the frozen model is adapted: a type and that method's own PEFT options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str = Field("lora", description="Adapter method (`lora-ft list methods`); its PEFT options stand beside it.")

    def options(self) -> dict[str, Any]:
        """All keys but `type`; the method's own config class validates them."""
        return dict(self.model_extra or {})


class EarlyStopping(_Section):
    """When to stop before the last step."""

    patience: Positive = Field(3, description="Evaluations without a better loss before training stops.")
    min_delta: float = Field(0.0, ge=0, description="Smallest fall of the evaluation loss that counts.")


def _stopping(value: Any) -> Any:
    return {"patience": value} if isinstance(value, int) and not isinstance(value, bool) else value


class TrainSection(_Section):
    """The training loop."""

    epochs: float | None = Field(None, gt=0, description="Passes over the training rows (default 3); or give steps.")
    steps: Positive | None = Field(None, description="Optimizer steps; instead of epochs.")
    batch_size: Positive = Field(16, description="Samples per optimizer step, whatever the memory.")
    learning_rate: float = Field(
        2e-4, gt=0, lt=10, description="Peak rate; adapters want about 10x that of full fine-tuning."
    )
    optimizer: Literal["adamw", "sgd", "rmsprop", "adafactor"] = Field("adamw", description="Update rule.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled for adamw; added to the gradient for the others.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "step", "reduce_lr_on_plateau"] = Field(
        "cosine", description="How the rate falls after the warm-up."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises linearly.")
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
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the global gradient norm here; null for never.")
    eval_every: Positive | None = Field(
        None, description="Steps between evaluations; default once an epoch, null with no held-out rows."
    )
    save_every: Positive | None = Field(None, description="Steps between checkpoints; default once an epoch.")
    early_stopping: Annotated[EarlyStopping | None, BeforeValidator(_stopping)] = Field(
        None, description="Stop when the evaluation loss no longer falls: a patience, or {patience, min_delta}."
    )
    tokens_per_micro_batch: Positive | None = Field(
        None, description="Tokens computed at once, padding included; changes memory and speed, never the result."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the frozen base; adapters stay float32. auto: bfloat16 where the hardware has it."
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self


class EvalSection(_Section):
    """How the model is judged before and after training, beside its loss."""

    generate: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="Held-out rows to answer in full for exact match; auto: up to 200 if answers are short."
    )
    max_new_tokens: Positive | None = Field(
        None, description="Most tokens in an answer; default 1.5x the longest reference, at least 16."
    )
    batch_size: Positive = Field(32, description="Answers written at once.")


class Recipe(_Section):
    """A whole run."""

    description: str = Field("", description="One sentence for people.")
    model: str = Field(description="Base model: a hub id, a local folder, a .gguf file, or builtin:NAME.")
    task: str = Field("causal-lm", description="What is learnt (`lora-ft list tasks`).")
    quant: str = Field("none", description="How the frozen base is stored (`lora-ft list quantizers`).")
    data: DataSection = Field(description=str(DataSection.__doc__))
    method: MethodSection = Field(default_factory=MethodSection, description=str(MethodSection.__doc__))
    train: TrainSection = Field(default_factory=TrainSection, description=str(TrainSection.__doc__))
    eval: EvalSection = Field(default_factory=EvalSection, description=str(EvalSection.__doc__))
    seed: int = Field(0, ge=0, lt=2**31, description="Of the split, the order, the adapter's start and dropout.")
    out: str | None = Field(None, description="Run folder; default runs/<recipe name>-<date>-<time>.")

    @model_validator(mode="after")
    def _needs_held_out(self) -> "Recipe":
        train = self.train
        wants = {
            "early_stopping": train.early_stopping,
            "eval_every": train.eval_every,
            "lr_scheduler_type: reduce_lr_on_plateau": train.lr_scheduler_type == "reduce_lr_on_plateau",
        }
        asked = [name for name, value in wants.items() if value]
        if asked and self.data.eval is None:
            raise ValueError(f"train.{asked[0]} needs held-out rows, but data.eval is null")
        return self
