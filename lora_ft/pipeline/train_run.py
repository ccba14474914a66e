"""One training from recipe to run directory: data, model, adapter, loop, judgement."""

import json
import time

import torch

from lora_ft import runs
from lora_ft.models.load import pick_device, pick_dtype
from lora_ft.models.origin import origin_of
from lora_ft.models.streaming import files_fingerprint
from lora_ft.recipe import Resolved
from lora_ft.records import Judgement, Listener, Plan
from lora_ft.report import public_name
from lora_ft.runs import Run
from lora_ft.training import checkpoint, few_shot, loop
from lora_ft.training.memory import peak_memory_bytes
from lora_ft.training.watch import check_metric
from lora_ft_adapters import count_parameters
from lora_ft_adapters.behaviour import driver_of
from lora_ft_adapters.registry import find_method

from .answer_files import answer_rows, write_rows
from .changes import changes
from .doubts import doubts
from .dry_run import check, steps_of
from .finish import close_run, save_final
from .judge import Judge, token_budget
from .loading import FILES
from .prepare import DEFAULT_EPOCHS, Prepared, answer_options, data_hash, prepare, strata, versions, workers
from .ready import Ready, check_quant, make_ready
from .rows import Given, absolute, absolute_sets
from .start import BODY_FACT, body_fingerprint, start_from


