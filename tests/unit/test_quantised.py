"""What a quantised base multiplies with is known bit for bit; a base that is quantised already is taken as it is."""

import json

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import lora_ft
from lora_ft.cache import cache_dir
from lora_ft.errors import UsageError
from lora_ft.models.opening import BaseSpec
from lora_ft.models.quantised import check_stored, stored_kind
from lora_ft.recipe import load_recipe
from lora_ft.registry import QUANTIZERS

BNB = ["nf4", "fp4", "int8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path / "llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantised(folder, name, dtype=torch.float32, **options):
    quantizer = QUANTIZERS.get(name).configure(options)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"}, **quantizer.load_arguments(dtype)
    )
    return quantizer, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"), [*((n, {}) for n in BNB), ("nf4", {"bnb_4bit_use_double_quant": False})]
)  # fmt: skip
def test_a_round_trip_is_what_the_loaded_layer_multiplies_with(name, options, dtype, llama):
    quantizer, model = quantised(llama, name, dtype, **options)
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    layers = quantizer.quantises(BaseSpec(str(llama), "AutoModelForCausalLM").skeleton())
    replaced = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert layers == replaced
    assert "lm_head" not in layers
    assert len(layers) == 14
    for name_ in layers:
        found = quantizer.round_trip(plain.get_submodule(name_).weight, dtype)
        assert torch.equal(found, dequantize_module_weight(model.get_submodule(name_)).float())
    assert not torch.equal(found, plain.get_submodule(name_).weight)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("nf4", ("nf4", {})),
        ({"type": "nf4", "bnb_4bit_use_double_quant": False}, ("nf4", {"bnb_4bit_use_double_quant": False})),
        ("torchao:int8_weight_only", ("torchao", {"config": "int8_weight_only"})),
    ],
)
def test_a_recipe_says_how_the_base_is_stored(given, parsed):
    section = load_recipe([{"model": "m", "data": {"train": "t"}, "quant": given}]).recipe.quant
    assert (section.type, section.options()) == parsed


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nf4", {"double_quant": True}, "nf4 has no option 'double_quant'"),
        ("fp4", {"bnb_4bit_compute_dtype": "float8"}, "bnb_4bit_compute_dtype"),
        ("int8", {"bnb_4bit_use_double_quant": True}, "int8 has no option"),
        ("none", {"merge_aware": True}, "none has no option 'merge_aware'; it has none"),
    ],
)
def test_a_wrong_option_of_a_quantiser_is_named(name, options, said):
    with pytest.raises(UsageError, match=said):
        QUANTIZERS.get(name).configure(options)


def test_a_format_that_does_not_train_is_refused():
    with pytest.raises(UsageError, match="no config 'int8_dynamic'"):
        QUANTIZERS.get("torchao").configure({"config": "int8_dynamic"}).load_arguments(torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_is_quantised_already_trains_loads_and_merges(bits, llama, recipe, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    folder = tmp_path / "small"
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder)
    for path in llama.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert stored_kind(str(folder)) == "bitsandbytes"
    recipe = {**recipe, "model": str(folder)}
    recipe["train"] = recipe["train"] | {"steps": 8, "learning_rate": 1e-2}
    run = lora_ft.train(recipe, out=tmp_path / "run")
    assert run.facts["quant"] == "bitsandbytes"
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"] - 0.2
    assert lora_ft.export(run, tmp_path / "adapter", format_name="peft")["max_difference"] <= 1e-2
    figures = lora_ft.merge(run, tmp_path / "merged", dtype="float32")
    assert figures["max_difference"] <= 1e-3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    with pytest.raises(UsageError, match="quantised already"):
        lora_ft.train({**recipe, "quant": "nf4"}, out=tmp_path / "again")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq.*(needs|cannot be used)"),
        ({"quant_method": "awq", "bits": 4}, "awq.*(needs|cannot be used)"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "nonsense"}, "nonsense"),
    ],
)
def test_a_kind_whose_package_is_missing_is_named_before_any_weight_is_read(settings, said, llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    (llama / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(UsageError, match=said):
        check_stored(str(llama), "none")


def test_a_quantised_base_comes_from_the_cache_the_second_time_and_a_damaged_one_is_made_again(llama, recipe, tmp_path):
    recipe = {**recipe, "model": str(llama), "quant": "nf4"}
    recipe["train"] = recipe["train"] | {"steps": 2}
    first = lora_ft.train(recipe, out=tmp_path / "a")
    (entry,) = [p for p in (cache_dir() / "quantised").iterdir() if p.is_dir()]
    held = (entry / "model.safetensors").read_bytes()
    assert len(held) < (llama / "model.safetensors").stat().st_size / 2
    second = lora_ft.train(recipe, out=tmp_path / "b")
    assert second.facts["fingerprint"] == first.facts["fingerprint"]
    assert second.metrics == first.metrics
    (entry / "model.safetensors").write_bytes(held[: len(held) // 2])
    third = lora_ft.train(recipe, out=tmp_path / "c")
    assert third.metrics == first.metrics
    assert (entry / "model.safetensors").read_bytes() == held
