"""Order and micro-batches: nothing lost, nothing over budget, the same for the same seed."""

import itertools
import random
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft.errors import UsageError
from lora_ft.training.batching import (
    OVERHEAD,
    Order,
    Stratum,
    balanced,
    by_length,
    draw_of,
    epoch_order,
    epoch_size,
    micro_batches,
    mixed,
    step_samples,
    steps_per_epoch,
)


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


@pytest.mark.parametrize(("n", "length", "budget"), [(1, 5, 3), (7, 3, 10), (8, 2, 4), (9, 4, 1000), (5, 7, 6)])
def test_samples_of_one_length_are_cut_as_the_search_would(n, length, budget):
    """One longer sample that fills a group of its own makes the search run over the rest."""
    searched = micro_batches([*[length] * n, 10_000], budget)
    assert searched[0] == [n]
    assert micro_batches([length] * n, budget) == searched[1:]


def test_samples_without_length_make_one_group_and_none_make_no_group():
    assert micro_batches([0, 0, 0], 10) == [[0, 1, 2]]
    assert micro_batches([], 10) == []


def test_equal_lengths_do_not_take_a_search_over_the_square_of_the_batch():
    started = time.perf_counter()
    assert len(micro_batches([1] * 100_000, 100_000)) == 1
    assert time.perf_counter() - started < 5


def test_the_order_without_strata_is_the_one_that_runs_were_made_with():
    """Checkpoints and published figures depend on it."""
    assert epoch_order(8, 3, 2) == [2, 3, 5, 7, 4, 0, 6, 1]
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 2)
    assert epoch_order(8, 3, 2) == torch.randperm(8, generator=generator).tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=4),
    st.integers(0, 2**31 - 1),
    st.integers(1, 6),
)
def test_an_epoch_takes_each_quota_and_over_epochs_every_sample_equally_often(shapes, seed, epochs):
    numbers = itertools.count()
    strata = [Stratum(tuple(itertools.islice(numbers, size)), quota) for size, quota in shapes]
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        order = epoch_order(sum(size for size, _ in shapes), seed, epoch, strata)
        assert order == epoch_order(999, seed, epoch, tuple(strata))
        assert len(order) == epoch_size(999, strata)
        for stratum in strata:
            assert sum(i in stratum.indices for i in order) == stratum.quota
        seen.update(order)
    for stratum in strata:
        counts = [seen[i] for i in stratum.indices]
        assert max(counts) - min(counts) <= 1


def test_strata_are_mixed_within_an_epoch_and_shuffled_anew_in_each():
    strata = balanced(["a"] * 30 + ["b"] * 30, 40)
    first, second = (epoch_order(60, 0, epoch, strata) for epoch in (0, 1))
    assert 5 <= sum(i < 30 for i in first[:20]) <= 15
    assert [i < 30 for i in first] != [i < 30 for i in second]
    assert epoch_order(60, 1, 0, strata) != first
    halves = [set(epoch_order(20, 0, epoch, [Stratum(tuple(range(20)), 10)])) for epoch in range(4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(20))
    assert halves[0] != halves[2]
    steps = [i for step in range(5) for i in step_samples(step, 60, 8, 0, strata)]
    assert steps == first
    assert step_samples(5, 60, 8, 0, strata) == second[:8]


def test_steps_out_of_turn_are_those_of_a_run_from_the_start():
    order = Order(10, 4, 7, balanced(["x", "y"] * 5, 6))
    walked = [order.step(s) for s in range(9)]
    assert [epoch for _, epoch in walked] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert Order(10, 4, 7, balanced(["x", "y"] * 5, 6)).step(6) == walked[6]
    assert order.step(1) == walked[1]


def test_balanced_classes_have_the_same_quota_whatever_their_size():
    strata = balanced(["b", "a", "b", "b", "b", "c"], 10)
    assert [(s.indices, s.quota) for s in strata] == [((1,), 3), ((0, 2, 3, 4), 3), ((5,), 3)]
    assert [s.quota for s in balanced(["a", "b", "c"], 1)] == [1, 1, 1]


def test_mixed_quotas_follow_the_weights_and_sum_to_the_size():
    sources = ["a"] * 5 + ["b"] * 3 + ["c"]
    strata = mixed(sources, {"a": 1, "b": 1, "c": 1}, 10)
    assert [s.quota for s in strata] == [4, 3, 3]
    assert [s.indices for s in strata] == [(0, 1, 2, 3, 4), (5, 6, 7), (8,)]
    assert [s.quota for s in mixed(sources, {"a": 0.5, "b": 0.3, "c": 0.2}, 9)] == [4, 3, 2]
    for size in range(9, 60):
        weights = {"a": 3.7, "b": 1.1, "c": 2.2}
        quotas = [s.quota for s in mixed(sources, weights, size)]
        assert sum(quotas) == size
        assert all(abs(q - size * w / 7) < 1 for q, w in zip(quotas, weights.values(), strict=True))


def test_weights_that_fit_no_source_or_give_no_sample_are_refused():
    with pytest.raises(UsageError, match="'newz' has a weight but no row; did you mean 'news'"):
        mixed(["news", "chat"], {"newz": 1, "news": 1, "chat": 1}, 4)
    with pytest.raises(UsageError, match="'chat' has rows but no weight"):
        mixed(["news", "chat"], {"news": 1}, 4)
    with pytest.raises(UsageError, match="'chat' gets no sample in an epoch of 10") as caught:
        mixed(["news", "chat"], {"news": 1000, "chat": 1}, 10)
    assert caught.value.fix.startswith("give it at least 100")
    with pytest.raises(ValueError, match="needs samples and a quota"):
        Stratum((), 3)


def test_draws_differ_by_seed_and_epoch_and_are_never_that_of_evaluation():
    draws = [draw_of(seed, epoch) for seed in range(20) for epoch in range(20)]
    assert len(set(draws)) == 400
    assert min(draws) >= 1
    assert max(draws) < 2**62  # small enough to add a sample's own number to and seed torch with
    assert draw_of(3, 4) == draw_of(3, 4)
    # Neighbours are far apart, so that draw + sample number never meets another epoch's.
    ordered = sorted(draws)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 1_000_000
