"""A Modelfile renders a conversation as the model's own template does, and holds no text that breaks out of it."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import probe, publish
from lora_ft.exports._gguf.modelfile import chat_form, modelfile, stop_texts
from lora_ft.exports._plain_lora import factors
from lora_ft.exports.formats import gguf_adapter
from lora_ft.registry import EXPORTS
from tests.tiny import CHATML, GEMMA, LLAMA3, tiny_tokenizer
from tests.tiny_artifacts import artifact_of

DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)  # fmt: skip
TALK = [("user", "hi {there}"), ("assistant", "hello"), ("user", "bye")]
SYSTEM = ("system", "be brief")


def messages(*turns):
    return [{"role": r, "content": c} for r, c in turns]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, DEFAULT], ids=["chatml", "llama3", "gemma", "default"])
@pytest.mark.parametrize("turns", [TALK, TALK[:1], [SYSTEM, *TALK]], ids=["talk", "one", "system"])
def test_the_form_of_a_template_is_what_the_model_was_trained_on(template, turns):
    tokenizer = tiny_tokenizer(template)
    if template == GEMMA and turns[0] == SYSTEM:
        turns = turns[1:]  # its template refuses a system message
    wanted = tokenizer.apply_chat_template(messages(*turns), tokenize=False, add_generation_prompt=True)
    found = chat_form(tokenizer).text(messages(*turns))
    # The program that reads the file puts the first token there itself where the tokenizer does.
    assert found in (wanted, wanted.removeprefix("<s>"))


def test_a_first_token_that_the_tokenizer_does_not_add_stays_in_the_template():
    """SmolLM2's first token is also what starts a turn."""
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.bos_token = "<|im_start|>"
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    assert chat_form(tokenizer).text(messages(*TALK)).startswith("<|im_start|>user")


def test_the_template_of_go_has_a_turn_for_each_role():
    go = chat_form(tiny_tokenizer(CHATML)).go()
    assert go.count("{{ range") == 1
    assert 'eq $m.Role "assistant"' in go
    assert ".System" in go


@pytest.mark.parametrize("stop", ['a"""\nPARAMETER seed 1', 'quote " inside', "line\nbreak"])
def test_a_stop_text_cannot_break_out_of_its_line(stop):
    try:
        text = modelfile("model.gguf", "{{ .Prompt }}", [stop])
    except UsageError:
        return
    assert not any(line.startswith("PARAMETER seed") for line in text.splitlines())


def test_the_system_text_of_the_training_rows_goes_along():
    text = modelfile("model.gguf", "{{ .Prompt }}", ["<end>"], "Answer in JSON.")
    assert 'SYSTEM "Answer in JSON."' in text.splitlines()
    assert "SYSTEM" not in modelfile("model.gguf", "{{ .Prompt }}", ["<end>"])


@pytest.mark.slow
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
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.splitlines()[0] == "FROM ./model.gguf"
    for stop in stop_texts(tokenizer, artifact.generation):
        assert stop in text
    texts = iter(["FROM ./model.gguf\n", "FROM ./other.gguf\n"])
    monkeypatch.setattr("lora_ft.exports.formats.ollama.modelfile", lambda *_: next(texts))
    with pytest.raises(ArtifactError, match="not the one of this adapter"):
        publish(artifact, tmp_path / "bad", export, probes, lambda f, g: None)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, "base", "adapter"])
def test_an_adapter_beside_its_base_answers_as_it_was_trained(tokenizer, tmp_path, monkeypatch, fault):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer)
    )
    artifact, model = artifact_of(config, tmp_path / "adapter", tokenizer, dtype="float32")
    export = EXPORTS.get("ollama-adapter")
    export.check(artifact.subject)
    probes = probe(model, [{"input_ids": [[5, 6, 7, 8]]}], artifact.outputs)
    if fault == "base":  # the merged weights, so that the adapter would count twice
        artifact = replace(artifact, unmerged=artifact.merged)
    if fault == "adapter":
        monkeypatch.setattr(gguf_adapter, "factors", lambda m: {n: (a, b * 2) for n, (a, b) in factors(m).items()})
    if fault:
        with pytest.raises(ArtifactError, match="differs from the adapter on its base"):
            publish(artifact, tmp_path / "out", export, probes, lambda f, g: None)
        return
    assert publish(artifact, tmp_path / "out", export, probes, lambda f, g: None)["max_difference"] < 1e-4
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"base.gguf", "adapter.gguf", "Modelfile"}
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
