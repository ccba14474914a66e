"""A folder for `ollama create`: the merged model as GGUF and a Modelfile with template, system text and stops."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_ft.artifact import Artifact, Probe, Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports._chat import Turns, turns_of
from lora_ft.registry import EXPORTS

MODEL, FILE = "model.gguf", "Modelfile"
PLAIN = "{{ .Prompt }}"
GO_OPEN = re.compile(r"\{\{|\}\}")


class OllamaFormat:
    """`ollama create NAME -f Modelfile` in the folder makes a model of it."""

    name = "ollama"
    description = "A Modelfile with template, system text and stops, and the merged model as GGUF beside it."
    full_precision = True
    targets: tuple[str, ...] = ("ollama",)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """As of the GGUF file."""
        return EXPORTS.get("gguf").dtypes

    def default_dtype(self, stored: str) -> str:
        """As of the GGUF file."""
        return EXPORTS.get("gguf").default_dtype(stored)

    def check(self, subject: Subject) -> None:
        """A model that writes text, of a family that GGUF knows."""
        if subject.task != "causal-lm":
            raise UsageError(f"ollama runs models that write text, and this is a {subject.task} adapter")
        EXPORTS.get("gguf").check(subject)

    def write(self, artifact: Artifact, folder: Path) -> None:
        """The model and the Modelfile."""
        text = modelfile(artifact.processor, stop_texts(artifact))
        EXPORTS.get("gguf").write(artifact, folder)
        (folder / FILE).write_text(text, encoding="utf-8")

    def verify(self, artifact: Artifact, folder: Path, probes: Sequence[Probe]) -> dict[str, float]:
        """The model as GGUF is verified; the Modelfile is read back and must say what was meant."""
        found = parse((folder / FILE).read_text(encoding="utf-8"))
        wanted: dict[str, Any] = {"from": f"./{MODEL}", "stop": stop_texts(artifact)}
        if any(found.get(k) != v for k, v in wanted.items()) or not (folder / MODEL).is_file():
            raise ArtifactError("the Modelfile does not say what was meant", where=FILE)
        return EXPORTS.get("gguf").verify(artifact, folder, probes)


def stop_texts(artifact: Artifact) -> list[str]:
    """Texts of the tokens that end an answer."""
    ids = artifact.generation.get("eos_token_id") or []
    ids = list(ids) if isinstance(ids, list | tuple) else [ids]
    ids = list(dict.fromkeys([*ids, *([artifact.processor.eos_token_id] if not ids else [])]))
    return [str(artifact.processor.convert_ids_to_tokens(i)) for i in ids if i is not None]


def modelfile(tokenizer: Any, stops: Sequence[str]) -> str:
    """The text of a Modelfile.

    Raises:
        UsageError: a text that a Modelfile cannot hold, or a template that ollama cannot say.
    """
    turns = turns_of(tokenizer) if tokenizer.chat_template else None
    lines = [f"FROM ./{MODEL}", f"TEMPLATE {quoted(go_template(turns) if turns else PLAIN)}"]
    if turns and turns.default:
        lines.append(f"SYSTEM {quoted(turns.default)}")
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def go_template(turns: Turns) -> str:
    """The turns in Go's template language."""
    parts = [
        ("user", literal(turns.user) + "{{ .Content }}"),
        ("assistant", literal(turns.answer) + "{{ .Content }}" + literal(turns.end)),
    ]
    if turns.system is not None:
        parts.append(("system", literal(turns.system[0]) + "{{ .Content }}" + literal(turns.system[1])))
    inside = "".join(
        f'{{{{ {"else " if i else ""}if eq .Role "{role}" }}}}{text}' for i, (role, text) in enumerate(parts)
    )
    return f"{{{{ range .Messages }}}}{inside}{{{{ end }}}}{{{{ end }}}}{literal(turns.answer)}"


def literal(text: str) -> str:
    """Text that Go's templates take as it is, braces included."""
    return GO_OPEN.sub(lambda found: f'{{{{ "{found[0]}" }}}}', text)


def quoted(text: str) -> str:
    """A value of a Modelfile; three quotes end it, so it may not hold them or end in one."""
    if '"""' in text or text.endswith('"') or "\0" in text:
        raise UsageError(f"a Modelfile cannot hold this text: {text[:80]!r}", fix="--format gguf")
    return f'"""{text}"""'


def parse(text: str) -> dict[str, Any]:
    """What a Modelfile says: from, template, system, and a list of stops."""
    found: dict[str, Any] = {"stop": []}
    pattern = re.compile(r'^(FROM|TEMPLATE|SYSTEM|PARAMETER stop)[ \t]+(?:"""(.*?)"""|([^\n]*))$', re.M | re.S)
    for key, long, short in pattern.findall(text):
        value = long or short
        if key == "PARAMETER stop":
            found["stop"].append(value)
        else:
            found[key.lower()] = value
    return found


EXPORTS.register(OllamaFormat())
