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
    from .pipeline.use import Loaded, evaluate_run, export, load, merge, predict
    from .records import Listener
    from .runs import Run

__version__ = "0.1.0"

__all__ = [
    "Loaded", "Run", "__version__", "combine", "compress", "convert", "evaluate_run", "export", "extract", "load",
    "merge", "predict", "train",
]  # fmt: skip

_HOMES = {
    "Loaded": "pipeline", "Run": "runs", "combine": "pipeline", "compress": "pipeline", "convert": "pipeline",
    "extract": "pipeline", "evaluate_run": "pipeline", "export": "pipeline", "load": "pipeline",
    "merge": "pipeline", "predict": "pipeline",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def train(
    *recipes: Mapping[str, Any] | str | Path,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    listener: "Listener | None" = None,
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

    Raises:
        lora_ft.errors.LoraFtError: with `exit_code`, `what`, `where`, `why` and `fix`.
    """
    from .pipeline import train as run_training
    from .recipe import load_recipe

    sources = [r if isinstance(r, Mapping) else Path(r) for r in recipes]
    resolved = load_recipe(sources, presets=[preset] if preset else [], sets=overrides)
    return run_training(resolved, out=Path(out) if out else None, overwrite=overwrite, resume=resume, listener=listener)
