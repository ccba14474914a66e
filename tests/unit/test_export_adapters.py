"""A LoRA in another program's layout is the same LoRA; what the program has no place for is refused with a way out."""

import json

import pytest
from transformers import GPT2Config, LlamaConfig

from lora_ft.artifact import Subject
from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import probe, publish
from lora_ft.exports.formats.vllm import problem_of
from lora_ft.models.opening import BaseSpec
from lora_ft.models.resolve import resolve
from lora_ft.registry import EXPORTS
from lora_ft_adapters import build_config
from tests.tiny_artifacts import artifact_of

FORMATS = ["gguf-adapter", "vllm", "mlx"]
RANDOM = {"init_lora_weights": False}
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
}


@pytest.fixture
def config(tokenizer):
    return LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer),
    )  # fmt: skip


def published(config, tokenizer, tmp_path, name, options, method="lora"):
    artifact, model = artifact_of(config, tmp_path / "adapter", tokenizer, method=method, options=options)
    export = EXPORTS.get(name)
    export.check(artifact.subject)
    artifact = type(artifact)(**{**vars(artifact), "dtype": export.default_dtype("float32")})
    probes = probe(model, [{"input_ids": [[5, 6, 7, 8, 60, 61]]}], artifact.outputs)
    return publish(artifact, tmp_path / "out", export, probes, lambda folder, figures: None)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_was_written_is_the_adapter(name, kind, config, tokenizer, tmp_path):
    figures = published(config, tokenizer, tmp_path, name, ADAPTERS[kind] | RANDOM)
    assert figures["max_difference"] < 1e-4
    assert figures["update_kept"] > 0.9999


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "case",
    [
        ("dora", {"r": 4}, "use_dora"),
        ("vera", {}, "reads LoRA alone"),
        ("houlsby", {}, "reads LoRA alone"),
        ("lora", {"r": 4, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("lora", {"r": 4, "trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ("lora", {"r": 4, "target_modules": ["embed_tokens"]}, "linear layers alone"),
    ],
)
def test_what_has_no_place_is_refused_with_a_way_out(name, case, config, tokenizer, tmp_path):
    method, options, said = case
    with pytest.raises(UsageError, match=said) as caught:
        published(config, tokenizer, tmp_path, name, options, method)
    assert caught.value.fix
    if method == "houlsby":  # neither converts nor merges
        assert "--format peft" in caught.value.fix


def test_prompts_in_the_attentions_are_refused_for_what_they_are(config, tokenizer, tmp_path):
    """PEFT saves target_modules of LLaMA-Adapter as a name, where every other method's string is a regex."""
    with pytest.raises(UsageError, match="it adds inputs, not weights") as caught:
        published(config, tokenizer, tmp_path, "merged", {}, "adaption_prompt")
    assert "--format peft" in caught.value.fix


def test_vllm_refuses_what_its_rules_refuse(config, tokenizer, tmp_path):
    with pytest.raises(UsageError, match="lm_head"):
        published(config, tokenizer, tmp_path, "vllm", {"r": 4, "target_modules": ["q_proj", "lm_head"]} | RANDOM)
    with pytest.raises(UsageError, match="ranks up to 512"):
        published(config, tokenizer, tmp_path, "vllm", {"r": 600} | RANDOM)
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=len(tokenizer))
    with pytest.raises(UsageError, match="Conv1D"):
        published(gpt2, tokenizer, tmp_path, "vllm", {"r": 4, "target_modules": ["c_attn"]} | RANDOM)


def test_vllms_rules_are_checked_on_the_files(config, tokenizer, tmp_path):
    published(config, tokenizer, tmp_path, "vllm", ADAPTERS["patterns"] | RANDOM)
    folder = tmp_path / "out"
    assert problem_of(folder) == ""
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 4
    for key, value, said in (
        ("r", 8, "shape"),
        ("target_modules", ["q_proj"], "is not in"),
        ("use_dora", True, "DoRA"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, key: value}))
        assert said in problem_of(folder)


def test_mlx_takes_the_last_blocks_alone(config, tokenizer, tmp_path):
    last = {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    published(config, tokenizer, tmp_path, "mlx", last | RANDOM)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["num_layers"] == 1
    assert settings["lora_parameters"]["keys"] == ["self_attn.q_proj"]
    with pytest.raises(UsageError, match="last blocks"):
        published(config, tokenizer, tmp_path / "b", "mlx", last | {"layers_to_transform": [0]} | RANDOM)


def test_conv1d_layers_of_gpt2_go_to_llama_cpp(tokenizer, tmp_path):
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=len(tokenizer), n_positions=64)
    options = {"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True} | RANDOM
    assert published(gpt2, tokenizer, tmp_path, "gguf-adapter", options)["update_kept"] > 0.9999


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_that_is_lost_is_found(name, config, tokenizer, tmp_path, monkeypatch):
    import lora_ft.exports._plain_lora as shared

    module = __import__(f"lora_ft.exports.formats.{name.replace('-', '_')}", fromlist=["factors"])
    plain = shared.factors

    def halved(model, adapter="default"):
        found = plain(model, adapter)
        first = next(iter(found))
        return {**found, first: (found[first][0], found[first][1] * 0.5)}

    monkeypatch.setattr(module, "factors", halved)
    with pytest.raises(ArtifactError, match="differs"):
        published(config, tokenizer, tmp_path, name, ADAPTERS["plain"] | RANDOM)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("targets", "fits"), [("all-linear", False), (["*language_model*q_proj"], True)])
def test_vllm_takes_no_lora_on_the_part_that_sees(targets, fits):
    """It leaves such layers out with a warning in its log, so the served model is another one."""
    model = BaseSpec(resolve("builtin:tiny-vlm", print), "AutoModelForImageTextToText").skeleton()
    config = build_config("lora", {"target_modules": targets}, "CAUSAL_LM", model)
    subject = Subject("image-text-to-text", "AutoModelForImageTextToText", "lora", config, model)
    if fits:
        EXPORTS.get("vllm").check(subject)
        return
    with pytest.raises(UsageError, match="language model alone") as caught:
        EXPORTS.get("vllm").check(subject)
    assert "language_model" in caught.value.fix
