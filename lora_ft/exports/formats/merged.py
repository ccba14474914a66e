"""A plain Transformers model with the adapter merged into its weights; loads without us and without PEFT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports.publish import differences
from lora_ft.records import Artifact, Probe
from lora_ft.registry import EXPORTS
from lora_ft_adapters import AdapterError, UnmergeableError, merge

WEIGHTS = "model.safetensors"  # of a model that a function builds
FLOAT32_LIMIT = 1e-3  # of a logit; float32 merges differ by about 1e-5
KEPT_LIMIT = 0.5  # share of the update that must survive rounding to a 16-bit dtype


class MergedFormat:
    """Weights W + delta W, computed in float32 and rounded once to the base's own dtype."""

    name = "merged"
    description = "A plain Transformers model (safetensors) with the adapter merged in; needs neither us nor PEFT."
    full_precision = True

    def write(self, artifact: Artifact, folder: Path) -> None:
        """Merge, round once, save with tokenizer and generation settings."""
        try:
            model: Any = merge(artifact.model)
        except UnmergeableError as error:
            raise UsageError(str(error), fix="lora-ft export --format peft") from error
        except AdapterError as error:
            raise ArtifactError(str(error)) from error
        model = model.to(getattr(torch, artifact.stored_dtype))
        if artifact.auto_class is None:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
            return
        model.config.dtype = getattr(torch, artifact.stored_dtype)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.update(**artifact.generation)
        model.save_pretrained(str(folder))
        artifact.processor.save_pretrained(str(folder))

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """Read back by plain Transformers; float32 must agree to 1e-3, 16 bits must keep half of the update."""
        model = _read(artifact, folder)
        figures = differences(model, probes, artifact.outputs)
        exact = artifact.stored_dtype == "float32"
        if exact and figures["max_difference"] > FLOAT32_LIMIT:
            raise ArtifactError(
                f"the merged model differs from adapter on base by {figures['max_difference']:.1e} in a logit "
                f"(allowed {FLOAT32_LIMIT:.0e})"
            )
        if figures["update_kept"] < KEPT_LIMIT:
            raise ArtifactError(
                f"only {figures['update_kept']:.0%} of the adapter's effect survives in {artifact.stored_dtype}",
                why="the update is smaller than the rounding of the base's weights",
                fix="merge with --dtype float32, or serve the adapter unmerged (lora-ft export --format peft)",
            )
        return figures


def _read(artifact: Artifact, folder: Path) -> Any:
    """The model from its files; what a function builds gets their tensors, all of them and no other."""
    if artifact.auto_class is not None:
        return getattr(transformers, artifact.auto_class).from_pretrained(str(folder), use_safetensors=True).eval()
    model = artifact.load_base().to(getattr(torch, artifact.stored_dtype))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()


EXPORTS.register(MergedFormat())