class Training:
    """The training of one run.

    Args:
        resolved: the recipe.
        run: its directory, locked by the caller.
        listener: hears of progress.
        given: what the caller has in memory.
    """

    def __init__(self, resolved: Resolved, run: Run, listener: Listener, given: Given) -> None:
        self.resolved, self.recipe, self.run, self.listener = resolved, resolved.recipe, run, listener
        self.given = given
        self.started = time.time()
        self.begun = False

    def run_all(self, resume: bool) -> None:
        """All stages in order."""
        recipe, run = self.recipe, self.run
        if not resume:
            self._begin(self.resolved.text())
        prepared = prepare(recipe, self.listener, self.given)
        check(recipe, prepared)
        device = pick_device()
        dtype, why = _dtype(recipe.train.dtype, prepared, device)
        self.listener.note(f"base {recipe.model} in {str(dtype).removeprefix('torch.')} on {device} ({why})")
        ready = make_ready(recipe, prepared, dtype, device)
        if ready.fresh:
            self.listener.note(f"starts at random, trains and is saved with the adapter: {', '.join(ready.fresh)}")
        if recipe.start_from:
            start_from(ready.model, recipe.start_from, ready.fresh, recipe.model, self.listener)
        plan, job = self._job(prepared, ready)
        text = self._facts(dtype, why)
        if resume:
            self._check_resume(job, text)
        self._begin(text)
        before = self._before(prepared, ready, dtype, resume)
        judge = self._judge_of(prepared, ready)
        before = before or self._judge(prepared, judge, "base", base=True)
        run.update({"metrics": {"before": before}})
        self.listener.start(plan)
        outcome = self._fit_head(job, plan) if recipe.train.few_shot else loop.train(job, resume=resume)
        save_final(recipe, run, prepared, ready.model)
        after = self._judge(prepared, judge, "adapter", base=False)
        for doubt in doubts(before, after, run.facts.get("tables", {}).get("after", {})):
            self.listener.warn(doubt)
        close_run(recipe, run, plan, outcome, {"before": before, "after": after}, time.time() - self.started)

    def _begin(self, recipe_text: str) -> None:
        self.begun = True
        recipe = self.recipe
        self.run.update({"status": "running", "base": recipe.model, "task": recipe.task.type, "versions": versions()})
        self.run.update({"error": None, "in_memory": self._in_memory()})
        path = self.run.path / "recipe.resolved.yaml"
        if self.resolved.name != path.stem:  # a run resumed from its own resolved recipe keeps the origins in it
            runs.write_text(path, recipe_text)

    def _in_memory(self) -> list[str]:
        given = {"model": self.given.model, "train_data": self.given.train, "eval_data": self.given.held_out}
        return [name for name, value in given.items() if value is not None]

    def _before(self, prepared: Prepared, ready: Ready, dtype: torch.dtype, resume: bool) -> dict[str, float] | None:
        """Write down what the run stands on; give the base's figures if an earlier part has them for these rows."""
        held = data_hash(prepared.held_out)
        facts = self.run.facts
        known = resume and facts.get("held_out_hash") == held
        self.run.update(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "quant": check_quant(self.recipe, prepared.base),
                "format": prepared.report.format,
                "fingerprint": ready.fingerprint,
                FILES: files_fingerprint(prepared.base, ready.fresh, dtype) if self.recipe.quant.type != "none" else "",
                BODY_FACT: body_fingerprint(ready.model),
                "fresh": ready.fresh,
                "held_out_hash": held,
                "encode": {"max_length": prepared.options.max_length},
                "task_facts": prepared.task.facts(),
                "hub_task": prepared.task.hub_task,
                "origin": {}
                if prepared.base.auto_class is None
                else origin_of(self.recipe.model, prepared.base.source),
                "chats": prepared.task.chats,
            }
        )
        runs.write_text(self.run.path / "data-report.json", json.dumps(prepared.cleaning, indent=2) + "\n")
        return facts.get("metrics", {}).get("before") if known else None

    def _check_resume(self, job: loop.Job, recipe_text: str) -> None:
        """Nothing of a run is changed before it is sure that it can go on."""
        newest = checkpoint.latest(self.run.checkpoints)
        checkpoint.check_identity(newest, job.identity)
        table = changes(self.run, recipe_text, versions())
        for line in [f"{len(table)} settings differ from those the run was started with:", *table] if table else ():
            self.listener.note(line)
        self.run.trim_log(int(newest.name.removeprefix("step-")))

    def _facts(self, dtype: torch.dtype, why: str) -> str:
        """The resolved recipe with what was decided; paths are absolute, so that it works from any folder."""
        recipe, train = self.recipe, self.recipe.train
        data = recipe.data
        paths = {("model",): recipe.model, ("start_from",): recipe.start_from, ("data", "eval"): data.eval}
        sources = absolute_sets(data.train if isinstance(data.train, str) else [s.model_dump() for s in data.train])
        no_length = not (train.epochs or train.steps or train.few_shot)
        dtype_origin = why if train.dtype == "auto" else self._origin("train", "dtype")
        return self.resolved.text(
            {
                **{k: (absolute(p), self._origin(*k)) for k, p in paths.items() if p},
                ("data", "train"): (sources, self._origin("data", "train")),
                ("train", "dtype"): (str(dtype).removeprefix("torch."), dtype_origin),
                **({("train", "epochs"): (DEFAULT_EPOCHS, "default")} if no_length else {}),
                ("out",): (str(self.run.path), self._origin("out")),
            }
        )

    def _judge_of(self, prepared: Prepared, ready: Ready) -> Judge:
        threads = workers(self.recipe, prepared.task)
        return Judge(prepared.task, ready.model, prepared.processor, ready.path.loss, self.listener, threads)

    def _origin(self, *path: str) -> str:
        return self.resolved.origins.get(path, "default")

    def _judge(self, prepared: Prepared, judge: Judge, what: str, *, base: bool) -> dict[str, float]:
        """Held-out metrics of the base or of the adapter; written answers are kept as rows, tables in run.json."""
        if not prepared.held_out:
            return {}
        side = "before" if base else "after"
        with judge.side(base):
            budget = token_budget(self.recipe, judge.model, prepared.task)
            found = judge.held_out(prepared.held_out, budget, f"judging the {what}: loss")()
            check_metric(self.recipe.train.metric_for_best_model, found.metrics)
            self._keep(side, found)
            chosen = answer_options(
                self.recipe, prepared.task, prepared.processor, prepared.held_out_examples, prepared.options,
                self.listener if base else None,
            )  # fmt: skip
            if chosen is None:
                return found.metrics
            predictions, judged = judge.answers(*chosen, f"judging the {what}: answers")
        self._keep(side, judged)
        write_rows(self.run.path / f"answers-{side}.jsonl", answer_rows(predictions, judged.right))
        return {**found.metrics, **judged.metrics}

    def _fit_head(self, job: loop.Job, plan: Plan) -> loop.Outcome:
        """Few-shot: no steps, but one convex fit of the head on cached features."""
        fit = few_shot.fit_head(
            job.model, job.samples, lambda samples: job.collate(samples, 0), job.loss,
            budget=job.tokens_per_micro_batch, seed=job.seed,
        )  # fmt: skip
        tokens, seconds = plan.tokens_per_epoch, fit.cache_s + fit.fit_s
        record = {
            "step": 1, "loss": fit.loss, "lr": 0.0, "tokens": tokens, "tokens_per_s": tokens / max(seconds, 1e-9),
            "memory_bytes": peak_memory_bytes(), "penalty": fit.penalty, "cache_s": fit.cache_s, "fit_s": fit.fit_s,
        }  # fmt: skip
        self.run.log(record)
        self.listener.step(record)
        self.listener.note(
            f"head fitted on {fit.rows} samples: features in {fit.cache_s:.1f} s, fit in {fit.fit_s:.1f} s, loss "
            f"{fit.loss:.4f}, penalty {fit.penalty:g}"
        )
        return loop.Outcome(checkpoint.Progress(step=1, tokens=tokens, seconds=seconds), False, 1)

    def _keep(self, side: str, found: Judgement) -> None:
        if found.tables:
            self.run.update({"tables": {**self.run.facts.get("tables", {}), side: found.tables}})
        if found.right:
            runs.write_text(self.run.path / f"right-{side}.json", json.dumps(found.right))

    def _job(self, prepared: Prepared, ready: Ready) -> tuple[Plan, loop.Job]:
        settings, task, data = self.recipe.train, prepared.task, self.recipe.data
        budget = token_budget(self.recipe, ready.model, task)
        judge = self._judge_of(prepared, ready)
        steps, per_epoch = steps_of(self.recipe, prepared)
        trains, total = count_parameters(ready.model)
        plan = Plan(
            steps=steps, epochs=round(steps / per_epoch, 2), batch_size=settings.batch_size, rows=len(prepared.train),
            tokens_per_epoch=prepared.report.tokens, trainable_parameters=trains, total_parameters=total,
            fast_path=ready.path.note,
        )  # fmt: skip
        held_out = judge.held_out(prepared.held_out, budget, "evaluating") if prepared.held_out else None
        job = loop.Job(
            model=ready.model,
            samples=prepared.train,
            collate=lambda samples, draw: task.collate(samples, prepared.processor, draw),
            loss=ready.path.loss,
            evaluate=(lambda: held_out().metrics) if held_out else None,
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
                "order": json.dumps([data.sampling, [w for _, w in sorted(prepared.weights.items())]]),
                "task": json.dumps([task.name, task.facts(), self.recipe.task.options()], sort_keys=True),
                "method": json.dumps(self.recipe.method.model_dump(mode="json"), sort_keys=True),
                "seed": self.recipe.seed,
                "batch_size": settings.batch_size,
                "optimizer": settings.optimizer,
                "metric_for_best_model": settings.metric_for_best_model,
            },
            log=self.run.log,
            listener=self.listener,
            driver=driver_of(ready.model),
            lr_scales=find_method(self.recipe.method.type).lr_scales,
            strata=strata(self.recipe, prepared),
            represent=ready.path.represent if task.whole_step else None,
            combine=task.combine if task.whole_step else None,
            mix=task.mix,
            workers=workers(self.recipe, task),
        )
        return plan, job


def _dtype(name: str, prepared: Prepared, device: torch.device) -> tuple[torch.dtype, str]:
    if name == "auto" and prepared.task.auto_class is None:
        return torch.float32, "auto: a module of your own"
    return pick_dtype(name, device)
