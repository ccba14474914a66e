"""On a CUDA device: paged and 8-bit optimizers learn, and go on from a checkpoint as if never stopped."""

import pytest
import torch

from lora_ft.recipe import TrainSection
from lora_ft.training.optim import BITSANDBYTES, build_optimizer, load_state, state_by_name

pytest.importorskip("bitsandbytes", reason="the quant extra")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _parameters():
    torch.manual_seed(0)
    sizes = {"paged": (512, 512), "large": (64, 128), "small": (8, 16)}  # from 1e5 numbers on the state is paged
    return [(n, torch.nn.Parameter(torch.randn(size, device="cuda"))) for n, size in sizes.items()]


def _steps(optimizer, named, numbers):
    for number in numbers:
        torch.manual_seed(100 + number)
        for _, p in named:
            p.grad = p.detach() + 0.1 * torch.randn(p.shape, device="cuda")
        optimizer.step()


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_resumed_run_goes_on_bit_for_bit(name):
    settings = TrainSection(optimizer=name, learning_rate=1e-2)
    whole, again = _parameters(), _parameters()
    start = {n: float(p.detach().norm()) for n, p in whole}
    first = build_optimizer(whole, settings, {})
    _steps(first, whole, range(3))
    saved = {k: v.clone() for k, v in state_by_name(first, whole).items()}
    for (_, new), (_, old) in zip(again, whole, strict=True):
        new.data.copy_(old.data)
    second = build_optimizer(again, settings, {})
    load_state(second, again, saved, frozenset())
    paged = getattr(second.state[again[0][1]]["state1"], "is_paged", False)
    assert paged == name.startswith("paged")
    _steps(first, whole, range(3, 6))
    _steps(second, again, range(3, 6))
    for (n, a), (_, b) in zip(whole, again, strict=True):
        assert torch.equal(a, b), n
        assert float(a.detach().norm()) < start[n]
