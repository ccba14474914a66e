"""The model card: what was trained on what, with which result. No path of this machine is in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_ft.recipe import Recipe, write_yaml
from lora_ft_adapters.registry import find_method

from .display import clean

LONGEST_LIST = 50
GROWN = ('base.resize_token_embeddings(len(AutoTokenizer.from_pretrained("THIS_FOLDER")))  # new tokens',)
PLUG_IN = (
    "import lora_ft_adapters  # pip install lora-ft: PEFT does not have this method",
    "lora_ft_adapters.list_methods()",
)


def model_card(recipe: Recipe, facts: Mapping[str, Any], *, merged: bool, figures: Mapping[str, float]) -> str:
    """Markdown with a YAML head as the hub reads it.

    Args:
        recipe: of the run.
        facts: what run.json says.
        merged: whether this folder is a merged model rather than an adapter.
        figures: what verification measured, or empty.
    """
    hub = recipe.model if public_name(recipe.model) == recipe.model and "/" in recipe.model else ""
    head: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "tags": ["lora-ft", recipe.method.type],
    }
    if hub:
        head = {"base_model": hub, **head}
    kind = "Merged model" if merged else f"{recipe.method.type} adapter"
    made = f"Trained for {recipe.task.type} with lora-ft {facts.get('versions', {}).get('lora_ft', '')}."
    lines = [
        "---", write_yaml(head, {}).rstrip(), "---", "", f"# {kind} for {public_name(recipe.model)}", "",
        recipe.description or made, "",
        "| metric (held-out rows) | base | with adapter |", "|---|---|---|",
    ]  # fmt: skip
    before, after = (facts.get("metrics", {}).get(k, {}) for k in ("before", "after"))
    lines += [f"| {k} | {_number(before.get(k))} | {_number(after.get(k))} |" for k in before | after]
    lines += ["", f"- data: {_sources(recipe)}, {facts.get('rows', '?')} samples"]
    lines += [f"- task: {recipe.task.type}, {_short(facts.get('task_facts') or {})}"]
    lines += [f"- method: {recipe.method.type}, {recipe.method.options()}"] if recipe.method.options() else []
    lines += [f"- steps: {facts.get('steps', '?')}, learning rate {recipe.train.learning_rate:g}, seed {recipe.seed}"]
    lines += [f"- {k.replace('_', ' ')}: {v:.3g}" for k, v in figures.items()]
    lines += [f"- {k} {v}" for k, v in facts.get("versions", {}).items()]
    if not merged:
        lines += [
            "",
            "```python",
            *(PLUG_IN if find_method(recipe.method.type).plug_in else ()),
            "from peft import PeftModel",
            *(GROWN if recipe.data.add_tokens else ()),
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
            "```",
        ]
    return clean("\n".join(lines)) + "\n"


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
