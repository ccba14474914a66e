"""A plain Transformers model with the adapter merged into its weights; loads without us and without PEFT."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError
from lora_ft.exports._sentence import write_sentence_layout
from lora_ft.exports.mergeable import check_mergeable
from lora_ft.exports.publish import KEPT_LIMIT, differences
from lora_ft.exports.shards import write_shards
from lora_ft.registry import EXPORTS

FLOAT32_LIMIT = 1e-3  # of a logit; float32 merges differ by about 1e-5


class MergedFormat:
    """Weights W + delta W, computed in float32 and rounded once to the base's own dtype."""

    name = "merged"
    description = "A plain Transformers model (safetensors) with the adapter merged in; needs neither us nor PEFT."
    full_precision = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    targets: tuple[str, ...] = ("transformers",)

    def default_dtype(self, stored: str) -> str:
        """That of the base's own files."""
        return stored if stored in self.dtypes else "float32"

    def check(self, subject: Subject) -> None:
        """The method must be one that merges."""
        check_mergeable(subject)

    def write(self, artifact: Artifact, folder: Path) -> None:
        """Merge, round once, save with tokenizer and generation settings."""
        dtype = getattr(torch, artifact.dtype)
        write_shards(folder, artifact.merged(), dtype)
        if artifact.subject.auto_class is None:
            return
        model = artifact.subject.model
        model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.update(**artifact.generation)
            # Not save_pretrained, which refuses settings that came with the base and that its makers published.
            model.generation_config.to_json_file(str(folder / "generation_config.json"))
        artifact.processor.save_pretrained(str(folder))
        if artifact.subject.pooling:
            write_sentence_layout(folder, artifact.subject.options, int(model.config.hidden_size))

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """Read back by plain Transformers; float32 must agree to 1e-3, 16 bits must keep half of the update."""
        figures = differences(artifact.read_model(folder), probes, artifact.outputs)
        if artifact.dtype == "float32" and not figures["max_difference"] <= FLOAT32_LIMIT:
            raise ArtifactError(
                f"the merged model differs from adapter on base by {figures['max_difference']:.1e} in a logit "
                f"(allowed {FLOAT32_LIMIT:.0e})"
            )
        if not figures["update_kept"] >= KEPT_LIMIT:
            raise ArtifactError(
                f"only {figures['update_kept']:.0%} of the adapter's effect survives in {artifact.dtype}",
                why="the update is smaller than the rounding of the base's weights",
                fix="merge with --dtype float32, or serve the adapter unmerged (lora-ft export --format peft)",
            )
        return figures


EXPORTS.register(MergedFormat())
