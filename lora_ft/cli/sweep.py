"""lora-ft sweep."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lora_ft.pipeline.sweep import SweepResult

SPACE_HELP = (
    "What varies: key=a,b,c or key=low..high, with :log, with :int for whole numbers, or with a number of points "
    "(1e-5..1e-3:log:5), which makes a list of it. Grid search needs lists."
)


def sweep(  # noqa: PLR0913 - one argument per option
    recipes: Annotated[list[Path] | None, typer.Argument(help="Recipe files, merged left to right.")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="A recipe that comes with the package.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override a value: a.b=value.")] = None,
    space: Annotated[list[str] | None, typer.Option(help=SPACE_HELP)] = None,
    search: Annotated[str | None, typer.Option(help="grid, random or bayes (TPE); default bayes.")] = None,
    trials: Annotated[int | None, typer.Option(help="How many in all; default 20, for grid every combination.")] = None,
    metric: Annotated[str | None, typer.Option(help="Of the held-out rows after training; default loss.")] = None,
    folds: Annotated[int | None, typer.Option(help="Train each trial on K folds and score it by their mean.")] = None,
    workers: Annotated[int, typer.Option(help="Processes at work on trials.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Of the values that are tried; default 0.")] = None,
    prune: Annotated[
        bool | None,
        typer.Option("--prune/--no-prune", help="Stop trials worse than the median; default yes, not for grid."),
    ] = None,
    keep_checkpoints: Annotated[bool, typer.Option(help="Keep the checkpoints of finished trials.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the sweep in --out, or join it; --trials may grow.")] = False,
    out: Annotated[Path | None, typer.Option(help="Sweep folder; default sweeps/<name>-<date>-<time>.")] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python function that a recipe names as its model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train a recipe with many values, or cross-validate it, and write the best recipe out."""
    from lora_ft import report
    from lora_ft.pipeline.sweep import sweep as run_sweep
    from lora_ft.recipe import load_recipe
    from lora_ft.search import SweepOptions

    given = recipes or preset or settings
    resolved = load_recipe(recipes or [], preset or [], settings or []) if given else None
    options = SweepOptions(search, trials, metric, folds, seed, prune, workers, keep_checkpoints, trust_code)
    result = run_sweep(
        resolved, space or [], options=options, out=out, resume=resume, listener=report.make_listener()
    )  # fmt: skip
    _tell(result, as_json)


def _tell(result: "SweepResult", as_json: bool) -> None:
    from lora_ft.report.sweep_table import sweep_table

    plan, rows = result.plan, [r.facts() for r in result.trials]
    if as_json:
        facts = {"sweep": str(result.path), "metric": plan.metric, "best": rows[0], "trials": rows}
        print(json.dumps({**facts, "best_recipe": str(result.path / "best.yaml")}))
    folds = f", mean of {plan.folds} folds" if plan.folds > 1 else ""
    sweep_table(rows, plan.metric, sys.stderr, f"{len(rows)} trials, best first; held-out {plan.metric}{folds}")
    quoted = f"'{result.path}'" if " " in str(result.path) else str(result.path)
    print(
        f"sweep    {quoted}  (results.csv, results.json)\n"
        f"best     trial {rows[0]['trial']}, {plan.metric} {result.best_value:.4f}\n"
        f"run      {quoted}/{rows[0]['run']}\n\n"
        f"next:\n"
        f"  lora-ft train {quoted}/best.yaml    the best recipe",
        file=sys.stderr,
    )
