"""Optimizers of bitsandbytes: 8-bit state that is really small, saved by name, and refused where it cannot run."""

import pytest
import torch

from lora_ft.errors import UsageError
from lora_ft.recipe import TrainSection
from lora_ft.training.optim import BITSANDBYTES, build_optimizer, check_optimizer, load_state, state_by_name

pytest.importorskip("bitsandbytes")
EIGHT_BIT = ("adamw_8bit", "lion_8bit")


def _parameters():
    generator = torch.Generator().manual_seed(0)
    sizes = {"large": (64, 128), "small": (8, 16), "vector": (16,)}  # from 4096 numbers on the state has 8 bits
    return [(n, torch.nn.Parameter(torch.randn(size, generator=generator))) for n, size in sizes.items()]


def _steps(optimizer, named, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(100 + number)
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_a_resumed_run_goes_on_bit_for_bit(name):
    settings = TrainSection(optimizer=name, learning_rate=1e-2, weight_decay=0.1)
    whole, again = _parameters(), _parameters()
    first = build_optimizer(whole, settings, {})
    _steps(first, whole, range(3))
    saved = {k: v.clone() for k, v in state_by_name(first, whole).items()}
    for (_, new), (_, old) in zip(again, whole, strict=True):
        new.data.copy_(old.data)
    second = build_optimizer(again, settings, {})
    load_state(second, again, saved, frozenset())
    _steps(first, whole, range(3, 6))
    _steps(second, again, range(3, 6))
    for (n, a), (_, b) in zip(whole, again, strict=True):
        assert torch.equal(a, b), n


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_saved_state_is_small_and_shares_no_memory(name, tmp_path):
    from safetensors.torch import save_file

    named = _parameters()
    optimizer = build_optimizer(named, TrainSection(optimizer=name), {})
    _steps(optimizer, named, range(2))
    state = state_by_name(optimizer, named)
    save_file(state, tmp_path / "optim.safetensors")  # refuses tensors that share memory
    assert state["large|state1"].dtype == torch.uint8
    assert state["small|state1"].dtype == torch.float32
    kept = sum(v.nbytes for k, v in state.items() if k.startswith("large"))
    assert kept < 0.3 * 4 * named[0][1].numel() * (2 if name == "adamw_8bit" else 1)


def test_adamw_8bit_follows_adamw():
    ways = {}
    for name in ("adamw", "adamw_8bit"):
        named = _parameters()
        start = named[0][1].detach().clone()
        _steps(build_optimizer(named, TrainSection(optimizer=name, learning_rate=1e-2), {}), named, range(20))
        ways[name] = {n: p.detach() - start if n == "large" else p.detach() for n, p in named}
    for n in ("small", "vector"):
        torch.testing.assert_close(ways["adamw"][n], ways["adamw_8bit"][n], rtol=1e-4, atol=1e-6)
    away = (ways["adamw"]["large"] - ways["adamw_8bit"]["large"]).norm() / ways["adamw"]["large"].norm()
    assert 0 < away < 0.1


def test_weight_decay_is_decoupled_and_spares_vectors():
    named = _parameters()
    before = {n: p.detach().clone() for n, p in named}
    optimizer = build_optimizer(named, TrainSection(optimizer="adamw_8bit", learning_rate=0.1, weight_decay=0.5), {})
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(named[0][1].detach(), before["large"] * (1 - 0.1 * 0.5))
    assert torch.equal(named[2][1].detach(), before["vector"])


def test_paged_optimizer_without_a_gpu_is_refused_with_the_way_out():
    for name in (n for n in BITSANDBYTES if n.startswith("paged")):
        with pytest.raises(UsageError, match=f"{name} moves its state out of a GPU"):
            build_optimizer(_parameters(), TrainSection(optimizer=name), {})
    with pytest.raises(UsageError) as caught:
        check_optimizer("paged_adamw_32bit", torch.device("cpu"))
    assert caught.value.fix == "adamw"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        check_optimizer("adamw_8bit", torch.device("cpu"))
    assert caught.value.fix == "pip install 'lora-ft[quant]'"


def test_keys_that_the_rule_ignores_are_refused():
    with pytest.raises(ValueError, match="optimizer lion_8bit does not use it"):
        TrainSection(optimizer="lion_8bit", adam_epsilon=1e-6)
    assert TrainSection(optimizer="lion_8bit", adam_beta2=0.98).adam_beta2 == 0.98
