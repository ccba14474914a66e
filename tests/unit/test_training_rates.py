"""Rates against torch's schedulers, what an evaluation decides, and recipes whose numbers would be ignored."""

import json
import math
import random
import warnings
from dataclasses import asdict

import pytest
import torch

from lora_ft.errors import UsageError
from lora_ft.recipe import TrainSection, load_recipe
from lora_ft.recipe.training import SCHEDULE_OPTIONS
from lora_ft.training.checkpoint import Progress
from lora_ft.training.schedule import rate_factor, warmup_steps
from lora_ft.training.watch import check_metric, patience_is_over, take_in

MINIMAL = {"model": "m", "data": {"train": "t.jsonl"}}


def test_rates_rise_over_the_warmup_and_end_where_they_should():
    rise = [rate_factor("linear", s, 100, 10) for s in range(11)]
    assert rise == sorted(rise)
    assert rise[0] > 0
    assert rise[10] == 1.0
    assert rate_factor("linear", 99, 100, 10) == pytest.approx(1 / 90)
    assert rate_factor("cosine", 55, 100, 10) == pytest.approx(0.5)
    assert rate_factor("constant", 99, 100, 10) == 1.0
    assert [rate_factor("step", s, 90, 0) for s in (0, 29, 30, 89)] == pytest.approx([1, 1, 0.1, 0.01])


