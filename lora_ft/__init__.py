"""Adapt frozen pretrained models with LoRA and other adapters: train, judge, merge, export.

    import lora_ft
    run = lora_ft.train({"model": "builtin:smollm2-135m-instruct", "data": {"train": "rows.jsonl"}})
    print(run.metrics["after"])
    loaded = lora_ft.load(run)

Names are resolved on first use, so that `import lora_ft` does not import torch.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline.algebra import combine, compress, convert, extract
    from .pipeline.artifacts import export, merge, unmerge
    from .pipeline.inspecting import inspect
    from .pipeline.loading import Loaded, load
    from .pipeline.rows import Given
    from .pipeline.sweep import sweep
    from .pipeline.use import evaluate_run, predict
    from .records import Listener
    from .runs import Run

__version__ = "0.1.0"
IN_MEMORY = "in-memory"  # what a recipe says of a model or of data that the caller holds

__all__ = [
    "Given", "Loaded", "Run", "__version__", "combine", "compress", "convert", "evaluate_run", "export", "extract",
    "inspect", "load", "merge", "predict", "sweep", "train", "unmerge",
]  # fmt: skip

_HOMES = {
    "Given": "pipeline", "Loaded": "pipeline", "Run": "runs", "combine": "pipeline", "compress": "pipeline",
    "convert": "pipeline", "extract": "pipeline", "evaluate_run": "pipeline", "export": "pipeline",
    "load": "pipeline", "merge": "pipeline", "predict": "pipeline", "sweep": "pipeline",
    "inspect": "pipeline", "unmerge": "pipeline",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def train(  # noqa: PLR0913 - one argument per option of the verb
    *recipes: Mapping[str, Any] | str | Path,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    listener: "Listener | None" = None,
    model: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    trust_code: bool = False,
) -> "Run":
    """Train as the recipes say, merged left to right, and return the run.

    Args:
        recipes: mappings with the keys of a recipe file, or paths of such files.
        preset: name of a preset to start from.
        overrides: "a.b=value" settings, as `--set` on the command line.
        out: run folder; default runs/<name>-<date>-<time>.
        overwrite: move a run that is in the way aside.
        resume: go on with the run in `out` from its last checkpoint.
        listener: hears of progress; silent by default.
        model: a module to adapt instead of the recipe's model (task: module); it stays as it is.
        train_data: rows in memory instead of data.train: dicts, (inputs, targets) arrays, or a torch Dataset.
        eval_data: the same to judge on.
        trust_code: run the Python function that a recipe names as its model.

    Raises:
        lora_ft.errors.LoraFtError: with `exit_code`, `what`, `where`, `why` and `fix`.
    """
    from .pipeline import Given
    from .pipeline import train as run_training
    from .recipe import load_recipe

    sources = [r if isinstance(r, Mapping) else Path(r) for r in recipes]
    given = Given(train_data, eval_data, model, trust_code)
    named: dict[str, Any] = {"model": IN_MEMORY} if model is not None else {}
    if train_data is not None:
        named["data"] = {"train": IN_MEMORY}
    resolved = load_recipe([named, *sources], presets=[preset] if preset else [], sets=overrides)
    folder = Path(out) if out else None
    return run_training(resolved, out=folder, overwrite=overwrite, resume=resume, listener=listener, given=given)
