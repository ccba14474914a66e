"""The recipe: every key a user may write, its type, its default and one sentence about it.

The sentence feeds the JSON schema, the comments that `lora-ft init` writes, and the docs.
"""

import copy
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ._section import Positive, Section
from .training import TrainSection


class Source(Section):
    """One of several training sets."""

    path: str = Field(description="As data.train.")
    weight: float = Field(1.0, gt=0, description="Its share of each epoch, against the other sets' weights.")


class DataSection(Section):
    """Where rows come from and how they become tokens."""

    train: str | Annotated[tuple[Source, ...], Field(min_length=1)] = Field(
        description="Training rows: a .jsonl, .json, .csv, .tsv, .parquet, .arrow, .npz, .conll or .txt file, a folder "
        "of these or of images or sounds, a hub dataset id (org/name or org/name:split), builtin:NAME, or a list of "
        "{path, weight} to mix."
    )
    eval: str | None = Field(
        "10%",
        description="Held-out rows: the same kinds, or a share such as 10% (of each class alike where rows have one), "
        "or 'fold 1/5' for one of five parts, or null.",
    )
    group_column: str | None = Field(
        None, description="Rows with the same value of this column are never parted by a share or a fold."
    )
    sampling: Literal["shuffle", "balanced"] = Field(
        "shuffle", description="balanced: every class comes up equally often in an epoch."
    )
    deduplicate: bool = Field(False, description="Drop training rows that say the same as an earlier or held-out row.")
    format: str = Field("auto", description="Row layout (`lora-ft list formats`), or auto to detect it.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Column names of the format -> names in the file, where they differ."
    )
    max_length: Positive = Field(2048, description="Most tokens in one sample.")
    overlong: Literal["auto", "drop", "truncate_prompt", "truncate", "error"] = Field(
        "auto",
        description="What to do with a row longer than max_length; an answer is never cut. auto: drop where the model "
        "writes, truncate where it reads.",
    )
    system_prompt: str | None = Field(None, description="Put before every conversation that has no system message.")
    add_tokens: tuple[Annotated[str, Field(pattern=r"\S")], ...] = Field(
        (), description="New tokens for the tokenizer; only their embedding rows train, beside the adapter."
    )
    media_root: str | None = Field(
        None,
        description="Folder of the images and sounds that rows name; none outside of it is read. Default: that "
        "of the data file.",
    )
    max_pixels: Positive = Field(50_000_000, description="A larger image is an error.")
    max_seconds: float = Field(30.0, gt=0, description="A longer sound is over-long.")
    resample: bool = Field(True, description="Resample sounds to the model's rate; false: another rate is an error.")
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = Field(
        "auto",
        description="Threads that read and prepare images and sounds ahead of the model; 0: none. The result "
        "is the same. auto: all cores but one, at most 8.",
    )
    cache_gb: float = Field(
        2.0, ge=0, description="Disk budget for images and sounds as they are after decoding; 0: no such cache."
    )
    template: Literal["auto", "none"] = Field(
        "auto", description="auto: the tokenizer's chat template where it has one; none: prompt and answer as they are."
    )


class _Typed(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)
    type: str

    def options(self) -> dict[str, Any]:
        """All keys but `type`; what the type names validates them."""
        return dict(self.model_extra or {})


class MethodSection(_Typed):
    """How the frozen model is adapted: a type and that method's own PEFT options."""

    type: str = Field("lora", description="Adapter method (`lora-ft list methods`); its PEFT options stand beside it.")


class TaskSection(_Typed):
    """What is learnt: a type and that task's own options. `task: NAME` is short for `task: {type: NAME}`."""

    type: str = Field("causal-lm", description="Task (`lora-ft list tasks`); its options stand beside it.")


class QuantSection(_Typed):
    """How the frozen base is stored: a type and that quantiser's own options."""

    type: str = Field("none", description="Quantiser (`lora-ft list quantizers`); its options stand beside it.")


def shorthand(value: Any) -> Any:
    """`NAME` is short for `{type: NAME}`."""
    return {"type": value} if isinstance(value, str) else value


