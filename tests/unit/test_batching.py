"""Order and micro-batches: nothing lost, nothing over budget, the same for the same seed."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft.training.batching import OVERHEAD, by_length, epoch_order, micro_batches, step_samples, steps_per_epoch
from lora_ft.training.schedule import rate_factor


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 900))
@pytest.mark.parametrize("cut", [micro_batches, by_length])
def test_every_sample_is_in_one_group_within_the_budget(cut, lengths, budget):
    groups = cut(lengths, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget


def test_micro_batches_are_the_cheapest_of_all_cuts():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randrange(1, 200) for _ in range(7)]
        order = sorted(lengths, reverse=True)

        def cost(cuts, order=order):
            groups = [order[a:b] for a, b in itertools.pairwise((0, *cuts, len(order)))]
            if any(len(g) > 1 and len(g) * g[0] > 400 for g in groups):
                return float("inf")
            return sum(len(g) * g[0] + OVERHEAD for g in groups)

        best = min(cost(c) for n in range(7) for c in itertools.combinations(range(1, 7), n))
        got = micro_batches(lengths, 400)
        assert sum(len(g) * max(lengths[i] for i in g) + OVERHEAD for g in got) == best


def test_an_epoch_sees_every_row_once_and_differs_from_the_next():
    seen = [i for step in range(steps_per_epoch(10, 4)) for i in step_samples(step, 10, 4, seed=3)]
    assert sorted(seen) == list(range(10))
    assert epoch_order(10, 3, 0) == epoch_order(10, 3, 0)
    assert epoch_order(10, 3, 0) != epoch_order(10, 3, 1)
    assert epoch_order(10, 3, 0) != epoch_order(10, 4, 0)


def test_rates_rise_over_the_warmup_and_end_where_they_should():
    rise = [rate_factor("linear", s, 100, 10) for s in range(11)]
    assert rise == sorted(rise)
    assert rise[0] > 0
    assert rise[10] == 1.0
    assert rate_factor("linear", 99, 100, 10) == pytest.approx(1 / 90)
    assert rate_factor("cosine", 55, 100, 10) == pytest.approx(0.5)
    assert rate_factor("constant", 99, 100, 10) == 1.0
    assert [rate_factor("step", s, 90, 0) for s in (0, 29, 30, 89)] == pytest.approx([1, 1, 0.1, 0.01])
