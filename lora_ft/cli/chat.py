"""lora-ft chat."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer


def chat(
    run: Annotated[Path, typer.Argument(help="Run folder, as `lora-ft train` printed it.")],
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model, without the adapter.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt; default that of the recipe.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
) -> None:
    """Talk to the model in the terminal; answers appear as they are written. An empty line or /quit ends it."""
    from lora_ft import pipeline, report

    loaded = pipeline.load(run, listener=report.make_listener())
    terminal = sys.stdin.isatty()
    talk = pipeline.Chat(loaded, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    print("base model" if base else f"adapter of {run}", "(/quit ends, /new forgets the conversation)", file=sys.stderr)
    with loaded.model.disable_adapter() if base else nullcontext():
        while True:
            if terminal:
                print("\n> ", end="", flush=True, file=sys.stderr)
            line = sys.stdin.readline()
            text = line.strip()
            if not line or text == "/quit" or (terminal and not text):
                return
            if text == "/new":
                talk.forget()
            elif text:
                for piece in talk.say(text):
                    print(report.clean(piece), end="", flush=True)
                print(flush=True)
