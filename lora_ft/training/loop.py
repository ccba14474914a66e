"""The training loop: a step is a set of samples, cut into micro-batches whose loss sums and label counts add up."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from lora_ft.errors import DivergedError, Interrupted, UsageError
from lora_ft.recipe import TrainSection
from lora_ft.records import Batch, Listener, LossSum, Sample
from lora_ft_adapters import trainable
from lora_ft_adapters.behaviour import Driver

from . import checkpoint
from .batching import micro_batches, step_samples
from .checkpoint import Progress, Trained
from .memory import peak_memory_bytes
from .optim import build_optimizer
from .rates import block_places, rate_scales, waking
from .schedule import rate_factor
from .signals import StopRequest, stop_on_signal

PLATEAU_FACTOR = 0.5  # of the rate, after an evaluation that is no better than the best


@dataclass(frozen=True)
class Job:
    """All that a training needs.

    Attributes:
        model: PeftModel on its device.
        samples: encoded training samples.
        collate: samples -> batch.
        loss: model, batch -> LossSum; the plain or the verified fast path.
        evaluate: the held-out metrics, "loss" among them, or None.
        settings: the recipe's train section.
        steps: optimizer steps in all.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints.
        tokens_per_micro_batch: computed at once, padding included.
        seed: of the order of samples.
        checkpoints: folder.
        identity: what a resumed run must agree with.
        log: takes one record per step or evaluation.
        listener: the display.
        driver: the method's hand in each step.
        lr_scales: of the method: parts of parameter names -> factor on the rate.
    """

    model: Any
    samples: Sequence[Sample]
    collate: Callable[[Sequence[Sample]], Batch]
    loss: Callable[[Any, Batch], LossSum]
    evaluate: Callable[[], dict[str, float]] | None
    settings: TrainSection
    steps: int
    eval_every: int | None
    save_every: int
    tokens_per_micro_batch: int
    seed: int
    checkpoints: Path
    identity: dict[str, Any]
    log: Callable[[Mapping[str, Any]], None]
    listener: Listener
    driver: Driver = field(default_factory=Driver)
    lr_scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        progress: final counters.
        stopped_early: whether early stopping ended it.
        best_step: step of the adapter now in the model.
    """

    progress: Progress
    stopped_early: bool
    best_step: int


def train(job: Job, *, resume: bool = False) -> Outcome:
    """Train the adapter in `job.model`; on return it holds the best evaluated state.

    Raises:
        DivergedError: loss or gradient is not finite; nothing of that step is applied.
        Interrupted: a signal came; a checkpoint was saved.
    """
    loop = _Loop(job)
    if resume:
        path = checkpoint.latest(job.checkpoints)
        step = int(path.name.removeprefix("step-"))
        loop.progress = checkpoint.restore(path, loop.trained, job.identity, loop.waiting(step - 1))
        job.listener.note(f"resumed from {path.name}")
    with stop_on_signal() as stop:
        return loop.run(stop)


