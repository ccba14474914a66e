"""The train verb: recipe -> data -> model -> adapter -> training -> judgement -> run directory."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_ft import runs
from lora_ft.errors import ArtifactError, DivergedError, Interrupted, UsageError
from lora_ft.models.load import pick_device, pick_dtype, skeleton
from lora_ft.recipe import Resolved
from lora_ft.records import Listener, Plan, Silent
from lora_ft.registry import QUANTIZERS
from lora_ft.report import model_card, public_name
from lora_ft.runs import Run
from lora_ft.training import checkpoint, loop
from lora_ft.training.memory import peak_memory_bytes
from lora_ft_adapters import AdapterError, add_adapter, count_parameters, save_adapter, state_of
from lora_ft_adapters.behaviour import behaviour_of, driver_of
from lora_ft_adapters.registry import find_method

from .judge import Judge, answer_rows, token_budget, write_rows
from .prepare import DEFAULT_EPOCHS, Prepared, answer_options, data_hash, planned_steps, prepare, usage, versions
from .ready import Ready, check_method, make_ready

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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("training with several processes is not supported yet", fix="start lora-ft without a launcher")
    path = out or (Path(resolved.recipe.out) if resolved.recipe.out else runs.default_path(resolved.name))
    run = Run(path) if resume else runs.create(path, overwrite=overwrite)
    if resume and not run.checkpoints.is_dir():
        raise ArtifactError("there is no run to resume", where=str(path), fix="leave --resume out to start it")
    with runs.locked(run):
        checkpoint.clean(run.checkpoints)
        training = _Training(resolved, run, listener)
        try:
            training.run_all(resume)
        except BaseException as error:
            status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            status = "diverged" if isinstance(error, DivergedError) else status
            if training.begun:  # a run that could not be resumed stays as it was
                run.update({"status": status, "error": str(getattr(error, "what", repr(error)))})
            raise
        finally:
            listener.finish()
    return run


class _Training:
    def __init__(self, resolved: Resolved, run: Run, listener: Listener) -> None:
        self.resolved, self.recipe, self.run, self.listener = resolved, resolved.recipe, run, listener
        self.started = time.time()
        self.begun = False

    def run_all(self, resume: bool) -> None:
        """All stages in order."""
        recipe, run = self.recipe, self.run
        if not resume:
            self._begin(self.resolved.text())
        prepared = prepare(recipe, self.listener)
        config = check_method(recipe, prepared)
        device = pick_device()
        dtype, why = pick_dtype(recipe.train.dtype, device)
        self.listener.note(f"base {recipe.model} in {str(dtype).removeprefix('torch.')} on {device} ({why})")
        ready = make_ready(recipe, prepared, config, dtype, device)
        plan, job = self._job(prepared, ready)
        if resume:
            self._check_resume(job)
        self._begin(self._facts(dtype, why))
        before = self._before(prepared, ready, dtype, resume)
        judge = Judge(prepared.task, ready.model, prepared.processor, ready.loss, self.listener)
        before = before or self._judge(prepared, judge, "base", base=True)
        run.update({"metrics": {"before": before}})
        self.listener.start(plan)
        outcome = loop.train(job, resume=resume)
        self._save(prepared, ready)
        after = self._judge(prepared, judge, "adapter", base=False)
        self._close(prepared, plan, outcome, {"before": before, "after": after})

    def _begin(self, recipe_text: str) -> None:
        self.begun = True
        recipe = self.recipe
        self.run.update({"status": "running", "base": recipe.model, "task": recipe.task, "versions": versions()})
        self.run.update({"error": None})
        path = self.run.path / "recipe.resolved.yaml"
        if self.resolved.name != path.stem:  # a run resumed from its own resolved recipe keeps the origins in it
            runs.write_text(path, recipe_text)

    def _before(self, prepared: Prepared, ready: Ready, dtype: torch.dtype, resume: bool) -> dict[str, float] | None:
        """Write down what the run stands on; give the base's figures if an earlier part has them for these rows."""
        held = data_hash(prepared.held_out)
        facts = self.run.facts
        known = resume and facts.get("held_out_hash") == held
        self.run.update(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "quant": self.recipe.quant,
                "format": prepared.report.format,
                "fingerprint": ready.fingerprint,
                "held_out_hash": held,
                "encode": {"max_length": prepared.options.max_length},
            }
        )
        return facts.get("metrics", {}).get("before") if known else None

    def _check_resume(self, job: loop.Job) -> None:
        """Nothing of a run is changed before it is sure that it can go on."""
        newest = checkpoint.latest(self.run.checkpoints)
        checkpoint.check_identity(newest, job.identity)
        self.run.trim_log(int(newest.name.removeprefix("step-")))

    def _facts(self, dtype: torch.dtype, why: str) -> str:
        name = str(dtype).removeprefix("torch.")
        recipe, train = self.recipe, self.recipe.train
        # Absolute, so that the run can be used from any folder.
        paths = {("model",): recipe.model, ("data", "train"): recipe.data.train, ("data", "eval"): recipe.data.eval}
        return self.resolved.text(
            {
                **{k: (str(Path(p).resolve()), self._origin(*k)) for k, p in paths.items() if p and Path(p).exists()},
                ("train", "dtype"): (
                    name,
                    why if self.recipe.train.dtype == "auto" else self._origin("train", "dtype"),
                ),
                **({("train", "epochs"): (DEFAULT_EPOCHS, "default")} if not (train.epochs or train.steps) else {}),
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
        steps, per_epoch = planned_steps(self.recipe, prepared)
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
            driver=driver_of(ready.model),
            lr_scales=find_method(self.recipe.method.type).lr_scales,
        )
        return plan, job

    def _save(self, prepared: Prepared, ready: Ready) -> None:
        """The final adapter, read back and compared bit by bit, with the tokenizer and the probe inputs."""
        staged = self.run.path / ".adapter"
        shutil.rmtree(staged, ignore_errors=True)
        save_adapter(ready.model, staged, base=public_name(self.recipe.model))
        prepared.processor.save_pretrained(str(staged))
        saved = load_file(staged / checkpoint.ADAPTER)
        wanted = state_of(ready.model)
        same = saved.keys() == wanted.keys() and all(torch.equal(saved[k], v.cpu()) for k, v in wanted.items())
        if not same or not all(bool(t.isfinite().all()) for t in saved.values()):
            raise ArtifactError("the saved adapter differs from the one in memory or is not finite", where=str(staged))
        source = prepared.held_out or prepared.train
        ids = [{"input_ids": list(s.inputs["input_ids"][:PROBE_TOKENS])} for s in source[:PROBES]]
        (staged / "probes.json").write_text(json.dumps(ids))
        runs.make_readable(staged)
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
                "tokens_per_s": round(outcome.progress.tokens / max(outcome.progress.seconds, 1e-9), 1),
                "train_s": round(outcome.progress.seconds, 2),
                "peak_memory_bytes": peak_memory_bytes(),
                "wall_s": round(time.time() - self.started, 2),
            }
        )
        card = model_card(self.recipe, self.run.facts, merged=False, figures={})
        runs.write_text(self.run.adapter / "README.md", card)


def _count(prepared: Prepared, config: Any) -> tuple[int | None, int]:
    """(trainable, total) parameters on a model without weights; None for a method that starts by decomposing them."""
    empty = skeleton(prepared.source, prepared.task.auto_class)
    total = count_parameters(empty)[1]
    try:
        return count_parameters(add_adapter(empty, behaviour_of(config).sketch(config)))
    except AdapterError as error:
        cause = str(error.__cause__)
        if "meta" in cause or isinstance(error.__cause__, NotImplementedError) or "set_data" in cause:
            return None, total
        raise usage(error) from error


def dry_run(resolved: Resolved, listener: Listener | None = None) -> dict[str, Any]:
    """All checks that need no weights, and what training would do."""
    recipe = resolved.recipe
    prepared = prepare(recipe, listener or Silent())
    QUANTIZERS.get(recipe.quant).load_arguments(torch.float32)
    config = check_method(recipe, prepared)
    trains, total = _count(prepared, config)
    steps, _ = planned_steps(recipe, prepared)
    lengths = [s.length for s in prepared.train]
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
        "trainable_parameters": trains,
        "total_parameters": total,
        "outcomes": dict(prepared.report.outcomes),
        "sample": prepared.report.sample_shown,
    }
