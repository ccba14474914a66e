"""The train verb: recipe -> data -> model -> adapter -> training -> judgement -> run directory."""

import json
import math
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_ft import runs
from lora_ft.errors import ArtifactError, DivergedError, Interrupted, LoraFtError
from lora_ft.models.load import pick_device, pick_dtype, skeleton
from lora_ft.recipe import Resolved
from lora_ft.records import Listener, Plan, Silent
from lora_ft.report import model_card, public_name
from lora_ft.runs import Run
from lora_ft.training import checkpoint, loop
from lora_ft.training.batching import micro_batches, steps_per_epoch
from lora_ft.training.memory import peak_memory_bytes
from lora_ft_adapters import add_adapter, count_parameters, trainable

from .judge import MICRO_BATCH_TOKENS, Judge, answer_rows, token_budget, write_rows
from .prepare import Prepared, answer_options, data_hash, prepare, versions
from .ready import Ready, check_method, make_ready

DEFAULT_EPOCHS = 3.0
PROBES = 4
PROBE_TOKENS = 64


def train(
    resolved: Resolved,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    listener: Listener | None = None,
) -> Run:
    """Train as the recipe says and leave a run directory.

    Raises:
        LoraFtError: of the kind that the exit code stands for; a started run keeps its checkpoints and its status.
    """
    listener = listener or Silent()
    path = out or (Path(resolved.recipe.out) if resolved.recipe.out else runs.default_path(resolved.name))
    run = Run(path) if resume else runs.create(path, overwrite=overwrite)
    if resume and not run.checkpoints.is_dir():
        raise ArtifactError("there is no run to resume", where=str(path), fix="leave --resume out to start it")
    with runs.locked(run):
        checkpoint.clean(run.checkpoints)
        try:
            _Training(resolved, run, listener).run_all(resume)
        except LoraFtError as error:
            status = {Interrupted: "interrupted", DivergedError: "diverged"}.get(type(error), "failed")
            run.update({"status": status, "error": error.what})
            raise
        finally:
            listener.finish()
    return run


