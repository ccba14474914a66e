"""A folder for `ollama create`: the base as GGUF, the LoRA beside it, and a Modelfile that puts one on the other."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports._gguf.family import family_of
from lora_ft.exports._gguf.modelfile import chat_form
from lora_ft.exports._gguf.read import read_gguf
from lora_ft.exports._gguf.vocabulary import check_vocabulary
from lora_ft.exports._gguf.write import TYPES, write_gguf
from lora_ft.exports._plain_lora import factors, put_back
from lora_ft.exports.publish import differences
from lora_ft.registry import EXPORTS
from lora_ft_adapters import load_adapter

from .gguf import GgufFormat, held_to
from .gguf_adapter import FILE, GgufAdapterFormat, read_factors
from .ollama import MODELFILE, modelfile_of

BASE = "base.gguf"


class OllamaAdapterFormat:
    """Several adapters of one base can share its file: only adapter.gguf and Modelfile are this one's."""

    name = "ollama-adapter"
    description = "The base and the LoRA as two GGUF files with a Modelfile (FROM, ADAPTER), for ollama create."
    full_precision = True
    dtypes: tuple[str, ...] = tuple(TYPES)
    targets: tuple[str, ...] = ("ollama",)

    def default_dtype(self, stored: str) -> str:
        """Of the base; the adapter is in float32."""
        return GgufFormat().default_dtype(stored)

    def check(self, subject: Subject) -> None:
        """A model that writes text, with a template that Ollama takes, and a LoRA that llama.cpp takes."""
        if subject.task != "causal-lm":
            raise UsageError(f"ollama runs models that write text, and this is a {subject.task} adapter")
        check_vocabulary(subject.processor)
        chat_form(subject.processor)
        GgufAdapterFormat().check(replace(subject, corrects_quantisation=False))  # its base is written beside it

    def write(self, artifact: Artifact, folder: Path) -> None:
        """The template first: a text that a Modelfile cannot hold costs no more."""
        text = self._text(artifact)
        write_gguf(replace(artifact, merged=artifact.unmerged), folder / BASE)
        GgufAdapterFormat().write(replace(artifact, dtype="float32"), folder)
        (folder / MODELFILE).write_text(text, encoding="utf-8", newline="\n")

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """The matrices of the one file on the weights of the other give the adapter's outputs."""
        if (folder / MODELFILE).read_bytes().decode() != self._text(artifact):
            raise ArtifactError("the Modelfile is not the one of this adapter", where=str(folder / MODELFILE))
        config = artifact.subject.model.config.get_text_config()
        model = load_adapter(read_gguf(artifact, folder / BASE), artifact.folder)
        held = read_factors(folder / FILE, family_of(config), config, list(factors(model)))
        return held_to(artifact.dtype, differences(put_back(model, held), probes, artifact.outputs))

    def _text(self, artifact: Artifact) -> str:
        return modelfile_of(artifact, BASE, FILE)


EXPORTS.register(OllamaAdapterFormat())
