"""4-bit weights made by the fast way are bitsandbytes' own, so that a base has one form wherever it was quantised."""

import pytest
import torch

pytest.importorskip("bitsandbytes")

import bitsandbytes.backends.default.ops  # noqa: F401 - the plain way

from lora_ft.models.quantizers import _four_bit


def plain(weight, blocksize, kind, storage=torch.uint8):
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return torch.ops.bitsandbytes.quantize_4bit.default.redispatch(keys, weight, blocksize, kind, storage)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "blocksize"), [((64, 96), 64), ((1, 7), 64), ((33, 65), 32), ((513, 1024), 4096)])
def test_every_bit_is_that_of_the_plain_way(kind, dtype, shape, blocksize):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(shape, generator=generator) * 0.03).to(dtype)
    weight[0, :3] = 0
    wanted, got = plain(weight, blocksize, kind), _four_bit.quantize(weight, blocksize, kind, torch.uint8)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    if weight.numel() % 8 == 0:
        stored = _four_bit.quantize(weight, blocksize, kind, torch.float32)[0]
        assert torch.equal(stored.view(torch.uint8), plain(weight, blocksize, kind, torch.float32)[0].view(torch.uint8))


def test_it_is_what_torch_calls():
    assert _four_bit.faster()
    weight = torch.randn(64, 64)
    got = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", torch.uint8)[0]
    assert torch.equal(got, plain(weight, 64, "nf4")[0])


def test_a_way_that_differs_is_found(monkeypatch):
    assert _four_bit._same("nf4", torch.float32, plain)
    monkeypatch.setattr(_four_bit, "SMALLEST", 1e3)
    assert not _four_bit._same("nf4", torch.float32, plain)


def test_numbers_that_are_not_finite_stop_nothing_here_and_stay_not_finite():
    weight = torch.randn(2, 64)
    weight[0, 3], weight[1, 5] = float("nan"), float("inf")
    _, scales = _four_bit.quantize(weight, 64, "nf4", torch.uint8)
    assert not scales.isfinite().any()
