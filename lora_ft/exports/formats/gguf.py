"""The merged model as one GGUF file, for llama.cpp and what is built on it."""

from collections.abc import Sequence
from pathlib import Path

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports._gguf.family import family_of
from lora_ft.exports._gguf.read import read_gguf
from lora_ft.exports._gguf.vocabulary import check_vocabulary
from lora_ft.exports._gguf.write import TYPES, write_gguf
from lora_ft.exports.mergeable import check_mergeable
from lora_ft.exports.publish import differences
from lora_ft.registry import EXPORTS

FILE = "model.gguf"
# Share of the update that must be left, and of positions with the same first choice: blocks of 4 bits change a model.
LIMITS = {"float32": (0.99, 0.99), "float16": (0.5, 0.95), "bfloat16": (0.5, 0.9), "q8_0": (0.3, 0.9)}
FEW_BITS = (0.0, 0.5)


def held_to(dtype: str, figures: dict[str, float]) -> dict[str, float]:
    """The figures of what was read back, unless numbers of this dtype should be nearer.

    Raises:
        ArtifactError: they should.
    """
    kept, top1 = LIMITS.get(dtype, FEW_BITS)
    if not (figures["update_kept"] >= kept and figures["top1_agreement"] >= top1):
        raise ArtifactError(
            f"the GGUF file differs from the adapter on its base: {figures['update_kept']:.0%} of the adapter's "
            f"effect is left, the first choice agrees at {figures['top1_agreement']:.0%} of positions",
            where=dtype,
            why="numbers of few bits, or a mistake in the file",
            fix="--dtype float16, or q8_0",
        )
    return figures


class GgufFormat:
    """Weights W + delta W in llama.cpp's file format, with tokenizer, chat template and stop tokens."""

    name = "gguf"
    description = "The merged model as one GGUF file for llama.cpp; --dtype float32 to q4_0."
    full_precision = True
    dtypes: tuple[str, ...] = tuple(TYPES)
    targets: tuple[str, ...] = ("llama.cpp",)

    def default_dtype(self, stored: str) -> str:
        """That of the base's own files, float16 for float32."""
        return stored if stored in ("bfloat16", "float16") else "float16"

    def check(self, subject: Subject) -> None:
        """A family and a tokenizer that the format knows, without a task's own head, and a method that merges."""
        if subject.auto_class is None:
            raise UsageError("a model that a function builds cannot be written as GGUF", fix="--format merged")
        family = family_of(subject.model.config.get_text_config())
        if subject.auto_class not in family.auto_classes:
            raise UsageError(
                f"a {subject.task} model cannot be written as GGUF: the format has no place for its head",
                fix="--format onnx, or --format merged",
            )
        check_vocabulary(subject.processor)
        check_mergeable(subject)

    def write(self, artifact: Artifact, folder: Path) -> None:
        """One file."""
        write_gguf(artifact, folder / FILE)

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """Read back by Transformers, where it reads this family."""
        return held_to(artifact.dtype, differences(read_gguf(artifact, folder / FILE), probes, artifact.outputs))


EXPORTS.register(GgufFormat())