class _Training:
    def __init__(self, resolved: Resolved, run: Run, listener: Listener) -> None:
        self.resolved, self.recipe, self.run, self.listener = resolved, resolved.recipe, run, listener
        self.started = time.time()

    def run_all(self, resume: bool) -> None:
        """All stages in order."""
        recipe, run = self.recipe, self.run
        run.update({"status": "running", "base": recipe.model, "task": recipe.task, "versions": versions()})
        runs.write_text(run.path / "recipe.resolved.yaml", self.resolved.text())
        prepared = prepare(recipe, self.listener)
        config = check_method(recipe, prepared)
        device = pick_device()
        dtype, why = pick_dtype(recipe.train.dtype, device)
        self.listener.note(f"base {recipe.model} in {str(dtype).removeprefix('torch.')} on {device} ({why})")
        runs.write_text(run.path / "recipe.resolved.yaml", self._facts(prepared, dtype, why))
        ready = make_ready(recipe, prepared, config, dtype, device)
        run.update(
            {"dtype": str(dtype).removeprefix("torch."), "quant": recipe.quant, "fingerprint": ready.fingerprint}
        )
        judge = partial(
            self._judge, prepared, Judge(prepared.task, ready.model, prepared.processor, ready.loss, self.listener)
        )
        old = run.facts.get("metrics", {}).get("before") if resume else None
        before = old or judge("base", base=True)
        run.update({"metrics": {"before": before}})
        plan, job = self._job(prepared, ready)
        self.listener.start(plan)
        outcome = loop.train(job, resume=resume)
        self._save(prepared, ready)
        after = judge("adapter", base=False)
        self._close(prepared, plan, outcome, {"before": before, "after": after})

    def _facts(self, prepared: Prepared, dtype: torch.dtype, why: str) -> str:
        name = str(dtype).removeprefix("torch.")
        return self.resolved.text(
            {
                ("train", "dtype"): (
                    name,
                    why if self.recipe.train.dtype == "auto" else self._origin("train", "dtype"),
                ),
                ("data", "format"): (prepared.report.format, f"detected, {self._origin('data', 'format')}"),
                ("out",): (str(self.run.path), self._origin("out")),
            }
        )

    def _origin(self, *path: str) -> str:
        return self.resolved.origins.get(path, "default")

    def _judge(self, prepared: Prepared, judge: Judge, what: str, *, base: bool) -> dict[str, float]:
        """Held-out metrics of the base or of the adapter; written answers are kept as rows."""
        if not prepared.held_out:
            return {}
        with judge.side(base):
            budget = token_budget(self.recipe, judge.model)
            metrics = judge.held_out(prepared.held_out, budget, f"judging the {what}: loss")()
            chosen = answer_options(
                self.recipe, prepared.task, prepared.processor, prepared.held_out_examples, prepared.options
            )
            if chosen is None:
                return metrics
            predictions, judged = judge.answers(*chosen, f"judging the {what}: answers")
        rows = answer_rows(predictions, judged.right)
        write_rows(self.run.path / f"answers-{'before' if base else 'after'}.jsonl", rows)
        return {**metrics, **judged.metrics}

    def _job(self, prepared: Prepared, ready: Ready) -> tuple[Plan, loop.Job]:
        settings = self.recipe.train
        budget = token_budget(self.recipe, ready.model)
        judge = Judge(prepared.task, ready.model, prepared.processor, ready.loss, self.listener)
        per_epoch = steps_per_epoch(len(prepared.train), settings.batch_size)
        steps = settings.steps or max(1, math.ceil((settings.epochs or DEFAULT_EPOCHS) * per_epoch))
        trains, total = count_parameters(ready.model)
        plan = Plan(
            steps=steps, epochs=round(steps / per_epoch, 2), batch_size=settings.batch_size, rows=len(prepared.train),
            tokens_per_epoch=prepared.report.tokens, trainable_parameters=trains, total_parameters=total,
            fast_path=ready.path_note,
        )  # fmt: skip
        job = loop.Job(
            model=ready.model,
            samples=prepared.train,
            collate=partial(prepared.task.collate, processor=prepared.processor),
            loss=ready.loss,
            evaluate=judge.held_out(prepared.held_out, budget, "evaluating") if prepared.held_out else None,
            settings=settings,
            steps=steps,
            eval_every=settings.eval_every or per_epoch,
            save_every=settings.save_every or per_epoch,
            tokens_per_micro_batch=budget,
            seed=self.recipe.seed,
            checkpoints=self.run.checkpoints,
            identity={
                "base": public_name(self.recipe.model),
                "fingerprint": ready.fingerprint,
                "data": data_hash(prepared.train),
                "method": json.dumps(self.recipe.method.model_dump(mode="json"), sort_keys=True),
                "seed": self.recipe.seed,
                "batch_size": settings.batch_size,
            },
            log=self.run.log,
            listener=self.listener,
        )
        return plan, job

    def _save(self, prepared: Prepared, ready: Ready) -> None:
        """The final adapter, read back and compared bit by bit, with the tokenizer and the probe inputs."""
        staged = self.run.path / ".adapter"
        shutil.rmtree(staged, ignore_errors=True)
        checkpoint.save_adapter(ready.model, staged, public_name(self.recipe.model))
        prepared.processor.save_pretrained(str(staged))
        saved = load_file(staged / checkpoint.ADAPTER)
        held = sum(p.numel() for _, p in trainable(ready.model))
        if sum(t.numel() for t in saved.values()) < held or not all(bool(t.isfinite().all()) for t in saved.values()):
            raise ArtifactError("the saved adapter is incomplete or not finite", where=str(staged))
        source = prepared.held_out or prepared.train
        ids = [{"input_ids": list(s.inputs["input_ids"][:PROBE_TOKENS])} for s in source[:PROBES]]
        (staged / "probes.json").write_text(json.dumps(ids))
        shutil.rmtree(self.run.adapter, ignore_errors=True)
        staged.rename(self.run.adapter)

    def _close(
        self, prepared: Prepared, plan: Plan, outcome: loop.Outcome, metrics: Mapping[str, Mapping[str, float]]
    ) -> None:
        self.run.update(
            {
                "status": runs.STATUS_DONE,
                "metrics": metrics,
                "rows": plan.rows,
                "steps": outcome.progress.step,
                "best_step": outcome.best_step,
                "stopped_early": outcome.stopped_early,
                "trainable_parameters": plan.trainable_parameters,
                "total_parameters": plan.total_parameters,
                "fast_path": plan.fast_path,
                "tokens": outcome.progress.tokens,
                "tokens_per_s": round(outcome.progress.tokens / max(outcome.seconds, 1e-9), 1),
                "train_s": round(outcome.seconds, 2),
                "peak_memory_bytes": peak_memory_bytes(),
                "wall_s": round(time.time() - self.started, 2),
                "encode": {"max_length": prepared.options.max_length},
            }
        )
        card = model_card(self.recipe, self.run.facts, merged=False, figures={})
        runs.write_text(self.run.adapter / "README.md", card)


def dry_run(resolved: Resolved, listener: Listener | None = None) -> dict[str, Any]:
    """All checks that need no weights, and what training would do."""
    recipe = resolved.recipe
    prepared = prepare(recipe, listener or Silent())
    config = check_method(recipe, prepared)
    trains, total = count_parameters(add_adapter(skeleton(prepared.source, prepared.task.auto_class), config))
    per_epoch = steps_per_epoch(len(prepared.train), recipe.train.batch_size)
    steps = recipe.train.steps or math.ceil((recipe.train.epochs or DEFAULT_EPOCHS) * per_epoch)
    lengths = [s.length for s in prepared.train]
    groups = micro_batches(lengths[: recipe.train.batch_size], MICRO_BATCH_TOKENS["cpu"])
    return {
        "status": "dry-run",
        "rows": prepared.report.rows,
        "format": prepared.report.format,
        "samples": len(prepared.train),
        "held_out": len(prepared.held_out),
        "tokens_per_epoch": sum(lengths),
        "labelled_tokens": prepared.report.labelled_tokens,
        "longest": max(lengths),
        "steps": steps,
        "micro_batches_first_step": len(groups),
        "trainable_parameters": trains,
        "total_parameters": total,
        "outcomes": dict(prepared.report.outcomes),
        "sample": prepared.report.sample_shown,
    }