def quant_shorthand(value: Any) -> Any:
    """The same, and `NAME:CONFIG` for `{type: NAME, config: CONFIG}`."""
    name, colon, config = value.partition(":") if isinstance(value, str) else ("", "", "")
    return {"type": name, "config": config} if colon else shorthand(value)


class EvalSection(Section):
    """How the model is judged before and after training, beside its loss."""

    generate: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="Held-out rows to answer in full for exact match; auto: up to 200 if answers are short."
    )
    max_new_tokens: Positive | None = Field(
        None, description="Most tokens in an answer; default 1.5x the longest reference, at least 16."
    )
    batch_size: Positive = Field(32, description="Answers written at once.")


class Recipe(Section):
    """A whole run."""

    description: str = Field("", description="One sentence for people.")
    model: str = Field(
        description="Base model: a hub id, a local folder, a .gguf file, builtin:NAME, or for the task module "
        "python:FILE.py:FUNCTION."
    )
    start_from: str | None = Field(
        None, description="A run or an adapter folder of the same method whose weights the adapter starts from."
    )
    task: Annotated[TaskSection, BeforeValidator(shorthand)] = Field(
        default_factory=TaskSection, description=str(TaskSection.__doc__)
    )
    quant: Annotated[QuantSection, BeforeValidator(quant_shorthand)] = Field(
        default_factory=QuantSection, description=str(QuantSection.__doc__)
    )
    data: DataSection = Field(description=str(DataSection.__doc__))
    method: Annotated[MethodSection, BeforeValidator(shorthand)] = Field(
        default_factory=MethodSection, description=str(MethodSection.__doc__)
    )
    train: TrainSection = Field(default_factory=TrainSection, description=str(TrainSection.__doc__))
    eval: EvalSection = Field(default_factory=EvalSection, description=str(EvalSection.__doc__))
    target: str | None = Field(
        None,
        description="Where the adapter must fit (an export format or a program), checked before training.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the split, the order, the adapter's start and dropout.")
    out: str | None = Field(None, description="Run folder; default runs/<recipe name>-<date>-<time>.")

    @model_validator(mode="after")
    def _needs_held_out(self) -> "Recipe":
        train = self.train
        wants = {
            "early_stopping": train.early_stopping,
            "eval_every": train.eval_every,
            "metric_for_best_model": train.metric_for_best_model != "loss",
            "lr_scheduler_type: reduce_lr_on_plateau": train.lr_scheduler_type == "reduce_lr_on_plateau",
        }
        asked = [name for name, value in wants.items() if value]
        if asked and self.data.eval is None:
            raise ValueError(f"train.{asked[0]} needs held-out rows, but data.eval is null")
        return self


class StageKeys(Section):
    """What a stage has beside the keys of a recipe."""

    name: str = Field(
        "", pattern=r"^[\w-]*$", description="Of its folder: letters, digits, _ and -; default stage1, ..."
    )
    adapter: Literal["same", "new"] = Field(
        "same",
        description="same: it goes on with the adapter of the stage before; new: that one is merged into the base, and "
        "a second adapter is trained on the result.",
    )


class StagedKeys(Section):
    """What a recipe with stages has beside the keys that all its stages share."""

    stages: tuple[dict[str, Any], ...] = Field(
        description="Trainings in a row: keys of a recipe, laid over those at the top, in each.",
        json_schema_extra={"minItems": 2},
    )
    baseline: bool = Field(
        True, description="With stages: train the last one also without the others, and compare the two."
    )


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, with or without stages."""
    schema = Recipe.model_json_schema()
    whole, sections = schema["properties"], schema["$defs"]
    stage = {**whole, **StageKeys.model_json_schema()["properties"]}
    added = StagedKeys.model_json_schema()["properties"]
    added["stages"]["items"] = {"type": "object", "additionalProperties": False, "properties": copy.deepcopy(stage)}
    sections["DataSection"].pop("required")  # one stage's part of it need not be whole
    data = {"data": {"required": ["train"]}}
    schema["anyOf"] = [{"required": ["stages"]}, {"required": schema.pop("required"), "properties": data}]
    schema["properties"] = {**whole, **added}
    return schema
