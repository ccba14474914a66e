"""A folder for `ollama create`: the merged model as GGUF, and a Modelfile with chat template and stops."""

from collections.abc import Sequence
from pathlib import Path

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports._gguf.modelfile import RAW, chat_form, modelfile, stop_texts
from lora_ft.registry import EXPORTS

from .gguf import FILE, GgufFormat

MODELFILE = "Modelfile"
DATE = "strftime_now"  # by which templates ask for today's date


class OllamaFormat(GgufFormat):
    """The GGUF file, and what Ollama does not take from it."""

    name = "ollama"
    description = "The merged model as GGUF with a Modelfile, for ollama create; --dtype float32 to q4_0."
    targets: tuple[str, ...] = ("ollama",)

    def check(self, subject: Subject) -> None:
        """A model that writes text, of a family that GGUF knows, with a chat template that Go's can say."""
        if subject.task != "causal-lm":
            raise UsageError(f"ollama runs models that write text, and this is a {subject.task} adapter")
        super().check(subject)
        chat_form(subject.processor)

    def write(self, artifact: Artifact, folder: Path) -> None:
        """The template first: a text that a Modelfile cannot hold costs no merge."""
        text = modelfile_of(artifact)
        super().write(artifact, folder)
        (folder / MODELFILE).write_text(text, encoding="utf-8", newline="\n")

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """The weights as in GGUF; the Modelfile by its text."""
        if (folder / MODELFILE).read_bytes().decode() != modelfile_of(artifact):
            raise ArtifactError("the Modelfile is not the one of this adapter", where=str(folder / MODELFILE))
        return super().verify(artifact, folder, probes)


def modelfile_of(artifact: Artifact, weights: str = FILE, adapter: str = "") -> str:
    """The text of the Modelfile for these files."""
    form = chat_form(artifact.processor)
    stops = stop_texts(artifact.processor, artifact.generation)
    note = "# A date in the template is that of this export.\n" if DATE in str(artifact.processor.chat_template) else ""
    return note + modelfile(weights, form.go() if form else RAW, stops, artifact.system, adapter)


EXPORTS.register(OllamaFormat())
