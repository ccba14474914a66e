"""Take an adapter out of a model that it was merged into."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_ft import exports
from lora_ft.artifact import Artifact, Probe
from lora_ft.errors import ArtifactError
from lora_ft.exports.publish import KEPT_LIMIT, differences
from lora_ft.exports.shards import write_shards
from lora_ft.models.streaming import NotStreamable, SavedWeights, read_streamed
from lora_ft_adapters import AdapterError, UnmergeableError, load_adapter
from lora_ft_adapters.hollow import lend
from lora_ft_adapters.streaming import MergedWeights
from lora_ft_adapters.weights import Weights

from .on_base import Opened, hollow, rounded, rounding_of
from .probing import probe_inputs

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of a tensor's largest number


class _Base:
    """The base again, in Transformers' layout; of a quantised one either form that a merge goes into."""

    def __init__(self, opened: Opened, source: Path, weights: Weights, dtype: torch.dtype) -> None:
        self.opened, self.source, self.weights, self.written = opened, source, weights, dtype

    def write(self, artifact: Artifact, folder: Path) -> None:
        """The tensors, and the merged model's own config and processor."""
        write_shards(folder, self.weights, self.written)
        for path in self.source.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in path.name:
                (folder / path.name).write_bytes(path.read_bytes())

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """Tensor by tensor against the run's base, and by its answers."""
        assert self.opened.task.auto_class is not None
        limit = LIMITS.get(self.written, 2e-2)
        reference, base = hollow(self.opened)
        rounding = rounding_of(self.opened)
        forms: list[Weights] = [base, *([rounded(self.opened, base, rounding)] if rounding is not None else [])]
        _, found = hollow(self.opened, str(folder))
        worst, nearest = min(((weights_difference(form, found), form) for form in forms), key=lambda pair: pair[0])
        if not worst <= limit:
            raise ArtifactError(
                f"what comes out differs from the base by {worst:.1e} of a tensor's size (allowed {limit:.0e})",
                why="the adapter is not the one that was merged, or the merged model was trained on",
            )
        on_base = load_adapter(reference, self.opened.run.adapter)
        lend(on_base, nearest, torch.float32)
        inputs, _ = probe_inputs(self.opened, on_base, self.opened.listener)
        expected = [Probe(p.inputs, p.adapted, p.base) for p in exports.probe(on_base, inputs, artifact.outputs)]
        figures = differences(read_streamed(folder, self.opened.task.auto_class), expected, artifact.outputs)
        if not figures["update_kept"] >= KEPT_LIMIT:
            raise ArtifactError(
                "what comes out answers like the base no more than the merged model does",
                why="the adapter is not the one that was merged, or rounding hides its update",
            )
        return {**figures, "weights_difference": worst}


def weights_difference(base: Weights, found: Weights) -> float:
    """Largest difference of a tensor from the base's, relative to the tensor's largest number."""
    worst = 0.0
    for name in base:
        one, other = base[name].float(), found[name].float()
        if not one.numel():
            continue
        off = float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))
        if not off <= worst:  # NaN too
            worst = off
        if worst != worst:
            break
    return worst


def unmerge_into(opened: Opened, merged: Path, target: Path, artifact: Artifact) -> Mapping[str, Any]:
    """Write the base to `target`; see `artifacts.unmerge`."""
    try:
        model, weights = hollow(opened, str(merged))
        adapted = load_adapter(model, opened.run.adapter)
        hollow(opened)
    except NotStreamable as error:
        raise ArtifactError(f"this model cannot be read tensor by tensor: {error}", where=str(merged)) from error
    except AdapterError as error:
        raise ArtifactError(str(error), where=str(opened.run.adapter)) from error
    dtype = next(weights.dtype(n) for n in weights if weights.dtype(n).is_floating_point)
    try:
        back = MergedWeights(adapted, weights, back=True)
        form = _Base(opened, merged, SavedWeights(back, weights), dtype)
        return exports.publish(artifact, target, form, [], lambda folder, figures: None)
    except UnmergeableError:
        raise
    except AdapterError as error:
        raise UnmergeableError(f"the adapter cannot be taken out of a merged model: {error}") from error
