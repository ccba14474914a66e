"""The model card: what was trained on what, with which result. No path of this machine is in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lora_ft.recipe import Recipe, write_yaml
from lora_ft_adapters.registry import corrects_quantisation, find_method

from .display import clean

LONGEST_LIST = 50
GROWN = ('base.resize_token_embeddings(len(AutoTokenizer.from_pretrained("THIS_FOLDER")))  # new tokens',)
PLUG_IN = (
    "import lora_ft_adapters  # pip install lora-ft: PEFT does not have this method",
    "lora_ft_adapters.list_methods()",
)


def model_card(
    recipe: Recipe, facts: Mapping[str, Any], *, merged: bool, figures: Mapping[str, Any], form: str = ""
) -> str:
    """Markdown with a YAML head as the hub reads it.

    Args:
        recipe: of the run.
        facts: what run.json says.
        merged: whether the adapter is in the model's weights here.
        figures: what verification measured, or empty.
        form: the export format, where it is neither an adapter nor a merged model of Transformers.
    """
    kind = "Merged model" if merged else f"{recipe.method.type} adapter"
    made = f"Trained for {recipe.task.type} with lora-ft {facts.get('versions', {}).get('lora_ft', '')}."
    lines = [
        "---", _head(recipe, facts, merged, form).rstrip(), "---", "", f"# {kind} for {public_name(recipe.model)}", "",
        recipe.description or made, "",
        "| metric (held-out rows) | base | with adapter |", "|---|---|---|",
    ]  # fmt: skip
    before, after = (facts.get("metrics", {}).get(k, {}) for k in ("before", "after"))
    lines += [f"| {k} | {_number(before.get(k))} | {_number(after.get(k))} |" for k in before | after]
    lines += ["", f"- data: {_sources(recipe)}, {facts.get('rows', '?')} samples"]
    lines += [f"- task: {recipe.task.type}, {_short(facts.get('task_facts') or {})}"]
    lines += [f"- method: {recipe.method.type}, {recipe.method.options()}"] if recipe.method.options() else []
    lines += [f"- base in training: {facts['dtype']}, quantised: {facts['quant']}"] if "quant" in facts else []
    if not (merged or form) and corrects_quantisation(recipe.method.type, recipe.method.options()):
        lines.append("- it holds the error of its quantised base: load it on the base quantised as below, on no other")
    lines += [f"- steps: {facts.get('steps', '?')}, learning rate {recipe.train.learning_rate:g}, seed {recipe.seed}"]
    licence = (facts.get("origin") or {}).get("licence")
    lines += [f"- licence: {licence or 'that of the base model, whose files do not name it'}"]
    lines += [f"- format: {form}"] if form else []
    lines += [f"- {k.replace('_', ' ')}: {v:.3g}" for k, v in figures.items() if isinstance(v, int | float)]
    lines += [f"- {k} {v}" for k, v in facts.get("versions", {}).items()]
    return clean("\n".join([*lines, *_usage(recipe, merged, form), *_settings(recipe)])) + "\n"


def _head(recipe: Recipe, facts: Mapping[str, Any], merged: bool, form: str) -> str:
    """What the hub reads; only ids that are on the hub, and only results that are numbers."""
    origin = facts.get("origin") or {}
    public = public_name(recipe.model) == recipe.model and recipe.model.count("/") == 1
    hub = origin.get("hub_id") or (recipe.model if public else "")
    after = {k: v for k, v in facts.get("metrics", {}).get("after", {}).items() if isinstance(v, int | float)}
    task = facts.get("hub_task") or ""
    results = [
        EvalResult(
            task_type=task, dataset_type="custom", dataset_name=f"held-out rows of {_sources(recipe)}",
            metric_type=name, metric_name=name, metric_value=round(float(value), 6),
        )
        for name, value in after.items()
    ]  # fmt: skip
    library = "transformers" if merged else "peft"
    head = ModelCardData(
        license=origin.get("licence") or None, base_model=hub or None, library_name=None if form else library,
        pipeline_tag=task or None, tags=["lora-ft", recipe.method.type],
        model_name=f"{public_name(recipe.model)} with {recipe.method.type}" if results and task else None,
        eval_results=results if task else None,
    )  # fmt: skip
    return head.to_yaml()


def _usage(recipe: Recipe, merged: bool, form: str) -> list[str]:
    if merged or form:
        return []
    return [
        "",
        "```python",
        *(PLUG_IN if find_method(recipe.method.type).plug_in else ()),
        "from peft import PeftModel",
        *(GROWN if recipe.data.add_tokens else ()),
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        "```",
    ]


def _settings(recipe: Recipe) -> list[str]:
    """The recipe without where its files lie."""
    told = recipe.model_dump(mode="json", exclude_none=True, include={"task", "quant", "method", "train", "seed"})
    return ["", "Recipe, without its data:", "", "```yaml", write_yaml(told, {}).rstrip(), "```"]


def _short(known: Mapping[str, Any]) -> str:
    """What the task learnt of the data (label names, the unit of a number), without long lists."""
    told = {k: v for k, v in known.items() if not isinstance(v, list | tuple) or 0 < len(v) <= LONGEST_LIST}
    return ", ".join(f"{k} {v}" for k, v in told.items() if v is not None) or "nothing of its own"


def _sources(recipe: Recipe) -> str:
    train = recipe.data.train
    return public_name(train) if isinstance(train, str) else ", ".join(public_name(s.path) for s in train)


def public_name(name: str) -> str:
    """A hub id or builtin name as it is; of a path only the last part."""
    hub_like = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return name if name.startswith("builtin:") or hub_like else Path(name).name


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
