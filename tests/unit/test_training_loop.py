"""The loop against a plain PyTorch loop: every update rule, every schedule, and what a resumed run makes of them."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn

from lora_ft.errors import ArtifactError, DataError, UsageError
from lora_ft.recipe import TrainSection
from lora_ft.records import LossSum, Sample, Silent
from lora_ft.training import checkpoint
from lora_ft.training.batching import balanced, draw_of, epoch_order, step_samples
from lora_ft.training.loop import Job, train
from lora_ft.training.randomness import seed_all
from lora_ft_adapters import trainable
from lora_ft_adapters.behaviour import Driver
from tests.unit.test_own_methods import adapted

ROWS = 24


class Net(nn.Module):
    """Two layers with dropout, in float64."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(dropout), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.first(x))))


class Restless(Net):
    """Draws from every generator of the process."""

    def forward(self, x):
        if self.training:
            x = x * (1 + 0.3 * torch.rand(1) + 0.3 * np.random.rand() + 0.3 * random.random())
        return super().forward(x)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    xs = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return [
        Sample({"x": x.tolist(), "label": i % 3}, length=1 + i % 4, labelled=1, where=f"row {i}", label=str(i % 3))
        for i, x in enumerate(xs)
    ]


def collate(chosen, draw):
    return {
        "x": torch.tensor([s.inputs["x"] for s in chosen], dtype=torch.float64),
        "labels": torch.tensor([s.inputs["label"] for s in chosen]),
    }


def loss(model, batch) -> LossSum:
    total = nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="sum")
    return LossSum(total, len(batch["labels"]))


def make_job(folder, model=None, **given) -> Job:
    """A job on the net; `given` are settings of the train section, or fields of the job."""
    fields = {k: given.pop(k) for k in list(given) if k in Job.__dataclass_fields__}
    folder.mkdir(exist_ok=True)
    settings = TrainSection(**{"batch_size": 8, "learning_rate": 0.05, "warmup_ratio": 0, **given})
    everything = {
        "model": model or adapted("full", Net()), "samples": samples(), "collate": collate, "loss": loss,
        "evaluate": None, "settings": settings, "steps": 9, "eval_every": None, "save_every": 100,
        "tokens_per_micro_batch": 7, "seed": 3, "checkpoints": folder, "identity": {"base": "net"},
        "log": lambda record: None, "listener": Silent(),
    }  # fmt: skip
    return Job(**{**everything, **fields})


def outputs(model) -> torch.Tensor:
    return model.eval()(collate(samples(), 0)["x"])


def plain_loop(rule, schedule=None, *, decay=0.1, clip=1.0, steps=9, values=None):
    """Whole batches, torch's optimizer and scheduler, no weight decay on biases."""
    net = Net()
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in net.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = rule(groups)
    scheduler = schedule(optimizer) if schedule else None
    losses = []
    for step in range(steps):
        chosen = [samples()[i] for i in step_samples(step, ROWS, 8, 3)]
        batch = collate(chosen, 0)
        mean = nn.functional.cross_entropy(net(batch["x"]), batch["labels"])
        optimizer.zero_grad()
        mean.backward()
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if values is not None:
            scheduler.step(values[step])
        elif scheduler and step < steps - 1:
            scheduler.step()
        losses.append(mean.item())
    return net, losses


