"""The training loop: steps, evaluations, checkpoints, and what ends it."""

import math
import time
from collections.abc import Mapping
from contextlib import closing

from accelerate import Accelerator
from torch.optim import Optimizer

from lora_ft.errors import DivergedError, Interrupted, UsageError
from lora_ft_adapters import trainable

from . import checkpoint
from .batching import Order
from .checkpoint import Progress, Trained
from .feed import Feed
from .gradients import step_gradients
from .job import Job, Outcome
from .memory import peak_memory_bytes
from .optim import build_optimizer
from .randomness import seed_step
from .rates import block_places, rate_scales, waking
from .schedule import rate_factor, warmup_steps
from .signals import StopRequest, stop_on_signal
from .watch import patience_is_over, take_in

__all__ = ["Job", "Outcome", "train"]


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
        loop.feed = loop._feed()
        job.listener.note(f"resumed from {path.name}")
    with stop_on_signal() as stop, closing(loop.feed):
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
        self.feed = self._feed()
        if job.settings.unfreeze_every and job.driver.needs_all_gradients:
            raise UsageError(
                "train.unfreeze_every does not go with this method", why="it needs every gradient", fix="leave it out"
            )

    def _feed(self) -> Feed:
        job = self.job
        order = Order(len(job.samples), job.settings.batch_size, job.seed, job.strata)
        return Feed(job, order, self.progress.step)

    def waiting(self, step: int) -> frozenset[str]:
        """Parameters that do not train yet at a step."""
        return frozenset(n for n, start in self.wakes.items() if start > step)

    def run(self, stop: StopRequest) -> Outcome:
        """Steps, evaluations and saves until the end, early stopping or a signal."""
        job, progress = self.job, self.progress
        early = patience_is_over(progress, job.settings)
        saved = progress.step
        while progress.step < job.steps and not early:
            self._step()
            metrics = self._evaluate() if self._due(job.eval_every) else {}
            best = bool(metrics) and progress.best_step == progress.step
            early = patience_is_over(progress, job.settings)
            if best or early or self._due(job.save_every) or stop:
                self._save()
                saved = progress.step
            if metrics:  # after saving, because a listener may end the training here
                job.listener.evaluated(progress.step, metrics)
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
            metric = self.job.settings.metric_for_best_model
            self.job.listener.note(
                f"kept the adapter of step {best}, whose held-out {metric} was the best: {progress.best_value:.4f}"
            )
        for p in self.parameters:
            p.requires_grad_(True)
        self.job.driver.finish()
        self.job.model.eval()
        return Outcome(progress, early, best)

    def _due(self, every: int | None) -> bool:
        return every is not None and (self.progress.step % every == 0 or self.progress.step == self.job.steps)

    def _step(self) -> None:
        job, progress = self.job, self.progress
        started, waited = time.perf_counter(), self.feed.waited
        step = self.feed.next()
        rate = self._set_rate()
        self._freeze_waiting()
        seed_step(job.seed, progress.step)
        loss, norm = step_gradients(job, self.parameters, step, self.accelerator.backward)
        self._check_finite(loss, norm)
        self.optimizer.step()
        job.driver.after_step(progress.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        spent = time.perf_counter() - started
        tokens = sum(s.length for s in step.samples)
        data_s = self.feed.waited - waited
        progress.step += 1
        progress.tokens += tokens
        progress.data_seconds += data_s
        progress.seconds += spent
        record = {
            "step": progress.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            "tokens": progress.tokens,
            "tokens_per_s": tokens / spent,
            "data_s": data_s,
            "memory_bytes": peak_memory_bytes(),
        }
        job.log(record)
        job.listener.step(record)

    def _freeze_waiting(self) -> None:
        if self.job.settings.unfreeze_every:
            asleep = self.waiting(self.progress.step)
            for name, p in self.trained.named:
                p.requires_grad_(name not in asleep)

    def _set_rate(self) -> float:
        settings, steps = self.job.settings, self.job.steps
        factor = rate_factor(
            settings.lr_scheduler_type,
            self.progress.step,
            steps,
            warmup_steps(settings, steps),
            settings.lr_scheduler_kwargs,
        )
        rate = settings.learning_rate * factor * self.progress.lr_scale
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

    def _evaluate(self) -> Mapping[str, float]:
        """The held-out metrics, written down and taken into account; none without held-out rows."""
        if self.job.evaluate is None:
            return {}
        progress = self.progress
        metrics = self.job.evaluate()
        self.job.log({"step": progress.step, **{f"eval_{k}": v for k, v in metrics.items()}})
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        self.job.listener.note(f"step {progress.step}: held-out {shown}")
        take_in(progress, self.job.settings, metrics)
        return metrics

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