def torch_rates(make, steps: int, peak: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the optimizer never steps here
        scheduler = make(optimizer)
        for _ in range(steps - 1):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("total", [2, 3, 7, 100])
@pytest.mark.parametrize(
    "options", [{}, {"pct_start": 0.6}, {"pct_start": 0.0}, {"pct_start": 1.0, "div_factor": 4, "final_div_factor": 10}]
)
def test_one_cycle_has_torchs_rates(total, options):
    def make(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.3, total_steps=total, cycle_momentum=False, **options
        )

    ours = [0.3 * rate_factor("one_cycle", s, total, 0, options) for s in range(total)]
    assert ours == pytest.approx(torch_rates(make, total, 0.3), rel=1e-9)


def test_one_cycle_whose_first_step_is_the_peak_divides_by_nothing():
    rates = [rate_factor("one_cycle", s, 10, 0, {"pct_start": 0.1}) for s in range(10)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("options", [{"step_size": 4}, {"step_size": 4, "gamma": 0.5}, {"step_size": 1, "gamma": 1}])
def test_steps_of_a_number_are_torchs(options):
    def make(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, **options)

    ours = [0.3 * rate_factor("step", s, 30, 0, options) for s in range(30)]
    assert ours == pytest.approx(torch_rates(make, 30, 0.3), rel=1e-9)


def test_steps_of_a_share_count_from_the_end_of_the_warmup():
    for total, warmup in [(100, 10), (90, 0), (31, 1), (7, 2)]:
        falls = [s for s in range(warmup + 1, total)
                 if rate_factor("step", s, total, warmup) < rate_factor("step", s - 1, total, warmup)]  # fmt: skip
        after = total - warmup
        assert falls == [warmup + math.ceil(after / 3), warmup + math.ceil(2 * after / 3)]
    assert rate_factor("step", 99, 100, 0, {"step_size": 0.25, "gamma": 0.5}) == 0.125
    assert rate_factor("step", 3, 6, 0, {"step_size": 0.1, "gamma": 0.5}) == 0.5**5


def test_the_default_warmup_does_not_reach_one_cycle():
    assert warmup_steps(TrainSection(), 100) == 3
    assert warmup_steps(TrainSection(warmup_ratio=0), 100) == 0
    assert warmup_steps(TrainSection(warmup_ratio=0.101), 100) == 11
    assert warmup_steps(TrainSection(lr_scheduler_type="one_cycle"), 100) == 0


# ---- what an evaluation decides ----


def scales(values, metric, **options) -> list[float]:
    """Our factor on the rate after each evaluation; the state goes through JSON each time, as in a checkpoint."""
    settings = TrainSection(
        lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model=metric, lr_scheduler_kwargs=options
    )
    progress, found = Progress(), []
    for step, value in enumerate(values, 1):
        progress = Progress(**{**json.loads(json.dumps(asdict(progress))), "step": step})
        take_in(progress, settings, {metric: value})
        found.append(progress.lr_scale)
    return found


def torch_scales(values, mode, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e6)  # far above torch's smallest change
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, **options)
    found = []
    for value in values:
        scheduler.step(value)
        found.append(optimizer.param_groups[0]["lr"] / 1e6)
    return found


@pytest.mark.parametrize(("metric", "mode"), [("loss", "min"), ("accuracy", "max")])
@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("threshold", [0.0, 1e-4, 0.2])
def test_plateau_falls_where_torchs_does(metric, mode, patience, threshold):
    options = {"factor": 0.7, "patience": patience, "threshold": threshold}
    rng = random.Random(patience)
    for _ in range(20):
        values = [rng.choice([rng.random(), 0.5]) + 0.01 for _ in range(25)]
        ours = scales(values, metric, **options)
        assert ours == pytest.approx(torch_scales(values, mode, **options), rel=1e-9)
        assert ours[-1] < 1


def test_a_value_that_is_not_a_number_is_no_improvement():
    nan = float("nan")
    values = [nan, 2.0, nan, 1.0, nan, nan]
    options = {"factor": 0.5, "patience": 0}
    assert scales(values, "loss", **options) == [0.5, 0.5, 0.25, 0.25, 0.125, 0.0625]
    assert torch_scales(values, "min", **options) == [0.5, 0.5, 0.25, 0.25, 0.125, 0.0625]
    progress = Progress(step=1)
    assert not take_in(progress, TrainSection(early_stopping=1), {"loss": nan})
    assert (progress.best_value, progress.best_step, progress.bad_evals) == (None, 0, 1)


def test_standing_still_below_zero_is_a_plateau():
    """torch's relative threshold turns round there: of -1 it takes -1.0001 for the better one."""
    assert scales([-1.0, -1.0, -1.00005], "r2", factor=0.5) == [1.0, 0.5, 0.25]
    assert scales([-1.0, -0.9], "r2", factor=0.5) == [1.0, 1.0]


def test_best_and_patience_follow_the_metric_in_its_direction():
    settings = TrainSection(metric_for_best_model="f1", early_stopping={"patience": 2, "min_delta": 0.05})
    progress = Progress()
    seen = []
    for step, f1 in enumerate([0.50, 0.53, 0.56, 0.58, 0.57], 1):
        progress.step = step
        best = take_in(progress, settings, {"loss": 1.0 + step, "f1": f1})
        seen.append((best, progress.bad_evals, patience_is_over(progress, settings)))
    assert seen == [(True, 0, False), (True, 1, False), (True, 0, False), (True, 1, False), (False, 2, True)]
    assert (progress.best_step, progress.best_value, progress.waited_value) == (4, 0.58, 0.56)


def test_a_metric_that_does_not_exist_names_those_that_do():
    check_metric("f1", {"loss": 1.0, "f1": 0.5})
    with pytest.raises(UsageError, match="no held-out metric 'acuracy'") as caught:
        check_metric("acuracy", {"loss": 1.0, "accuracy": 0.5})
    assert (caught.value.why, caught.value.fix) == (
        "there are: accuracy, loss", "--set train.metric_for_best_model=accuracy",
    )  # fmt: skip
    with pytest.raises(UsageError, match="no held-out metric 'f1'"):
        take_in(Progress(), TrainSection(metric_for_best_model="f1"), {"loss": 1.0})


# ---- recipes ----


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["optimizer=adafactor", "momentum=0.9"], "optimizer adafactor does not use it, only sgd and rmsprop do"),
        (["momentum=0.9"], "optimizer adamw does not use it"),
        (["optimizer=sgd", "adam_beta1=0.9"], "train.adam_beta1: optimizer sgd does not use it, only adam and adamw"),
        (["optimizer=rmsprop", "adam_epsilon=1e-6"], "train.adam_epsilon"),
        (["optimizer=sgd", "momentum=1"], "train.momentum"),
        (["lr_scheduler_type=one_cycle", "warmup_ratio=0.03"], "one_cycle has its own rise"),
        (["lr_scheduler_type=step", "lr_scheduler_kwargs.stepsize=3"], "no 'stepsize'; did you mean 'step_size'"),
        (["lr_scheduler_kwargs.gamma=0.5"], "cosine takes none, so leave 'gamma' out"),
        (["lr_scheduler_type=step", "lr_scheduler_kwargs.step_size=2.5"], "a whole number of steps"),
        (["lr_scheduler_type=one_cycle", "lr_scheduler_kwargs.pct_start=1.5"], "pct_start of one_cycle must be 0 to 1"),
        (["lr_scheduler_type=reduce_lr_on_plateau", "lr_scheduler_kwargs.factor=1"], "factor of reduce_lr_on_plateau"),
        (["lr_scheduler_type=reduce_lr_on_plateau", "lr_scheduler_kwargs.patience=0.5"], "a whole number from 0"),
    ],
)
def test_a_number_that_would_be_ignored_or_cannot_be_is_refused(settings, said):
    with pytest.raises(UsageError) as caught:
        load_recipe([MINIMAL], sets=[f"train.{s}" for s in settings])
    assert said in str(caught.value)


@pytest.mark.parametrize("settings", [
    {}, {"optimizer": "sgd"}, {"lr_scheduler_type": "one_cycle"}, {"optimizer": "rmsprop", "momentum": 0.5},
    {"optimizer": "adam", "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6},
])  # fmt: skip
def test_a_resolved_recipe_with_all_defaults_written_out_is_valid_again(settings):
    first = TrainSection(**settings)
    assert TrainSection(**first.model_dump(mode="json")) == first


def test_every_schedule_of_the_recipe_has_its_options_and_defaults():
    names = TrainSection.model_fields["lr_scheduler_type"].annotation.__args__
    assert set(names) == set(SCHEDULE_OPTIONS)
    for name, options in SCHEDULE_OPTIONS.items():
        whole = TrainSection(lr_scheduler_type=name).schedule_options()
        assert whole == {n: o.default for n, o in options.items()}
        assert TrainSection(lr_scheduler_type=name, lr_scheduler_kwargs=whole).schedule_options() == whole
        assert 0 < rate_factor(name, 50, 100, 0, whole) <= 1
