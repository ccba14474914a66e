"""bitsandbytes' 4-bit quantisation on a CPU, to the last bit, in an eighth of the time and little memory.

bitsandbytes 0.50 searches the 16 values by bisection over whole tensors. Here a number's cell on a fine grid says
between which two it lies, but for one comparison, and a piece of the tensor is in memory at a time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

CELLS = 1024  # to each side of zero: no two limits of NF4 or FP4 share a cell
PIECE = 2**18  # numbers
SMALLEST = 1e-38  # bitsandbytes' own: a block of zeros has a scale all the same


@cache
def faster() -> bool:
    """Give torch this way for CPUs, for the life of the process; False where bitsandbytes has one, or they differ."""
    import bitsandbytes  # noqa: F401 - registers its own

    operator = "bitsandbytes::quantize_4bit"
    if torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU"):
        return False
    if not all(_same(kind, dtype) for kind in ("nf4", "fp4") for dtype in (torch.float32, torch.bfloat16)):
        return False
    _library().impl("quantize_4bit", quantize, "CPU")  # type: ignore[no-untyped-call]
    return True


@cache
def _library() -> torch.library.Library:
    """Kept: what it registers goes with it."""
    return torch.library.Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]


def _same(kind: str, dtype: torch.dtype, plain: Callable[..., Any] | None = None) -> bool:
    """Whether numbers that are hard to get right come out as those of bitsandbytes, or of `plain`."""
    plain = plain or torch.ops.bitsandbytes.quantize_4bit
    generator = torch.Generator().manual_seed(0)
    limits = _bounds(kind)[0]
    near = torch.cat([limits, limits.nextafter(limits + 1), limits.nextafter(limits - 1), torch.tensor([1.0, -1.0])])
    blocks = [torch.randn(4 * PIECE // 64, generator=generator) * 0.02, torch.zeros(64), torch.full((64,), 1e-42)]
    blocks += [torch.nn.functional.pad(near, (0, 64 - near.numel())), torch.randn(64, generator=generator) * 1e30]
    for tail in (0, 13):
        hard = torch.cat([*blocks, torch.randn(tail, generator=generator)]).to(dtype)
        wanted = plain(hard, 64, kind, torch.uint8)
        if not all(torch.equal(a, b) for a, b in zip(wanted, quantize(hard, 64, kind, torch.uint8), strict=True)):
            return False
    return True


def quantize(weight: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """(two numbers to a byte, (bytes, 1); the largest size in each block of `blocksize` numbers, float32).

    Same arguments and results as torch.ops.bitsandbytes.quantize_4bit.
    """
    flat = weight.reshape(-1)
    count = flat.numel()
    whole = count - count % blocksize
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32)
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    for start in range(0, whole, PIECE):
        rows = flat[start : min(start + PIECE, whole)].reshape(-1, blocksize).float()
        top = rows.abs().amax(-1)
        absmax[start // blocksize :][: top.numel()] = top
        scaled = (rows * (1.0 / top.clamp(min=SMALLEST)).view(-1, 1)).clamp_(-1, 1)
        packed[start // 2 :][: rows.numel() // 2] = _pairs(_codes(scaled.view(-1), quant_type))
    if whole < count:
        rest = flat[whole:].float()
        absmax[-1] = rest.abs().max().clamp(min=SMALLEST)
        scaled = torch.clamp(torch.nn.functional.pad(rest / absmax[-1], (0, count % 2)), -1, 1)
        packed[whole // 2 :] = _pairs(_codes(scaled, quant_type))
    return packed.view(quant_storage).unsqueeze(1), absmax


def _pairs(codes: Tensor) -> Tensor:
    return (codes[::2] << 4).bitwise_or_(codes[1::2])


def _codes(scaled: Tensor, kind: str) -> Tensor:
    """The nearest value's number of each number in [-1, 1]."""
    limits, codes = _tables(kind)
    at = _cell(scaled)
    over = scaled > limits.index_select(0, at)
    return codes.index_select(0, at.mul_(2).add_(over))


def _cell(scaled: Tensor) -> Tensor:
    return scaled.add(1.0).mul_(CELLS).to(torch.int32).clamp_(0, 2 * CELLS)  # NaN has a cell too


@cache
def _tables(kind: str) -> tuple[Tensor, Tensor]:
    """Of each cell the limit that lies in it, and the numbers of the values below and above that."""
    bounds, order = _bounds(kind)
    at = _cell(bounds).long()
    if len(set(at.tolist())) != at.numel():
        raise ValueError(f"two limits of {kind} in one cell")
    limits = torch.full((2 * CELLS + 1,), float("inf"))
    limits[at] = bounds
    below = (at[None] < torch.arange(2 * CELLS + 1)[:, None]).sum(1)
    both = torch.stack([below, below + 1], 1).clamp(max=bounds.numel()).flatten()
    return limits, order[both].to(torch.uint8)


def _bounds(kind: str) -> tuple[Tensor, Tensor]:
    """Middles between neighbouring values, ascending, and the values' numbers in that order."""
    from bitsandbytes.functional import get_4bit_type

    code: Any = get_4bit_type(kind, device="cpu")  # type: ignore[no-untyped-call]
    order = torch.argsort(code)
    return (code[order[:-1]] + code[order[1:]]) / 2, order
