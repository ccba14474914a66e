"""A Modelfile renders a conversation as the model's own template does, and holds no text that breaks out of it."""

import re

import pytest
from transformers import LlamaConfig

from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import probe, publish
from lora_ft.exports._chat import turns_of
from lora_ft.exports.formats.ollama import go_template, literal, modelfile, parse, quoted
from lora_ft.registry import EXPORTS
from tests.tiny import CHATML, GEMMA, LLAMA3, REASONING, tiny_tokenizer
from tests.tiny_artifacts import artifact_of

pytestmark = pytest.mark.slow

DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)  # fmt: skip
TALK = [("user", "hi {there}"), ("assistant", "hello"), ("user", "bye")]


def rendered_by_go(template, messages):
    """The few words of Go's template language that are used here."""
    head, body, tail = re.fullmatch(
        r"\{\{ range \.Messages \}\}(.*)()\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S
    ).groups()  # fmt: skip
    del body
    parts = re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', head, re.S)
    known = dict(parts)
    out = "".join(known[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + tail
    return re.sub(r'\{\{ "(\{\{|\}\})" \}\}', r"\1", out)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, DEFAULT], ids=["chatml", "llama3", "gemma", "default"])
def test_ollama_renders_what_the_model_was_trained_on(template):
    tokenizer = tiny_tokenizer(template)
    messages = [{"role": r, "content": c} for r, c in TALK]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = parse(modelfile(tokenizer, ["<|im_end|>"]))
    if found.get("system"):
        messages = [{"role": "system", "content": found["system"]}, *messages]
    assert rendered_by_go(found["template"], messages) == wanted.removeprefix("<s>")
    assert found["stop"] == ["<|im_end|>"]
    assert found.get("system", "") == ("Be kind." if template == DEFAULT else "")


def test_a_template_that_looks_at_more_than_turns_is_refused():
    with pytest.raises(UsageError, match="cannot be said"):
        turns_of(tiny_tokenizer(REASONING))


def test_braces_of_a_template_stay_text():
    assert literal("a {{ b }} c") == 'a {{ "{{" }} b {{ "}}" }} c'
    assert "{{ range .Messages }}" in go_template(turns_of(tiny_tokenizer(CHATML)))


@pytest.mark.parametrize("text", ['a"""\nPARAMETER stop x', 'ends in "', "nul \0"])
def test_a_text_that_would_break_out_is_refused(text):
    with pytest.raises(UsageError, match="cannot hold"):
        quoted(text)


def test_the_folder_is_written_and_a_changed_modelfile_is_found(tokenizer, tmp_path, monkeypatch):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer)
    )
    artifact, model = artifact_of(config, tmp_path / "adapter", tokenizer, dtype="float32")
    export = EXPORTS.get("ollama")
    export.check(artifact.subject)
    probes = probe(model, [{"input_ids": [[5, 6, 7, 8]]}], artifact.outputs)
    assert publish(artifact, tmp_path / "out", export, probes, lambda f, g: None)["max_difference"] < 1e-4
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.gguf", "Modelfile"}
    monkeypatch.setattr("lora_ft.exports.formats.ollama.modelfile", lambda t, s: "FROM ./other.gguf\n")
    with pytest.raises(ArtifactError, match="does not say"):
        publish(artifact, tmp_path / "bad", export, probes, lambda f, g: None)
