"""Training speed: our loop, a plain padded PEFT loop, and TRL's SFTTrainer, on the same samples with equal losses.

    python benchmarks/train_step.py [--rounds 5] [--steps 2] [--dtype float32] [--sigma 0.8]

Model: SmolLM2-135M (builtin). Samples: lognormal lengths (mean 110 tokens, sigma 0.8: about the spread of Alpaca
answers), the last 40 % of each labelled, 16 samples per optimizer step (the default of a recipe), LoRA r=16 on all
linear layers, AdamW, constant rate, no dropout, the same start for every arm. Rounds are interleaved (A B C A B C ...);
a figure is real tokens (no padding) per second; a ratio is the median over rounds. The timings are thrown away unless
each step's loss agrees between the arms and our gradient equals the plain loop's. Peak memory is that of a process of
its own per arm.
"""

import argparse
import os

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._side_by_side import facts, paired, write
from lora_ft.models.load import load_processor
from lora_ft.models.opening import BaseSpec
from lora_ft.models.resolve import resolve
from lora_ft.pipeline.judge import MICRO_BATCH_TOKENS
from lora_ft.recipe import TrainSection
from lora_ft.records import LossSum, Sample, Silent
from lora_ft.tasks.causal_lm import CausalLM
from lora_ft.training import loop
from lora_ft.training.batching import step_samples
from lora_ft.training.memory import peak_memory_bytes
from lora_ft_adapters import add_adapter, build_config, trainable
from lora_ft_adapters.fast.lora import Lean

BATCH, RATE, MEAN, LABELLED = 16, 1e-4, 110, 0.4
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
GRADIENT_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def samples(count: int, vocabulary: int, sigma: float) -> list[Sample]:
    """Random tokens with lognormal lengths; sigma 0 gives equal ones."""
    rng = random.Random(0)
    made = []
    for i in range(count):
        length = min(1024, max(16, round(rng.lognormvariate(math.log(MEAN) - sigma**2 / 2, sigma))))
        ids = [rng.randrange(10, vocabulary) for _ in range(length)]
        start = length - max(1, round(LABELLED * length))
        labels = [-100] * start + ids[start:]
        made.append(Sample({"input_ids": ids, "labels": labels}, length, length - start, f"sample {i}"))
    return made


