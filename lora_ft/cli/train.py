"""lora-ft train."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_ft.errors import ArtifactError, UsageError
from lora_ft.runs import Run

if TYPE_CHECKING:
    from lora_ft.recipe import Resolved

NO_TEXT = "train.probe_text=false"
SHOWN_WAIT = 0.02  # share of the training's time
KEYS = (
    "status", "metrics", "trainable_parameters", "total_parameters", "tokens", "tokens_per_s", "peak_memory_bytes",
    "wall_s", "data_wait_share",
)  # fmt: skip
INTRODUCTION = """lora-ft train needs a recipe: a YAML file that names a base model and your data. For example:

  model: builtin:smollm2-135m-instruct
  data:
    train: my_rows.jsonl
  train:
    epochs: 3

`lora-ft init` writes one with comments. `lora-ft list presets` shows recipes that come with the package.
The demo teaches a 135M model to turn support messages into JSON records: a few minutes on two CPU cores.
"""


def train(  # noqa: PLR0913 - one argument per option
    recipes: Annotated[list[Path] | None, typer.Argument(help="Recipe files, merged left to right.")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="A recipe that comes with the package.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override a value: a.b=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name>-<date>-<time>.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Check first that the adapter can go there: vllm, llama.cpp, ollama, onnx, ..."),
    ] = None,
    probe_text: Annotated[
        bool, typer.Option("--probe-text/--no-probe-text", help="Keep a few inputs beside the adapter to prove it by.")
    ] = True,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out from its last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Move a run that is in the way aside.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, show what would happen, train nothing.")] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python function that the recipe names as its model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train an adapter as a recipe says, judge it before and after, and keep everything in a run folder."""
    sets = [*(settings or []), *([f"target={target}"] if target else []), *([] if probe_text else [NO_TEXT])]
    resolved = _resolve(recipes or [], preset or [], sets, out, resume)
    from lora_ft import pipeline, report

    listener, given = report.make_listener(), pipeline.Given(trust_code=trust_code)
    if dry_run:
        plans = pipeline.dry_run(resolved, listener, given)
        print(json.dumps(plans) if as_json else "\n\n".join(_plan_text(p) for p in plans.get("stages", [plans])))
        return
    run = pipeline.train(resolved, out=out, overwrite=overwrite, resume=resume, listener=listener, given=given)
    whole, facts = run.facts, run.final.facts
    if as_json:
        compared = {"comparison": whole["comparison"]} if "comparison" in whole else {}
        print(json.dumps({"run": str(run.path), **{k: facts[k] for k in KEYS}, **compared}))
    report.before_after(facts["metrics"], sys.stderr, f"{facts['rows']} training samples, judged on held-out rows")
    if "comparison" in whole:
        report.compared(whole["comparison"], sys.stderr)
    print(_next(run.path, facts), file=sys.stderr)


def _resolve(recipes: list[Path], presets: list[str], sets: list[str], out: Path | None, resume: bool) -> "Resolved":
    from lora_ft.recipe import load_recipe

    if resume and out is None:
        raise UsageError("--resume needs the run folder", fix="--resume --out RUN")
    if resume and not recipes and not presets:
        recipes = [out / "recipe.resolved.yaml"] if out else []
        if not recipes[0].is_file():
            raise ArtifactError("there is no run to resume", where=str(out))
    if recipes or presets or sets:
        return load_recipe(recipes, presets, sets)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("no recipe given", fix="lora-ft train RECIPE.yaml, or lora-ft train --preset demo")
    print(INTRODUCTION, file=sys.stderr)
    if not typer.confirm("Run the demo now?", default=True, err=True):
        raise typer.Exit
    return load_recipe([], ["demo"], [])


def _plan_text(facts: dict[str, Any]) -> str:
    trains, total = facts["trainable_parameters"], facts["total_parameters"]
    # A method that starts by decomposing the weights cannot be counted before they are read.
    parameters = f"{trains:,} of {total:,} train ({trains / total:.2%})" if trains else f"{total:,} before the adapter"
    return (
        f"dry run: nothing was trained\n"
        f"  rows       {facts['rows']} as {facts['format']}, {facts['samples']} samples, {facts['held_out']} held out\n"
        f"  tokens     {facts['tokens_per_epoch']:,} an epoch, {facts['labelled_tokens']:,} labelled, "
        f"longest sample {facts['longest']}\n"
        f"  steps      {facts['steps']}\n"
        f"  parameters {parameters}\n"
        f"  first sample, what is learnt in [[ ]]:\n\n{facts['sample']}"
    )


def _next(path: Path, facts: dict[str, Any]) -> str:
    from lora_ft.report import merges

    quoted = f"'{path}'" if " " in str(path) else str(path)
    use = f"  lora-ft predict {quoted} --input ROWS --output answers.jsonl"
    if facts.get("chats"):
        use = f"  lora-ft chat {quoted}                    talk to it (--base: to the model before)"
    keep = f"  lora-ft merge {quoted} --out merged      a plain Transformers model"
    if not merges(facts["method"]):
        keep = f"  lora-ft export {quoted} --format peft --out adapter      for stock PEFT; it cannot be merged"
    waited = facts["data_wait_share"]
    waiting = f", {waited:.0%} of the training waited for data" if waited >= SHOWN_WAIT else ""
    return (
        f"run      {path}\n"
        f"adapter  {Run(path).final.adapter}\n"
        f"trained  {facts['tokens']:,} tokens in {facts['train_s']:.0f} s ({facts['tokens_per_s']:.0f} tok/s), "
        f"{facts['wall_s']:.0f} s in all, peak memory {facts['peak_memory_bytes'] / 2**30:.2f} GiB{waiting}\n\n"
        f"next:\n"
        f"{use}\n"
        f"  lora-ft eval {quoted}                    which rows changed, and how sure that is\n"
        f"{keep}"
    )
