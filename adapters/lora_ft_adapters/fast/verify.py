"""Is a fast path exact? Loss and every adapter gradient against the plain path, on the same batch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_ft_adapters.errors import AdapterError

# Relative error that float rounding explains. float32: sums of ~1e6 terms in another order; bfloat16: 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 2e-2


@dataclass(frozen=True)
class Verdict:
    """Whether the fast path may be used, the reason if not, and the relative errors measured.

    Attributes:
        unreached: positions of the parameters to which the plain path sends no gradient at all.
    """

    exact: bool
    reason: str
    loss_error: float = float("nan")
    gradient_error: float = float("nan")
    unreached: tuple[int, ...] = ()


def verify(
    fast: Callable[[], Tensor], plain: Callable[[], Tensor], parameters: Iterable[nn.Parameter], dtype: torch.dtype
) -> Verdict:
    """Compare two functions that return a scalar loss, and their gradients of `parameters`.

    Parameters that are all zero get small seeded noise for the comparison, and their zeros back after it: behind a
    LoRA B of zeros, the gradient of A would be zero whatever the path does. Both sides see the same random state,
    so dropout draws the same masks. Gradients are left as None.

    Args:
        fast: the path in question.
        plain: the reference.
        parameters: those that train.
        dtype: of the base model; chooses the tolerance.
    """
    params = list(parameters)
    limit = TOLERANCE.get(dtype, COARSE)
    with _non_zero(params):
        reference, wanted, unreached = _loss_and_gradients(plain, params)
        try:
            loss, got, _ = _loss_and_gradients(fast, params)
        except (AdapterError, RuntimeError, TypeError, AttributeError, KeyError) as error:
            return Verdict(False, str(error).splitlines()[0], unreached=unreached)
    loss_error = abs(loss - reference) / max(abs(reference), 1e-12)
    gradient_error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    exact = loss_error <= limit and gradient_error <= limit
    reason = "" if exact else (
        f"loss differs by {loss_error:.1e} and gradient by {gradient_error:.1e} (allowed {limit:.0e})"
    )  # fmt: skip
    return Verdict(exact, reason, loss_error, gradient_error, unreached)


def _loss_and_gradients(
    loss: Callable[[], Tensor], params: list[nn.Parameter]
) -> tuple[float, Tensor, tuple[int, ...]]:
    devices = [p.device for p in params[:1] if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        value = loss()
        grads = torch.autograd.grad(value, params, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    unreached = tuple(i for i, g in enumerate(grads) if g is None)
    return float(value.detach()), torch.cat([g.detach().float().flatten() for g in flat]), unreached


@contextmanager
def _non_zero(params: list[nn.Parameter]) -> Iterator[None]:
    zeros = [p for p in params if not bool(p.detach().any())]
    generator = torch.Generator().manual_seed(0)
    for p in zeros:
        noise = torch.randn(p.shape, generator=generator) * 0.02
        p.data.copy_(noise)
    try:
        yield
    finally:
        for p in zeros:
            p.data.zero_()
