"""Losses that need a whole step, in the memory of a micro-batch: the gradient is that of one batch."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_ft.records import LossSum, Silent
from lora_ft.training.batching import Order, micro_batches, step_samples
from lora_ft.training.feed import Feed
from lora_ft.training.gradients import step_gradients
from lora_ft.training.loop import train
from lora_ft_adapters import trainable
from tests.unit.test_own_methods import adapted
from tests.unit.test_training_loop import ROWS, Net, collate, make_job, samples


def represent(model, batch):
    """Two views of each sample (B, 2, 3)."""
    return torch.stack([model(batch["x"]), model(-(batch["x"] ** 2))], dim=1)


def combine(found) -> LossSum:
    """Contrastive with in-batch negatives; the places weigh differently, so the order of samples matters."""
    ones, others = nn.functional.normalize(found, dim=-1).unbind(1)
    each = nn.functional.cross_entropy(ones @ others.T / 0.1, torch.arange(len(found)), reduction="none")
    weights = torch.linspace(0.5, 2.0, len(found), dtype=each.dtype)
    return LossSum((each * weights).sum(), float(weights.sum()))


def noisy(found) -> LossSum:
    """A loss that draws random numbers of its own."""
    return combine(nn.functional.dropout(found, 0.2))


def gradients(tmp_path, budget, dropout=0.0, seed=11, joined=combine):
    """(loss, norm, gradient of each tensor, random numbers drawn next) of the first step."""
    model = adapted("full", Net(dropout))
    job = make_job(
        tmp_path, model, represent=represent, combine=joined, tokens_per_micro_batch=budget, max_grad_norm=None
    )
    parameters = [p for _, p in trainable(model)]
    torch.manual_seed(seed)
    step = Feed(job, Order(ROWS, 8, 3), 0).next()
    mean, norm = step_gradients(job, parameters, step, lambda total: total.backward())
    return mean, norm, [p.grad for p in parameters], torch.rand(3)


@pytest.mark.parametrize("budget", [1, 4, 9])
def test_micro_batches_give_the_gradient_of_one_batch(tmp_path, budget):
    one = gradients(tmp_path, 1000)
    assert len(micro_batches([s.length for s in samples()[:8]], budget)) > 1
    cut = gradients(tmp_path, budget)
    assert cut[:2] == pytest.approx(one[:2], rel=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(one[2], cut[2], strict=True))


def reference(budget, dropout, seed=11):
    """The micro-batches in one graph, one after another; the loss over all in the order of the step; plain autograd."""
    model = adapted("full", Net(dropout)).train()
    parameters = [p for _, p in trainable(model)]
    chosen = [samples()[i] for i in step_samples(0, ROWS, 8, 3)]
    places = [i for group in micro_batches([s.length for s in chosen], budget) for i in group]
    torch.manual_seed(seed)
    rows = {}
    for group in micro_batches([s.length for s in chosen], budget):
        rows |= dict(zip(group, represent(model, collate([chosen[i] for i in group], 0)), strict=True))
    result = noisy(torch.stack([rows[i] for i in range(8)]))
    assert sorted(places) == list(range(8))
    assert places != sorted(places)
    return result, torch.autograd.grad(result.total / result.count, parameters), torch.rand(3)


@pytest.mark.parametrize("budget", [4, 9, 1000])
def test_dropout_draws_the_same_masks_in_both_passes_and_the_next_draw_is_the_one_after(tmp_path, budget):
    result, wanted, next_draw = reference(budget, 0.4)
    mean, _, got, drawn = gradients(tmp_path, budget, 0.4, joined=noisy)
    assert mean == pytest.approx(result.total.item() / result.count, rel=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(wanted, got, strict=True))
    assert torch.equal(drawn, next_draw)
    other = gradients(tmp_path, budget, 0.4, seed=12, joined=noisy)
    assert other[0] != pytest.approx(mean, rel=1e-6)  # so the masks matter here


def test_no_more_than_one_micro_batch_is_in_a_graph_at_once(tmp_path):
    sizes = []

    def noted(model, batch):
        sizes.append((len(batch["x"]), torch.is_grad_enabled()))
        return represent(model, batch)

    job = make_job(tmp_path, represent=noted, combine=combine, tokens_per_micro_batch=4, steps=1)
    train(job)
    half = len(sizes) // 2
    assert [n for n, _ in sizes[:half]] == [n for n, _ in sizes[half:]]
    assert sum(n for n, _ in sizes[:half]) == 8
    assert [grad for _, grad in sizes] == [False] * half + [True] * half
    sizes.clear()
    train(replace(job, tokens_per_micro_batch=1000))
    assert sizes == [(8, True)]


def test_a_whole_step_run_resumes_bit_for_bit_with_dropout(tmp_path):
    def run(folder, steps, resume=False):
        model = adapted("full", Net(0.3))
        torch.manual_seed(4 + resume)
        folder.mkdir(exist_ok=True)
        job = make_job(
            folder, model, represent=represent, combine=combine, tokens_per_micro_batch=6, steps=steps, save_every=2,
            lr_scheduler_type="constant", listener=Silent(),
        )  # fmt: skip
        train(job, resume=resume)
        return [p.detach().clone() for p in model.parameters()]

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "cut", 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(tmp_path / "cut", 5, resume=True), strict=True))


def test_half_of_a_whole_step_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="go together"):
        make_job(tmp_path, represent=represent)


def test_a_step_that_fits_is_not_cut_because_each_part_would_run_twice(tmp_path):
    assert len({s.length for s in samples()[:8]}) > 1
    whole = make_job(tmp_path, represent=represent, combine=combine, tokens_per_micro_batch=10**6)
    assert len(Feed(whole, Order(ROWS, 8, 3), 0).next().groups) == 1
    cut = make_job(tmp_path, represent=represent, combine=combine, tokens_per_micro_batch=4)
    assert len(Feed(cut, Order(ROWS, 8, 3), 0).next().groups) > 1
