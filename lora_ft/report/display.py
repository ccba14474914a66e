"""Progress on stderr: a live rich display in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lora_ft.records import Listener, Plan

PLAIN_EVERY_S = 10.0


def clean(text: str) -> str:
    """Text without control characters, so that data cannot drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def make_listener(stream: TextIO | None = None) -> Listener:
    """The display that fits `stream` (stderr by default)."""
    out = stream or sys.stderr
    console = Console(file=out, highlight=False)
    return LiveDisplay(console) if console.is_terminal and not console.is_dumb_terminal else PlainDisplay(out)


def plan_line(plan: Plan) -> str:
    """The plan in one line."""
    share = plan.trainable_parameters / max(1, plan.total_parameters)
    return (
        f"{plan.rows} samples, {plan.tokens_per_epoch:,} tokens an epoch, {plan.steps} steps of {plan.batch_size} "
        f"({plan.epochs:g} epochs); {plan.trainable_parameters:,} of {plan.total_parameters:,} parameters train "
        f"({share:.2%}); {plan.fast_path}"
    )


class LiveDisplay:
    """Bars that redraw in place, notes above them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Progress | None = None
        self._training: TaskID | None = None
        self._other: tuple[str, TaskID] | None = None

    def _progress(self) -> Progress:
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._bars.start()
        return self._bars

    def note(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(escape(clean(text)))

    def warn(self, text: str) -> None:
        """A marked line above the bars."""
        self.console.print(f"[yellow]warning:[/yellow] {escape(clean(text))}")

    def start(self, plan: Plan) -> None:
        """The plan, and a bar of steps."""
        self.note(plan_line(plan))
        self._training = self._progress().add_task("training", total=plan.steps, figures="")

    def step(self, record: Mapping[str, Any]) -> None:
        """Move the bar; show loss, rate, speed and memory."""
        if self._training is not None:
            self._progress().update(self._training, completed=record["step"], figures=_figures(record))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Said as a note already."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A bar of its own for a stage, gone when the stage is over."""
        bars = self._progress()
        if self._other is None or self._other[0] != what:
            self._other = (what, bars.add_task(what, total=total, figures=""))
        bars.update(self._other[1], completed=done, total=total)
        if done >= total:
            bars.remove_task(self._other[1])
            self._other = None

    def finish(self) -> None:
        """Leave the last state of the bars on the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._training, self._other = None, None, None


class PlainDisplay:
    """A line now and then, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last = 0.0
        self._steps = 0

    def _say(self, text: str) -> None:
        try:
            self._out.write(clean(text) + "\n")
            self._out.flush()
        except (BrokenPipeError, ValueError):
            pass  # nobody reads any more; training goes on

    def note(self, text: str) -> None:
        """A line."""
        self._say(text)

    def warn(self, text: str) -> None:
        """A marked line."""
        self._say(f"warning: {text}")

    def start(self, plan: Plan) -> None:
        """The plan."""
        self._steps = plan.steps
        self._say(plan_line(plan))

    def step(self, record: Mapping[str, Any]) -> None:
        """A line for the first and last step, and every ten seconds."""
        now = time.monotonic()
        if record["step"] in (1, self._steps) or now - self._last >= PLAIN_EVERY_S:
            self._last = now
            self._say(f"step {record['step']}/{self._steps}  {_figures(record)}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Said as a note already."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A line when a stage is over."""
        if done >= total:
            self._say(f"{what}: {done}/{total}")

    def finish(self) -> None:
        """Nothing to do."""


def _figures(record: Mapping[str, Any]) -> str:
    return (
        f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_s']:,.0f} tok/s  "
        f"{record['memory_bytes'] / 2**30:.2f} GiB"
    )
