"""The outcome of all algebra: a plain PEFT LoRA with scaling 1, and how far it is from what was asked for."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.targets import matches

from .deltas import Delta, LayerDelta, Layout, SavedDelta, TokenDelta
from .factor import Cut, Spectrum, spectrum
from .source import PREFIX

NO_TARGET = "dummy-target-modules"  # PEFT's own name for a LoRA that consists of saved modules only


@dataclass(frozen=True)
class ModuleError:
    """How well one module is represented.

    Attributes:
        name: of the module in the base.
        rank: of the LoRA there.
        error: Frobenius norm of what was left out / norm of the change.
        norm: Frobenius norm of the change.
    """

    name: str
    rank: int
    error: float
    norm: float


@dataclass(frozen=True)
class Factors:
    """The LoRA of one module: B (out, r) and A (r, in) in float32, and the change of the bias."""

    layout: Layout
    left: Tensor
    right: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LoraResult:
    """A plain LoRA (lora_alpha = r everywhere) and its error.

    Attributes:
        modules: rank and error of each module, in the order of the model.
        factors: module name -> its LoRA.
        saved: module name -> what replaces it as a whole (modules_to_save).
        tokens: module name -> changed rows (trainable_token_indices).
    """

    modules: tuple[ModuleError, ...]
    factors: Mapping[str, Factors]
    saved: Mapping[str, SavedDelta] = field(default_factory=dict)
    tokens: Mapping[str, TokenDelta] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Relative Frobenius error over all modules together."""
        left_out = sum((m.error * m.norm) ** 2 for m in self.modules)
        whole = sum(m.norm**2 for m in self.modules)
        return float((left_out / whole) ** 0.5) if whole else 0.0

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max((m.rank for m in self.modules), default=0)

    @property
    def parameters(self) -> int:
        """Numbers in the adapter's file."""
        return sum(t.numel() for t in self.tensors().values())

    @property
    def unmergeable(self) -> list[str]:
        """Modules whose LoRA has a bias although the base layer has none: they work, but PEFT cannot merge them."""
        if not self._has_bias:
            return []
        return [n for n, f in self.factors.items() if not f.layout.has_bias]

    @property
    def _has_bias(self) -> bool:
        return any(f.bias is not None for f in self.factors.values())

    def tensors(self) -> dict[str, Tensor]:
        """The content of adapter_model.safetensors, named as PEFT names it."""
        found: dict[str, Tensor] = {}
        for name, f in self.factors.items():
            key = f"{PREFIX}{name}.lora_"
            if f.layout.kind == "embedding":
                found |= {f"{key}embedding_A": f.right, f"{key}embedding_B": f.left}
                continue
            found[f"{key}A.weight"], found[f"{key}B.weight"] = f.right, f.left
            if f.layout.kind == "conv":
                kernel = f.layout.shape[2:]
                found[f"{key}A.weight"] = f.right.reshape(-1, *f.layout.shape[1:])
                found[f"{key}B.weight"] = f.left.reshape(*f.left.shape, *[1] * len(kernel))
            if self._has_bias:
                found[f"{key}B.bias"] = torch.zeros(f.left.shape[0]) if f.bias is None else f.bias
        for name, saved in self.saved.items():
            found |= {f"{PREFIX}{name}.{n}": t for n, t in saved.copy().items()}
        for name, tokens in self.tokens.items():
            found[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = tokens.copy()
        return {n: t.detach().cpu().contiguous() for n, t in found.items()}

    def config(self, model: nn.Module, *, base_name: str = "", task_type: str | None = None) -> LoraConfig:
        """The LoraConfig that puts exactly these modules on `model`.

        Args:
            model: the base, for the names of all its modules.
            base_name: what the config says of the base; never a path of this machine.
            task_type: PEFT's name for the task, None for a plain module.

        Raises:
            AdapterError: PEFT's way of naming modules cannot single out one of them, or a bias on an embedding.
        """
        names = [n for n, _ in model.named_modules() if n]
        embeddings = [n for n, f in self.factors.items() if f.layout.kind == "embedding"]
        if self._has_bias and embeddings:
            raise AdapterError(
                f"some layers change their bias, but PEFT's lora_bias does not go with an embedding ({embeddings[0]})"
            )
        ranks = {n: f.left.shape[1] for n, f in self.factors.items()}
        r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        # Anchored and escaped: PEFT matches these keys as regular expressions against the end of a module's name.
        pattern = {f"^{re.escape(n)}": k for n, k in ranks.items() if k != r}
        return LoraConfig(
            r=r,
            lora_alpha=r,
            rank_pattern=dict(pattern),
            alpha_pattern=dict(pattern),
            target_modules=_targets(ranks, names),
            lora_bias=self._has_bias,
            fan_in_fan_out=any(f.layout.kind == "conv1d" for f in self.factors.values()),
            modules_to_save=_by_end(list(self.saved), names) or None,
            trainable_token_indices={n: list(self.tokens[n].rows) for n in _by_end(list(self.tokens), names)} or None,
            task_type=task_type,
            base_model_name_or_path=base_name,
            inference_mode=True,
        )

    def difference(self, deltas: Mapping[str, Delta]) -> float:
        """Largest relative distance of any module's change in `deltas` from this result; infinite for other modules."""
        if set(deltas) != {*self.factors, *self.saved, *self.tokens}:
            return float("inf")
        pairs = [(deltas[n], f.left.double() @ f.right.double(), f.bias) for n, f in self.factors.items()]
        found = [_distance(d.matrix(), m) for d, m, _ in pairs if isinstance(d, LayerDelta)]
        found += [_distance(d.bias, b.double()) for d, _, b in pairs if isinstance(d, LayerDelta) and b is not None]
        for name, saved in self.saved.items():
            other = deltas[name]
            copies = other.copy() if isinstance(other, SavedDelta) else {}
            found += [_distance(copies.get(n), t) for n, t in saved.copy().items()]
        for name, tokens in self.tokens.items():
            rows = deltas[name]
            found.append(_distance(rows.copy() if isinstance(rows, TokenDelta) else None, tokens.copy()))
        return max(found)

    def write(self, folder: str | Path, config: LoraConfig) -> None:
        """Write adapter_model.safetensors and adapter_config.json, as stock PEFT loads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors(), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))


def factorise(
    deltas: Iterable[tuple[str, Delta]],
    cut: Cut,
    *,
    exact: bool = False,
    decompose: Callable[[LayerDelta], Spectrum] = spectrum,
) -> LoraResult:
    """Factor each change to the rank that `cut` says; replaced modules and rows are taken as they are.

    Args:
        deltas: (module name, change), one in memory.
        cut: what is kept.
        exact: take factors as they are, without an SVD.
        decompose: the SVD, or a look-up of one that was computed before.

    Raises:
        AdapterError: nothing changes at all, or the numbers are not finite.
    """
    modules: list[ModuleError] = []
    factors: dict[str, Factors] = {}
    saved: dict[str, SavedDelta] = {}
    tokens: dict[str, TokenDelta] = {}
    for name, delta in deltas:
        if isinstance(delta, SavedDelta):
            saved[name] = delta
        elif isinstance(delta, TokenDelta):
            tokens[name] = delta
        else:
            whole = exact and delta.left is not None
            made = _factor(name, delta, None if whole else decompose(delta), cut)
            if made is not None:
                factors[name], error = made
                modules.append(error)
    if not factors and not saved and not tokens:
        raise AdapterError("the result changes nothing: every change is zero")
    return LoraResult(tuple(modules), factors, saved, tokens)


def _factor(name: str, delta: LayerDelta, found: Spectrum | None, cut: Cut) -> tuple[Factors, ModuleError] | None:
    """LoRA and error of one module; None where it does not change. Without a spectrum the factors stay as they are."""
    if found is not None:
        (left, right, lost), norm = found.truncated(cut), found.norm
    elif delta.left is not None and delta.right is not None:
        left, right, lost = delta.left, delta.right, 0.0
        # |L A|^2 = sum of (L^T L) * (A A^T), without the (out, in) product
        norm = float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
    else:
        raise ValueError("a dense change needs its spectrum")
    if not norm and delta.bias is None:
        return None
    if not left.shape[1]:  # only the bias changes; a LoRA has a rank of at least 1
        left, right = left.new_zeros(left.shape[0], 1), right.new_zeros(1, right.shape[1])
    made = Factors(delta.layout, left.float(), right.float(), None if delta.bias is None else delta.bias.float())
    return made, ModuleError(name, left.shape[1], lost / norm if norm else 0.0, norm)


def _distance(got: Tensor | None, wanted: Tensor) -> float:
    if got is None or got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _targets(wanted: Mapping[str, int], names: Sequence[str]) -> list[str] | str:
    """The shortest `target_modules` that PEFT resolves to exactly the wanted names."""
    if not wanted:
        return NO_TARGET
    for entries in (sorted({n.rsplit(".", 1)[-1] for n in wanted}), sorted(wanted)):
        if {n for n in names if any(matches(e, n) for e in entries)} == set(wanted):
            return entries
    return "|".join(re.escape(n) for n in sorted(wanted))  # a string is a regex for the whole name


def _by_end(wanted: list[str], names: Sequence[str]) -> list[str]:
    """`wanted`, refused where PEFT's rule (any name that ends so) would take further modules."""
    others = [n for n in names if n not in wanted and any(n.endswith(w) for w in wanted)]
    if others:
        raise AdapterError(
            f"PEFT cannot replace {wanted[0]} alone: it would also replace {others[0]}, whose name ends in the same way"
        )
    return wanted
