"""Several adapters into one: weighted sums, and the sparse merges of the literature, on the changes themselves.

PEFT's `add_weighted_adapter` mixes A with A and B with B, which is wrong for rsLoRA, DoRA and bias variants, and for
different scalings (peft#3761). Here every adapter is first brought to dW, so that the variant no longer matters.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lora_ft_adapters.errors import AdapterError, did_you_mean

from .deltas import Delta, LayerDelta, SavedDelta, TokenDelta
from .factor import Cut
from .result import LoraResult, factorise

Weighted = list[tuple[int, float, Tensor]]  # (which adapter, its weight, its change)
Blend = Callable[[str, Weighted], Tensor]

SUMS = ("sum", "cat", "svd")
HOWS = (*SUMS, "ties", "dare", "dare_ties", "magnitude")


def combine(
    adapters: Sequence[Mapping[str, Delta]],
    weights: Sequence[float],
    how: str = "sum",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> LoraResult:
    """One plain LoRA from the changes dW_i of several adapters, which may be of different methods, ranks and targets.

    Args:
        adapters: module name -> change, as `AdapterDeltas` computes them.
        weights: w_i, one for each.
        how: sum: sum_i w_i dW_i, exact. cat: the same with the factors side by side, rank = sum of ranks. svd: the
            sum cut to `rank`. ties, dare, dare_ties, magnitude: see `merged_deltas`.
        rank: most singular values for each module; None keeps all, so that sparse merges may have full rank.
        density: share of entries kept by ties, dare, dare_ties and magnitude.
        seed: of what dare drops.

    Raises:
        AdapterError: unknown `how`, options that do not fit it, or adapters that cannot be added.
    """
    if how == "svd" and rank is None:
        raise AdapterError("how='svd' needs a rank", "give rank, or use how='sum', which is exact")
    if how in ("sum", "cat") and rank is not None:
        raise AdapterError(f"how={how!r} is exact and takes no rank", "use how='svd' to cut the sum to a rank")
    return factorise(merged_deltas(adapters, weights, how, density=density, seed=seed), Cut(rank), exact=how == "cat")


def merged_deltas(
    adapters: Sequence[Mapping[str, Delta]], weights: Sequence[float], how: str, *, density: float = 0.5, seed: int = 0
) -> Iterator[tuple[str, Delta]]:
    """The merged change of each module before it is factored, one module in memory.

    magnitude: sum_i w_i top(dW_i), the `density` share with the largest magnitude.
    dare: sum_i w_i m_i dW_i / density with m_i ~ Bernoulli(density) (Yu et al. 2023, arXiv:2311.03099).
    ties: trim each to `density`, elect the sign of the sum of the trimmed, average w_i dW_i over the adapters that
    agree with it (Yadav et al. 2023, arXiv:2306.01708); weights of 1 give the paper's mean. dare_ties: drop as dare
    does, then elect and average. Trimming and electing are per tensor, as in PEFT.

    Raises:
        AdapterError: see `combine`.
    """
    if how not in HOWS:
        raise AdapterError(f"unknown way to combine {how!r}; {did_you_mean(how, HOWS)}")
    if len(weights) != len(adapters) or not adapters:
        raise AdapterError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if not all(torch.tensor(weights).isfinite()):
        raise AdapterError(f"weights must be finite numbers, got {list(weights)}")
    if not 0 < density <= 1:
        raise AdapterError(f"density {density} must be above 0 and at most 1")
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    blend = _blend(how, density, seed)
    for name in names:
        present = [(i, w, a[name]) for i, (w, a) in enumerate(zip(weights, adapters, strict=True)) if name in a]
        yield name, _merge(name, present, blend if how not in SUMS else None)


def _blend(how: str, density: float, seed: int) -> Blend:
    drop = partial(_dropped, density=density, seed=seed) if how.startswith("dare") else partial(_trimmed, density)
    gather = _elected if how.endswith("ties") else _summed

    def blend(name: str, changes: Weighted) -> Tensor:
        return gather([(w, drop(t, f"{_mark(t)}:{name}")) for _, w, t in changes])

    return blend


def _mark(change: Tensor) -> str:
    """What a change is, so that dare drops the same entries wherever in the list its adapter stands."""
    return hashlib.sha256(change.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _trimmed(density: float, change: Tensor, _key: str) -> Tensor:
    """The `density` share of entries with the largest magnitude; the rest are 0."""
    flat = change.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).reshape(change.shape)


def _dropped(change: Tensor, key: str, *, density: float, seed: int) -> Tensor:
    """Entries kept with probability `density` and scaled by 1 / density; the same for the same seed and key."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    kept = torch.rand(change.shape, generator=generator, dtype=torch.float64) < density
    return change * kept.to(change.device) / density


