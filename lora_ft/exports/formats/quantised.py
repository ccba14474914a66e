"""The merged model in the base's own 4 or 8 bits, as plain Transformers and bitsandbytes load it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports._plain_lora import CONVERT, check_plain_lora
from lora_ft.exports.publish import KEPT_LIMIT, differences
from lora_ft.registry import EXPORTS
from lora_ft_adapters import AdapterError
from lora_ft_adapters.fast.merge_aware import MergeAware, merged_weight, requantised


class QuantisedFormat:
    """Q(W' + delta W), W' being what the quantised base multiplies with; exact for runs with merge_aware."""

    name = "quantised"
    description = "The merged model in the base's own 4 or 8 bits (bitsandbytes); train with merge_aware: true for it."
    full_precision = False
    dtypes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("bitsandbytes",)

    def default_dtype(self, stored: str) -> str:
        """There is no choice."""
        return ""

    def check(self, subject: Subject) -> None:
        """A plain LoRA."""
        if subject.auto_class is None:
            raise UsageError("a model that a function builds is not quantised", fix="--format merged")
        check_plain_lora(subject, "a quantised model")

    def write(self, artifact: Artifact, folder: Path) -> None:
        """Each adapted layer merged and quantised again; the rest as it is."""
        model = artifact.load_adapted()
        try:
            layers = MergeAware(model).layers
        except AdapterError as error:
            raise UsageError(str(error), fix="quant: nf4 in the recipe; or --format merged") from error
        bare: Any = model.get_base_model()
        for path, layer in layers.items():
            base = layer.get_base_layer()
            plain = requantised(base, merged_weight(layer).to(_dtype(base)))
            bare.set_submodule(path.removeprefix("base_model.model."), plain)
        rest = [n for n, m in bare.named_modules() if hasattr(m, "lora_A")]
        if rest:
            raise UsageError(f"{rest[0]} has a LoRA and is not quantised", fix=CONVERT)
        if getattr(bare, "generation_config", None) is not None:
            bare.generation_config.update(**artifact.generation)
        vars(bare).pop("_weight_conversions", None)  # how its files were read, which has no way back for 4 bits
        bare.save_pretrained(folder)
        artifact.processor.save_pretrained(str(folder))

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """Read back by plain Transformers and bitsandbytes, against what was trained."""
        kind = getattr(transformers, str(artifact.subject.auto_class))
        model = kind.from_pretrained(str(folder)).eval()  # goes to the GPU by itself, where there is one
        for module in model.modules():  # repacked weights differ in the last bits
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        figures = differences(model, probes, artifact.outputs)
        if not figures["update_kept"] >= KEPT_LIMIT:
            raise ArtifactError(
                f"only {figures['update_kept']:.0%} of the adapter's effect is left in the quantised weights",
                why="the update is smaller than the steps of so few bits",
                fix="train with quant: {type: nf4, merge_aware: true}, or --format merged",
            )
        return figures


def _dtype(base: Any) -> torch.dtype:
    state = getattr(base.weight, "quant_state", None)
    return state.dtype if state is not None else torch.float16


EXPORTS.register(QuantisedFormat())
