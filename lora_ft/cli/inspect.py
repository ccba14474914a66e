"""lora-ft inspect: what is in a run, an adapter or a model."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

SHOWN = 5


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, an adapter's folder (anybody's), or a merged model.")],
    base: Annotated[
        str | None, typer.Option(help="Put the adapter on this base and hold its answers against those of training.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="The same on the run's own base.")] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python function that a recipe names as its model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What is in it: method, sizes of the updates, tensors that do nothing; and whether it still answers as trained."""
    from lora_ft import pipeline, report

    listener = report.make_listener()
    wanted = "" if check and base is None else base
    found = pipeline.inspect(path, base=wanted, listener=listener, given=pipeline.Given(trust_code=trust_code))
    listener.finish()
    if as_json:
        print(json.dumps({"path": str(path), **found}))
        return
    for key, value in found.items():
        if key not in ("norms", "idle") and value not in ({}, [], None, ""):
            print(f"{key.replace('_', ' '):<28} {_text(value)}")
    if found.get("norms"):
        _norms(found["norms"])
    if found.get("idle"):
        print(f"WARNING: {len(found['idle'])} modules change nothing (B is all zero), for example {found['idle'][0]}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) if len(value) <= SHOWN else f"{len(value)}, such as {value[0]}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _norms(norms: dict[str, float]) -> None:
    """The largest and the smallest updates."""
    ranked = sorted(norms.items(), key=lambda item: -item[1])
    print(f"updates of {len(ranked)} modules, relative to their weights:")
    shown = ranked if len(ranked) <= 2 * SHOWN else [*ranked[:SHOWN], ("...", -1.0), *ranked[-SHOWN:]]
    for name, size in shown:
        print(f"  {name}" if size < 0 else f"  {size:.2e}  {name}")