class _Loop:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.progress = Progress()
        device = next(job.model.parameters()).device
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        if self.accelerator.gradient_accumulation_steps != 1:  # it would divide every loss
            raise UsageError("ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set", fix="unset it; use train.batch_size")
        named = list(trainable(job.model))
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        place = block_places(job.model)
        scales = rate_scales(self.names, job.settings, job.lr_scales, place)
        self.wakes = waking(self.names, job.settings.unfreeze_every, job.steps, place)
        self.optimizer: Optimizer = build_optimizer(named, job.settings, scales)
        self.trained = Trained(job.model, named, self.optimizer, job.driver)
        if job.settings.unfreeze_every and job.driver.needs_all_gradients:
            raise UsageError(
                "train.unfreeze_every does not go with this method", why="it needs every gradient", fix="leave it out"
            )

    def waiting(self, step: int) -> frozenset[str]:
        """Parameters that do not train yet at a step."""
        return frozenset(n for n, start in self.wakes.items() if start > step)

    def run(self, stop: StopRequest) -> Outcome:
        """Steps, evaluations and saves until the end, early stopping or a signal."""
        job, progress = self.job, self.progress
        early = self._patience_is_over()
        saved = progress.step
        while progress.step < job.steps and not early:
            self._step()
            best = False
            if self._due(job.eval_every):
                best, early = self._evaluate()
            if best or early or self._due(job.save_every) or stop:
                self._save()
                saved = progress.step
            if stop and not early and progress.step < job.steps:
                raise Interrupted(
                    f"stopped by signal {stop.signal} after step {progress.step}; a checkpoint is saved",
                    where=str(job.checkpoints),
                    fix=f"lora-ft train --resume --out {job.checkpoints.parent}",
                )
        if saved != progress.step:
            self._save()
        return self._finish(early)

    def _finish(self, early: bool) -> Outcome:
        progress = self.progress
        best = progress.best_step or progress.step
        if best != progress.step:
            checkpoint.load_trained(self.job.checkpoints / f"step-{best:08d}", self.trained)
            self.job.listener.note(f"kept the adapter of step {best}, which had the lowest evaluation loss")
        for p in self.parameters:
            p.requires_grad_(True)
        self.job.driver.finish()
        self.job.model.eval()
        return Outcome(progress, early, best)

    def _due(self, every: int | None) -> bool:
        return every is not None and (self.progress.step % every == 0 or self.progress.step == self.job.steps)

    def _step(self) -> None:
        job, progress = self.job, self.progress
        started = time.perf_counter()
        samples = [
            job.samples[i] for i in step_samples(progress.step, len(job.samples), job.settings.batch_size, job.seed)
        ]
        rate = self._set_rate()
        self._freeze_waiting()
        loss, norm = self._accumulate(samples)
        self._check_finite(loss, norm)
        self.optimizer.step()
        job.driver.after_step(progress.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        spent = time.perf_counter() - started
        tokens = sum(s.length for s in samples)
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += spent
        record = {
            "step": progress.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            "tokens": progress.tokens,
            "tokens_per_s": tokens / spent,
            "memory_bytes": peak_memory_bytes(),
        }
        job.log(record)
        job.listener.step(record)

    def _accumulate(self, samples: Sequence[Sample]) -> tuple[float, float]:
        """Gradients of the mean loss over all labels of `samples`; returns that loss and the gradient norm."""
        job = self.job
        job.model.train()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for group in micro_batches([s.length for s in samples], job.tokens_per_micro_batch):
            batch = {k: v.to(self.accelerator.device) for k, v in job.collate([samples[i] for i in group]).items()}
            loss = job.loss(job.model, batch)
            self.accelerator.backward(loss.total)
            total += loss.total.detach().double().cpu()
            count += loss.count
        penalty = job.driver.penalty()
        if penalty is not None:
            self.accelerator.backward(penalty * count)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(grads, 1.0 / count)
        job.driver.before_step()
        limit = job.settings.max_grad_norm
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.parameters, limit if limit is not None else math.inf)
        return float(total) / count, float(norm)

    def _freeze_waiting(self) -> None:
        if self.job.settings.unfreeze_every:
            asleep = self.waiting(self.progress.step)
            for name, p in self.trained.named:
                p.requires_grad_(name not in asleep)

    def _set_rate(self) -> float:
        job = self.job
        warmup = math.ceil(job.settings.warmup_ratio * job.steps)
        factor = rate_factor(job.settings.lr_scheduler_type, self.progress.step, job.steps, warmup)
        rate = job.settings.learning_rate * factor * self.progress.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        return rate

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        raise DivergedError(
            f"training diverged at step {self.progress.step + 1}: {what}",
            where=str(self.job.checkpoints),
            why=f"the step was not applied; {self._last_good()}",
            fix=f"--set train.learning_rate={self.job.settings.learning_rate / 5:g}, or look for broken rows",
        )

    def _evaluate(self) -> tuple[bool, bool]:
        """(whether this is the best so far, whether to stop)."""
        if self.job.evaluate is None:
            return False, False
        progress, settings = self.progress, self.job.settings
        metrics = self.job.evaluate()
        self.job.log({"step": progress.step, **{f"eval_{k}": v for k, v in metrics.items()}})
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        self.job.listener.note(f"step {progress.step}: held-out {shown}")
        best = metrics["loss"] < progress.best_loss
        if best:
            progress.best_loss, progress.best_step = metrics["loss"], progress.step
        least = settings.early_stopping.min_delta if settings.early_stopping else 0.0
        if metrics["loss"] < progress.waited_loss - least:
            progress.waited_loss, progress.bad_evals = metrics["loss"], 0
        else:
            progress.bad_evals += 1
            if settings.lr_scheduler_type == "reduce_lr_on_plateau":
                progress.lr_scale *= PLATEAU_FACTOR
        return best, self._patience_is_over()

    def _patience_is_over(self) -> bool:
        stopping = self.job.settings.early_stopping
        return stopping is not None and self.progress.bad_evals >= stopping.patience

    def _last_good(self) -> str:
        saved = sorted(p.name for p in self.job.checkpoints.glob("step-*"))
        return f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved before it"

    def _save(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            raise DivergedError(
                f"training diverged at step {self.progress.step}: adapter weights are not finite",
                where=str(self.job.checkpoints),
                why=self._last_good(),
                fix=f"--set train.learning_rate={self.job.settings.learning_rate / 5:g}",
            )
        checkpoint.save(self.job.checkpoints, self.trained, self.progress, self.job.identity)
