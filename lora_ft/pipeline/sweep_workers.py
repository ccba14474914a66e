"""Several processes at work on one sweep, each with its share of the threads."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from lora_ft import runs, search
from lora_ft.errors import Interrupted, LoraFtError, ResourceError
from lora_ft.records import Listener, Silent
from lora_ft.search import SweepOptions, SweepPlan
from lora_ft.search.work import outcome_line

if TYPE_CHECKING:
    from lora_ft.search.study import Study

POLL_S = 0.3
TRUST = "trust-code"
CODE = "import sys; from lora_ft.pipeline.sweep_workers import worker; sys.exit(worker(*sys.argv[1:]))"


@contextmanager
def stopping() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted; the training loop inside has handlers of its own, which save first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by signal {number}")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def run_workers(out: Path, plan: SweepPlan, options: SweepOptions, study: "Study", listener: Listener) -> None:
    """Start the workers, tell of each trial that ends, and wait.

    Raises:
        LoraFtError: what ended a worker; Interrupted when this process is told to stop.
    """
    (out / "workers").mkdir(exist_ok=True)
    count = min(options.workers, plan.trials)
    children = [_start(out, number, count, options.trust_code) for number in range(1, count + 1)]
    try:
        with stopping():
            _watch(children, study, listener)
    finally:
        for child in children:
            if child.stdin:
                with contextlib.suppress(OSError):
                    child.stdin.close()  # the worker takes it for the signal to save and stop
        for child in children:
            child.wait()
    codes = [child.returncode for child in children]
    rows = study.rows()
    if any(r.status == "unfinished" for r in rows) or len(rows) < plan.trials:
        raise_first(out, codes)
    elif any(codes):
        listener.warn(f"{sum(map(bool, codes))} of {len(codes)} workers ended early; the others did their trials")


def _start(out: Path, number: int, count: int, trust_code: bool) -> "subprocess.Popen[bytes]":
    threads = str(max(1, torch.get_num_threads() // count))
    (out / "workers" / f"{number}.json").unlink(missing_ok=True)
    with (out / "workers" / f"{number}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", CODE, str(out), str(number), *([TRUST] if trust_code else [])],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )


def _watch(children: "Sequence[subprocess.Popen[bytes]]", study: "Study", listener: Listener) -> None:
    told = {r.index for r in study.rows() if r.status != "unfinished"}
    while True:
        running = any(child.poll() is None for child in children)
        rows = study.rows()
        for row in rows:
            if row.status != "unfinished" and row.index not in told:
                told.add(row.index)
                listener.note(outcome_line(study.plan, rows, row.index))
        if not running:
            return
        time.sleep(POLL_S)


def raise_first(out: Path, codes: Sequence[int]) -> None:
    """Raise here what ended the first worker that did not end well.

    Raises:
        LoraFtError: the worker's own, or ResourceError for one that died.
    """
    kinds = {cls.exit_code: cls for cls in LoraFtError.__subclasses__()}
    for number, code in enumerate(codes, 1):
        if code == 0:
            continue
        path = out / "workers" / f"{number}.json"
        if code in kinds and path.is_file():
            raise kinds[code](**json.loads(path.read_text(encoding="utf-8")))
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ResourceError(
            f"worker {number} died: {why}",
            where=str(out / "workers" / f"{number}.log"),
            fix=f"lora-ft sweep --resume --out '{out}', with fewer --workers if memory ran out",
        )


def worker(folder: str, number: str, trust: str = "") -> int:
    """What a worker process does; its exit code."""
    from .sweep import Trainer

    out = Path(folder)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    plan = SweepPlan.read(out)
    try:
        with stopping():
            trainer = Trainer(plan, Silent(), trust == TRUST)
            search.work(search.open_study(out, plan), trainer, Silent(), trainer.check)
    except LoraFtError as error:
        facts = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
        runs.write_text(out / "workers" / f"{number}.json", json.dumps(facts))
        return error.exit_code
    return 0


def _stop_with_parent() -> None:
    """Ends when the parent closes the pipe or dies."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
