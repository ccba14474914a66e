"""The typer app, one file per verb, and the one place that turns errors into exit codes."""

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from lora_ft import __version__
from lora_ft.errors import LoraFtError

from . import algebra, chat, init, inspect, listing, sweep, train, use

app = typer.Typer(
    name="lora-ft",
    help="Adapt frozen pretrained models with LoRA and other adapters: train, judge, merge and export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: lora-ft train --preset demo",
)
app.command("init")(init.init)
app.command("train")(train.train)
app.command("sweep")(sweep.sweep)
app.command("eval")(use.evaluate)
app.command("predict")(use.predict)
app.command("chat")(chat.chat)
app.command("merge")(use.merge)
app.command("unmerge")(use.unmerge)
app.command("export")(use.export)
app.command("inspect")(inspect.inspect)
app.command("combine")(algebra.combine)
app.command("compress")(algebra.compress)
app.command("convert")(algebra.convert)
app.command("extract")(algebra.extract)
app.command("list")(listing.list_axis)
app.command("schema")(listing.schema)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lora-ft {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version_flag: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of all verbs."""
    if debug:
        os.environ["LORA_FT_DEBUG"] = "1"


def main() -> None:
    """Run the command line; exit codes as in `lora_ft.errors.EXIT_CODES`, and 130 for Ctrl-C where nothing is saved."""
    # The libraries below draw bars and warnings of their own over ours; a user can still ask for them.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends another package at every import
    try:
        app()
    except LoraFtError as error:
        sys.exit(_fail(error))
    except Exception as error:
        sys.exit(_bug(error))


def _fail(error: LoraFtError) -> int:
    if os.environ.get("LORA_FT_DEBUG"):
        traceback.print_exc()
    print(error, file=sys.stderr)
    _json_failure(error.what, error.exit_code)
    return error.exit_code


def _bug(error: Exception) -> int:
    """An internal error: short on the screen, whole in a file."""
    path = Path(f"lora-ft-crash-{os.getpid()}.txt")
    try:
        path.write_text(traceback.format_exc(), encoding="utf-8")
        where = f"  at  {path} has the traceback"
    except OSError:
        where = traceback.format_exc()
    print(f"error[E-INTERNAL]: {type(error).__name__}: {error}\n{where}\n  fix please report it", file=sys.stderr)
    _json_failure(f"{type(error).__name__}: {error}", 1)
    return 1


def _json_failure(what: str, code: int) -> None:
    """`--json` promises one object on stdout, also for a failure."""
    if "--json" in sys.argv:
        print(json.dumps({"run": None, "status": "failed", "error": what, "exit_code": code}))