def _summed(changes: list[tuple[float, Tensor]]) -> Tensor:
    return torch.stack([w * t for w, t in changes]).sum(0)


def _elected(changes: list[tuple[float, Tensor]]) -> Tensor:
    """Mean of w_i t_i over the adapters whose entry has the sign of sum_i t_i."""
    stacked = torch.stack([t for _, t in changes])
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = stacked.sign() == sign
    weights = torch.tensor([w for w, _ in changes], dtype=stacked.dtype, device=stacked.device)
    total = (stacked * agrees * weights.reshape(-1, *[1] * (stacked.ndim - 1))).sum(0)
    return total / agrees.sum(0).clamp(min=1)


def _merge(name: str, present: list[tuple[int, float, Delta]], blend: Blend | None) -> Delta:
    kinds = {type(d) for _, _, d in present}
    if len(kinds) > 1:
        what = {LayerDelta: "adapted", SavedDelta: "replaced as a whole", TokenDelta: "changed in single rows"}
        raise AdapterError(f"{name} is " + " and ".join(sorted(what[k] for k in kinds)) + " by different adapters")
    first = present[0][2]
    if isinstance(first, LayerDelta):
        return _layers(name, [(i, w, d) for i, w, d in present if isinstance(d, LayerDelta)], blend)
    if isinstance(first, SavedDelta):
        return _saved(name, [(i, w, d) for i, w, d in present if isinstance(d, SavedDelta)], blend)
    return _tokens(name, [(i, w, d) for i, w, d in present if isinstance(d, TokenDelta)], blend)


def _layers(name: str, present: list[tuple[int, float, LayerDelta]], blend: Blend | None) -> LayerDelta:
    layout = present[0][2].layout
    if any(d.layout != layout for _, _, d in present):
        raise AdapterError(f"{name} has different shapes in the bases of these adapters")
    biases = [(i, w, d.bias) for i, w, d in present if d.bias is not None]
    bias = (blend or _plain)(f"{name}.bias", biases) if biases else None
    if blend is not None:
        return LayerDelta(layout, dense=blend(f"{name}.weight", [(i, w, d.matrix()) for i, w, d in present]), bias=bias)
    left = [w * d.left for _, w, d in present if d.left is not None]
    right = [d.right for _, _, d in present if d.right is not None]
    if len(left) == len(right) == len(present):
        return LayerDelta(layout, torch.cat(left, 1), torch.cat(right, 0), bias=bias)
    return LayerDelta(layout, dense=_plain("", [(i, w, d.matrix()) for i, w, d in present]), bias=bias)


def _plain(_name: str, changes: Weighted) -> Tensor:
    return _summed([(w, t) for _, w, t in changes])


def _saved(name: str, present: list[tuple[int, float, SavedDelta]], blend: Blend | None) -> SavedDelta:
    first = present[0][2]
    if any(
        {n: t.shape for n, t in d.base.items()} != {n: t.shape for n, t in first.base.items()} for _, _, d in present
    ):
        raise AdapterError(f"{name}: the adapters replace it with modules of different shapes")
    change = {
        n: (blend or _plain)(f"{name}.{n}", [(i, w, d.change[n]) for i, w, d in present]) for n in first.change
    }  # fmt: skip
    return replace(first, change=change)


def _tokens(name: str, present: list[tuple[int, float, TokenDelta]], blend: Blend | None) -> TokenDelta:
    """Rows that only some adapters change count as unchanged by the others."""
    ids = dict.fromkeys(t for _, _, d in present for t in d.rows)
    base = {t: next(d.rows[t][0] for _, _, d in present if t in d.rows) for t in ids}
    stacked = [
        (i, w, torch.stack([d.rows[t][1] if t in d.rows else torch.zeros_like(base[t]) for t in ids]))
        for i, w, d in present
    ]
    change = (blend or _plain)(f"{name}.tokens", stacked)
    return TokenDelta({t: (base[t], c) for t, c in zip(ids, change, strict=True)}, present[0][2].dtype)