SGD = {"optimizer": "sgd"}
RULES = {
    "sgd": (SGD, lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9)),
    "sgd-plain": ({**SGD, "momentum": 0}, lambda g: torch.optim.SGD(g, lr=0.05)),
    "adam": ({"optimizer": "adam"}, lambda g: torch.optim.Adam(g, lr=0.05)),
    "adamw": ({"optimizer": "adamw"}, lambda g: torch.optim.AdamW(g, lr=0.05)),
    "adamw-own": (
        {"optimizer": "adamw", "adam_beta1": 0.7, "adam_beta2": 0.95, "adam_epsilon": 1e-3},
        lambda g: torch.optim.AdamW(g, lr=0.05, betas=(0.7, 0.95), eps=1e-3),
    ),
    "rmsprop": ({"optimizer": "rmsprop"}, lambda g: torch.optim.RMSprop(g, lr=0.05)),
    "rmsprop-own": ({"optimizer": "rmsprop", "momentum": 0.5}, lambda g: torch.optim.RMSprop(g, 0.05, momentum=0.5)),
    "adafactor": ({"optimizer": "adafactor"}, lambda g: torch.optim.Adafactor(g, lr=0.05, eps=(None, 1.0))),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_each_optimizer_trains_as_torchs_own_with_decay_and_clipping(tmp_path, rule):
    settings, plain = RULES[rule]
    log = []
    job = make_job(
        tmp_path, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.4, log=log.append, **settings
    )
    train(job)
    net, losses = plain_loop(plain, clip=0.4)
    assert max(r["grad_norm"] for r in log) > 0.4  # so something was clipped
    assert [r["loss"] for r in log] == pytest.approx(losses, rel=1e-9)
    assert torch.allclose(outputs(job.model), outputs(net), rtol=1e-8, atol=1e-9)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=9, cycle_momentum=False)


def stepped(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.3)


@pytest.mark.parametrize(("settings", "schedule"), [
    ({"lr_scheduler_type": "one_cycle", "warmup_ratio": None}, one_cycle),
    ({"lr_scheduler_type": "step", "lr_scheduler_kwargs": {"step_size": 2, "gamma": 0.3}}, stepped),
])  # fmt: skip
def test_schedules_train_as_torchs_own(tmp_path, settings, schedule):
    job = make_job(tmp_path, **SGD, **settings)
    train(job)
    net, _ = plain_loop(lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9), schedule, decay=0)
    assert torch.allclose(outputs(job.model), outputs(net), rtol=1e-8, atol=1e-9)


F1 = [0.1, 0.3, 0.2, 0.25, 0.4, 0.1, 0.1, 0.1, 0.1]


def test_plateau_trains_as_torchs_own_and_the_best_by_that_metric_is_kept(tmp_path):
    values = iter(F1)
    options = {"factor": 0.3, "patience": 1, "threshold": 0.01}
    log = []
    job = make_job(
        tmp_path, **SGD, lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs=options,
        metric_for_best_model="f1", evaluate=lambda: {"loss": 1.0, "f1": next(values)}, eval_every=1, log=log.append,
    )  # fmt: skip
    outcome = train(job)
    assert (outcome.best_step, outcome.progress.best_value) == (5, 0.4)

    def schedule(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", **options)

    _, losses = plain_loop(lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9), schedule, decay=0, values=F1)
    steps = [r for r in log if "lr" in r]
    assert [r["loss"] for r in steps] == pytest.approx(losses, rel=1e-9)
    assert len({r["lr"] for r in steps}) == 3
    best, _ = plain_loop(lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9), schedule, decay=0, values=F1[:5], steps=5)
    assert torch.allclose(outputs(job.model), outputs(best), rtol=1e-8, atol=1e-9)


class Stop(Silent):
    """Ends the training from within, after an evaluation, as a sweep does."""

    def __init__(self, step: int) -> None:
        self.at, self.heard = step, []

    def evaluated(self, step, metrics):
        self.heard.append((step, dict(metrics)))
        if step == self.at:
            raise RuntimeError("pruned")


RESUMED = [
    {"lr_scheduler_type": "one_cycle", "warmup_ratio": None},
    {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 1, "threshold": 0.0},
        "early_stopping": {"patience": 4, "min_delta": 0.01},
        "metric_for_best_model": "f1",
    },
    {"optimizer": "sgd", "momentum": 0, "lr_scheduler_type": "step"},
    {"optimizer": "sgd"},
    {"optimizer": "adam"},
    {"optimizer": "rmsprop", "momentum": 0.5},
    {"optimizer": "adafactor"},
    {"optimizer": "sgd", "unfreeze_every": 3},
    {"optimizer": "adafactor", "unfreeze_every": 3},
]


