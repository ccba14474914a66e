"""Factor a change into `B @ A` of the lowest rank that keeps what is asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ft_adapters.errors import AdapterError

from .deltas import LayerDelta

# Singular values below this share of the largest are float32 noise: the factors are written in float32 (2^-24 = 6e-8).
NOISE = 1e-7
# Below this share of the operands a float64 difference is rounding (2^-53 = 1e-16, times the length of the sums).
ROUNDING = 1e-13


@dataclass(frozen=True)
class Cut:
    """How much of each change is kept.

    Attributes:
        rank: at most so many singular values; None for all above float32 noise.
        energy: the fewest singular values with this share of the sum of squares, in (0, 1].
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank {self.rank} must be at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdapterError(f"energy {self.energy} must be above 0 and at most 1")

    def keep(self, values: Tensor) -> int:
        """Number of leading singular values to keep; `values` (k,) are sorted, largest first."""
        if not values.numel() or not float(values[0]):
            return 0
        count = int((values > NOISE * values[0]).sum())
        if self.energy is not None and self.energy < 1:
            share = values.square().cumsum(0) / values.square().sum()
            count = min(count, int((share < self.energy).sum()) + 1)
        return min(count, self.rank or count)


@dataclass(frozen=True)
class Spectrum:
    """Singular value decomposition of one change: left (out, k), values (k,), right (k, in), float64."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(self.values.norm())

    def truncated(self, cut: Cut) -> tuple[Tensor, Tensor, float]:
        """(B (out, r), A (r, in), Frobenius norm of what is left out); B and A share the scale evenly."""
        kept = cut.keep(self.values)
        root = self.values[:kept].sqrt()
        return self.left[:, :kept] * root, root[:, None] * self.right[:kept], float(self.values[kept:].norm())


def spectrum(delta: LayerDelta) -> Spectrum:
    """The SVD of a change; of factors through QR of both sides and the SVD of a small matrix.

    With L = Q1 R1 and A^T = Q2 R2: L A = Q1 (R1 R2^T) Q2^T, and only the (r, r) middle is decomposed.

    Raises:
        AdapterError: the change holds NaN or infinite numbers.
    """
    parts = (delta.left, delta.right, delta.dense)
    if not all(bool(p.isfinite().all()) for p in parts if p is not None):
        raise AdapterError("the adapter holds NaN or infinite numbers", "go back to an earlier checkpoint")
    if delta.left is None or delta.right is None:
        return Spectrum(*torch.linalg.svd(delta.matrix(), full_matrices=False))
    q1, r1 = torch.linalg.qr(delta.left)
    q2, r2 = torch.linalg.qr(delta.right.T)
    u, s, v = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    s = torch.where(s > ROUNDING * r1.norm() * r2.norm(), s, 0.0)  # what is left when x - x cancels
    return Spectrum(q1 @ u, s, v @ q2.T)