class Bench:
    """One model, its adapter reset before each arm's turn."""

    def __init__(self, steps: int, dtype: str, sigma: float) -> None:
        self.steps, self.dtype = steps, dtype
        source = resolve("builtin:smollm2-135m-instruct", print)
        self.tokenizer = load_processor(source)
        spec = BaseSpec(source, "AutoModelForCausalLM")
        base = spec.open(dtype=getattr(torch, dtype), device=torch.device("cpu")).model
        torch.manual_seed(0)
        self.model = add_adapter(base, build_config("lora", {"r": 16}, "CAUSAL_LM"))
        self.samples = samples(BATCH * steps, base.config.vocab_size, sigma)
        self.tokens = sum(s.length for s in self.samples)
        self.start = {n: p.detach().clone() for n, p in trainable(self.model)}
        self.task = CausalLM()
        self.lean = Lean(self.model)

    def reset(self) -> None:
        """The adapter as it was made."""
        for name, parameter in trainable(self.model):
            parameter.data.copy_(self.start[name])
            parameter.grad = None

    def chosen(self, step: int) -> list[Sample]:
        """The samples of a step, the same for all arms."""
        return [self.samples[i] for i in step_samples(step, len(self.samples), BATCH, seed=0)]

    def loss(self, model: Any, batch: Any) -> LossSum:
        """The fast path that a run with this model and method takes, once it was verified."""
        with self.lean:
            return self.task.fast_loss(model, batch)

    def job(self, folder: Path, log: Callable[[Any], None]) -> loop.Job:
        """Our production loop on these samples."""
        settings = TrainSection(learning_rate=RATE, lr_scheduler_type="constant", warmup_ratio=0, batch_size=BATCH)
        return loop.Job(
            model=self.model, samples=self.samples, collate=partial(self.task.collate, processor=self.tokenizer),
            loss=self.loss, evaluate=None, settings=settings, steps=self.steps, eval_every=None,
            save_every=10**9, tokens_per_micro_batch=MICRO_BATCH_TOKENS["cpu"], seed=0, checkpoints=folder,
            identity={"base": "bench"}, log=log, listener=Silent(),
        )  # fmt: skip

    def ours(self) -> tuple[float, list[float]]:
        """(seconds, losses) of our loop."""
        losses: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            outcome = loop.train(self.job(Path(folder), lambda r: losses.append(r["loss"])))
        return outcome.progress.seconds, losses

    def plain(self) -> tuple[float, list[float]]:
        """The loop that people write: one padded batch, the model's own loss."""
        self.model.train()
        optimizer = torch.optim.AdamW([p for _, p in trainable(self.model)], lr=RATE, weight_decay=0.0)
        losses = []
        started = time.perf_counter()
        for step in range(self.steps):
            loss = self.model(**self.task.collate(self.chosen(step), self.tokenizer), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in trainable(self.model)], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().item())
        return time.perf_counter() - started, losses

    def trl(self, checkpointing: bool) -> tuple[float, list[float]]:
        """TRL's SFTTrainer; it checkpoints activations unless told not to."""
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        class Clock(TrainerCallback):
            seconds, began = 0.0, 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.began = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.seconds += time.perf_counter() - self.began

        rows = [
            {"input_ids": list(s.inputs["input_ids"]), "completion_mask": [int(x != -100) for x in s.inputs["labels"]]}
            for step in range(self.steps) for s in self.chosen(step)
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = SFTConfig(
                output_dir=folder, per_device_train_batch_size=BATCH, max_steps=self.steps, learning_rate=RATE,
                lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
                report_to=[], save_strategy="no", bf16=self.dtype == "bfloat16", use_cpu=True, max_length=None,
                completion_only_loss=True, gradient_checkpointing=checkpointing, train_sampling_strategy="sequential",
                disable_tqdm=True,
            )  # fmt: skip
            clock = Clock()
            trainer = SFTTrainer(
                model=self.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=self.tokenizer,
                callbacks=[clock],
            )  # fmt: skip
            with redirect_stdout(sys.stderr):
                trainer.train()
        if checkpointing:
            self.model.get_base_model().gradient_checkpointing_disable()
        return clock.seconds, [r["loss"] for r in trainer.state.log_history if "loss" in r]

    def arms(self) -> dict[str, Callable[[], tuple[float, list[float]]]]:
        """By name, ours first."""
        return {
            "ours": self.ours,
            "plain_padded_peft": self.plain,
            "trl_sft_as_shipped": partial(self.trl, True),
            "trl_sft_no_checkpointing": partial(self.trl, False),
        }

    def gradient_error(self) -> float:
        """Relative L2 between the gradient of our accumulated step and of the plain padded one, with B not zero."""
        self.reset()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainable(self.model):
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        self.model.train()
        self.model(**self.task.collate(self.chosen(0), self.tokenizer), use_cache=False).loss.backward()
        wanted = {n: p.grad.double() for n, p in trainable(self.model)}
        self.model.zero_grad()
        with tempfile.TemporaryDirectory() as folder:
            job = self.job(Path(folder), lambda r: None)
            job = replace(job, settings=job.settings.model_copy(update={"max_grad_norm": None}))
            loop._Loop(job)._accumulate(self.chosen(0))
        got = {n: p.grad.double() for n, p in trainable(self.model)}
        norm = torch.cat([g.flatten() for g in wanted.values()]).norm()
        off = torch.cat([(got[n] - wanted[n]).flatten() for n in wanted]).norm() / norm
        if not all(bool(g.any()) for g in got.values()):
            raise SystemExit("an adapter tensor got no gradient")
        return float(off)


def memory(arm: str, args: Any) -> int:
    """Peak resident bytes of a process that only runs one arm, one step."""
    command = [sys.executable, __file__, "--memory-of", arm, "--dtype", args.dtype, "--steps", "1"]
    command += ["--sigma", str(args.sigma)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    return int(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure, check, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sigma", type=float, default=0.8, help="of the lengths; 0: all equal")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    bench = Bench(args.steps, args.dtype, args.sigma)
    if args.memory_of:
        bench.arms()[args.memory_of]()
        print(peak_memory_bytes())
        return
    error = bench.gradient_error()
    limit = GRADIENT_TOLERANCE[args.dtype]
    print(f"gradient of our step against the plain one: relative error {error:.1e} (allowed {limit:.0e})")
    if error > limit:
        raise SystemExit("our gradient differs: the timing would mean nothing")
    seconds: dict[str, list[float]] = {name: [] for name in bench.arms()}
    losses: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):  # the first round warms up
        for name, arm in bench.arms().items():
            if not number and name.startswith("trl"):
                continue
            bench.reset()
            spent, losses[name] = arm()
            if number:
                seconds[name].append(spent)
            print(f"round {number} {name}: {bench.tokens / spent:.0f} tok/s", file=sys.stderr)
    differ = max(abs(a - b) for other in losses.values() for a, b in zip(losses["ours"], other, strict=True))
    if differ > LOSS_TOLERANCE[args.dtype]:
        raise SystemExit(f"losses differ by {differ:.1e} between the arms: {json.dumps(losses)}")
    report(args, bench, seconds, losses, error)


def report(
    args: Any, bench: Bench, seconds: dict[str, list[float]], losses: dict[str, list[float]], error: float
) -> None:
    """Table on stdout, JSON in the results folder."""
    result: dict[str, Any] = {
        "benchmark": "train_step", "dtype": args.dtype, "rounds": args.rounds, "steps": args.steps, "samples": BATCH,
        "sigma": args.sigma,
        "tokens_per_round": bench.tokens, "gradient_error": error, "losses": losses, "arms": {}, **facts(),
    }  # fmt: skip
    regime = "ragged" if args.sigma else "dense"
    print(f"\n{'arm':28}{'tok/s':>8}{'ours is faster by':>20}{'min - max':>16}{'peak memory':>14}")
    for name, spent in seconds.items():
        ratio = paired(seconds["ours"], spent)
        speed = bench.tokens / statistics.median(spent)
        peak = memory(name, args)
        result["arms"][name] = {"tokens_per_s": speed, "ratio": ratio, "peak_memory_bytes": peak, "seconds": spent}
        span = f"{ratio['min']:.2f} - {ratio['max']:.2f}"
        print(f"{name:28}{speed:8.0f}{ratio['median']:19.2f}x{span:>16}{peak / 2**30:11.2f} GiB")
    print(f"\nwritten to {write(f'train_step_cpu_{args.dtype}_{regime}', result)}")


if __name__ == "__main__":
    main()