@pytest.mark.parametrize("settings", RESUMED, ids=str)
@pytest.mark.parametrize("cut", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, settings, cut):
    def run(folder, listener, resume):
        model = adapted("full", Restless(dropout=0.3) if "unfreeze_every" not in settings else stack())
        done = 0 if not resume else cut
        values = iter(F1[done:])
        log = []
        seed_all(1 + resume)
        job = make_job(
            folder, model, evaluate=lambda: {"loss": 1.0, "f1": next(values)}, eval_every=1, save_every=1,
            listener=listener, log=log.append, strata=balanced([s.label for s in samples()], 12), **settings,
        )  # fmt: skip
        try:
            outcome = train(job, resume=resume)
        except RuntimeError:
            outcome = None
        return outcome, model, log

    whole, model, log = run(tmp_path / "whole", Silent(), False)
    stopped, _, first = run(tmp_path / "cut", Stop(cut), False)
    assert stopped is None
    resumed, again, second = run(tmp_path / "cut", Silent(), True)
    kept = [(r["step"], r["loss"], r["lr"]) for r in log if "lr" in r]
    assert [(r["step"], r["loss"], r["lr"]) for r in first + second if "lr" in r] == kept
    assert replace(whole.progress, seconds=0, data_seconds=0) == replace(resumed.progress, seconds=0, data_seconds=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_evaluations_draw_changes_nothing_of_what_trains(tmp_path):
    def run(folder, seed, eval_every):
        seed_all(seed)
        model = adapted("full", Restless(dropout=0.3))
        better = count()

        def judge():
            return {"loss": float(torch.rand(1) + np.random.rand() + random.random()), "f1": next(better)}

        train(make_job(folder, model, evaluate=judge, eval_every=eval_every, metric_for_best_model="f1"))
        return model

    never, often = run(tmp_path / "never", 1, 9), run(tmp_path / "often", 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(never.parameters(), often.parameters(), strict=True))


def stack() -> nn.Module:
    """Three layers one upon another."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "adafactor"])
def test_layers_that_sleep_do_not_move_and_do_not_decay(tmp_path, optimizer):
    model = adapted("full", stack())
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    moved = []

    class Watch(Silent):
        def step(self, record):
            pairs = zip(trained, start, strict=True)
            moved.append([not torch.equal(p, q) for p, q in pairs][::2])

    job = make_job(tmp_path, model, optimizer=optimizer, unfreeze_every=3, weight_decay=0.5, listener=Watch())
    train(job)
    assert moved == [[False, False, True]] * 3 + [[False, True, True]] * 3 + [[True, True, True]] * 3


# ---- evaluations and listeners ----


def test_a_listener_that_ends_the_run_after_the_best_evaluation_loses_nothing(tmp_path):
    values = iter([3.0, 2.0, 1.0, 0.5])
    log, listener = [], Stop(3)
    job = make_job(tmp_path, evaluate=lambda: {"loss": next(values)}, eval_every=1, log=log.append, listener=listener)
    with pytest.raises(RuntimeError, match="pruned"):
        train(job)
    assert listener.heard == [(1, {"loss": 3.0}), (2, {"loss": 2.0}), (3, {"loss": 1.0})]
    assert [r["eval_loss"] for r in log if "eval_loss" in r] == [3.0, 2.0, 1.0]
    newest = checkpoint.latest(tmp_path)
    assert newest.name == "step-00000003"
    saved = json.loads((newest / "state.json").read_text())["progress"]
    assert (saved["best_step"], saved["best_value"]) == (3, 1.0)


def test_an_unknown_metric_ends_the_run_at_its_first_evaluation(tmp_path):
    job = make_job(tmp_path, metric_for_best_model="f2", evaluate=lambda: {"loss": 1.0, "f1": 0.5}, eval_every=2)
    with pytest.raises(UsageError, match="no held-out metric 'f2'") as caught:
        train(job)
    assert caught.value.why == "there are: f1, loss"


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    job = make_job(tmp_path)
    train(job)
    path = checkpoint.latest(tmp_path)
    state = json.loads((path / "state.json").read_text())
    state["progress"]["best_loss"] = state["progress"].pop("best_value")
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ArtifactError, match="written by another version"):
        checkpoint.check_identity(path, job.identity)


def test_an_adam_checkpoint_without_a_layers_state_is_refused_though_plain_sgd_keeps_none(tmp_path):
    job = make_job(tmp_path, optimizer="sgd", momentum=0)
    train(job)
    with pytest.raises(ArtifactError, match=r"optimizer state of .* is missing"):
        train(replace(job, settings=TrainSection(optimizer="adam")), resume=True)


# ---- draws, strata, weights ----


def test_every_step_of_an_epoch_collates_with_the_draw_of_that_epoch(tmp_path):
    draws = []

    def noted(chosen, draw):
        draws.append((draw, len(chosen)))
        return collate(chosen, draw)

    train(make_job(tmp_path, collate=noted, steps=7, tokens_per_micro_batch=100))  # three steps of 8 in an epoch
    assert [d for d, _ in draws] == [draw_of(3, e) for e in (0, 0, 0, 1, 1, 1, 2)]


def test_an_epoch_of_strata_is_as_long_as_their_quotas(tmp_path):
    seen = []

    def noted(chosen, draw):
        seen.append((draw, [int(s.where.split()[1]) for s in chosen]))
        return collate(chosen, draw)

    strata = balanced(["rare"] * 3 + ["common"] * (ROWS - 3), 12)
    train(make_job(tmp_path, collate=noted, steps=4, strata=strata, tokens_per_micro_batch=1000))
    assert [len(rows) for _, rows in seen] == [8, 4, 8, 4]
    assert [d for d, _ in seen] == [draw_of(3, 0)] * 2 + [draw_of(3, 1)] * 2
    for epoch in (0, 1):
        rows = [i for _, rows in seen[2 * epoch : 2 * epoch + 2] for i in rows]
        assert Counter(rows) == Counter(epoch_order(ROWS, 3, epoch, strata))
        assert sum(i < 3 for i in rows) == 6


def test_weights_of_labels_are_summed_over_the_step_not_over_each_micro_batch(tmp_path):
    weight = torch.tensor([0.2, 1.0, 2.5], dtype=torch.float64)

    def weighed(model, batch):
        total = nn.functional.cross_entropy(model(batch["x"]), batch["labels"], weight=weight, reduction="sum")
        return LossSum(total, float(weight[batch["labels"]].sum()))

    log = []
    train(make_job(tmp_path, loss=weighed, steps=1, log=log.append))
    batch = collate([samples()[i] for i in step_samples(0, ROWS, 8, 3)], 0)
    want = nn.functional.cross_entropy(Net()(batch["x"]), batch["labels"], weight=weight)  # torch's weighted mean
    assert log[0]["loss"] == pytest.approx(want.item(), rel=1e-12)


def test_a_methods_penalty_weighs_the_same_however_the_step_is_cut(tmp_path):
    class Shrink(Driver):
        def penalty(self):
            return sum(p.square().sum() for _, p in trainable(model)) * 0.5

    found = []
    for budget in (4, 1000):
        model = adapted("full", Net())
        job = make_job(
            tmp_path / str(budget), model, **SGD, momentum=0, lr_scheduler_type="constant", max_grad_norm=None,
            steps=1, tokens_per_micro_batch=budget, driver=Shrink(),
        )  # fmt: skip
        train(job)
        found.append(outputs(model))
    net = Net()
    batch = collate([samples()[i] for i in step_samples(0, ROWS, 8, 3)], 0)
    (nn.functional.cross_entropy(net(batch["x"]), batch["labels"])).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.05 * (p.grad + p)
    assert all(torch.allclose(outputs(net), o, rtol=1e-10, atol=1e-12) for o in found)


def test_a_step_without_any_label_says_so(tmp_path):
    with pytest.raises(DataError, match="no sample of a step carries a label") as caught:
        train(make_job(tmp_path, loss=lambda m, b: replace(loss(m, b), count=0)))
    assert "row " in caught.value.where
