"""The adapter utility: a name that matches nothing is refused, whatever else matches."""

import pytest
import torch
from torch import nn

from lora_ft_adapters import (
    AdapterError,
    Method,
    add_adapter,
    build_config,
    count_parameters,
    list_methods,
    load_adapter,
    register,
    save_adapter,
    state_of,
    trainable,
)
from lora_ft_adapters import registry as adapter_registry
from tests.conftest import tiny_llama


def test_one_of_two_targets_mistyped_is_refused_with_the_nearest_name_and_count():
    config = build_config("lora", {"target_modules": ["q_proj", "v_projj"]}, "CAUSAL_LM")
    with pytest.raises(AdapterError, match=r"'v_projj' matches no module \(nearest: v_proj x2"):
        add_adapter(tiny_llama(50), config)


@pytest.mark.parametrize("pattern", ["layers", "(", "nothing.*"])
def test_a_regex_that_matches_no_whole_name_is_refused(pattern):
    with pytest.raises(AdapterError, match="target_modules"):
        add_adapter(tiny_llama(50), build_config("lora", {"target_modules": pattern}, "CAUSAL_LM"))


def test_lora_goes_on_all_linear_layers_but_the_head_by_default():
    model = add_adapter(tiny_llama(50), build_config("lora", {}, "CAUSAL_LM"))
    names = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, _ in trainable(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.lora_alpha["default"]) == (16, 32)


def test_a_fresh_adapter_is_a_no_op_and_only_it_trains():
    base = tiny_llama(50)
    ids = torch.arange(10)[None]
    before = base(ids).logits
    model = add_adapter(base, build_config("lora", {"r": 2}, "CAUSAL_LM"))
    assert torch.equal(model(ids).logits, before)
    assert all("lora_" in n for n, _ in trainable(model))
    train, total = count_parameters(model)
    assert train == sum(p.numel() for _, p in trainable(model))
    assert total == sum(p.numel() for p in model.parameters())


def test_a_plain_module_without_a_config_can_be_adapted():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    adapted = add_adapter(model, build_config("lora", {"r": 2, "target_modules": ["0"]}))
    assert [n for n, _ in trainable(adapted)] == [
        "base_model.model.0.lora_A.default.weight",
        "base_model.model.0.lora_B.default.weight",
    ]


def test_an_unknown_method_or_option_names_the_nearest():
    with pytest.raises(AdapterError, match="'lora'"):
        build_config("lorra", {})
    with pytest.raises(AdapterError, match="lora_alpha"):
        build_config("lora", {"alpha_lora": 3})
    with pytest.raises(AdapterError, match="target_parameters is"):
        build_config("lora", {"target_parameters": "one string"})


def test_peft_methods_are_listed_with_a_sentence_each():
    found = list_methods()
    assert {"lora", "ia3", "vera", "loha", "prefix_tuning"} <= set(found)
    assert all(m.description and "\n" not in m.description for m in found.values())


def test_a_method_registered_twice_raises(monkeypatch):
    monkeypatch.setattr(adapter_registry, "_OWN", {})
    method = Method("mine", "A method.", list_methods()["lora"].config_class)
    register(method)
    with pytest.raises(ValueError, match="twice"):
        register(method)
    with pytest.raises(ValueError, match="lower case"):
        register(Method("Mine", "A method.", method.config_class))


def test_an_adapter_that_would_train_nothing_is_refused():
    config = build_config("lora", {"r": 2}, "CAUSAL_LM")
    config.inference_mode = True
    with pytest.raises(AdapterError, match="nothing is trainable"):
        add_adapter(tiny_llama(50), config)


def test_a_layer_that_adalora_pruned_whole_is_saved_and_loaded_without_talk_of_a_torn_run(tmp_path):
    base = tiny_llama(50)
    model = add_adapter(base, build_config("adalora", {"total_step": 10, "tinit": 1, "tfinal": 2}, "CAUSAL_LM", base))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    config = model.peft_config["default"]
    config.rank_pattern = {
        f"{n}.lora_E": [n.find("layers.0.self_attn.q_proj") < 0] * m.r["default"]
        for n, m in model.base_model.model.named_modules()
        if hasattr(m, "lora_E")
    }
    for part in (layer.lora_A, layer.lora_E):
        part["default"] = torch.nn.Parameter(part["default"][:0])
    layer.lora_B["default"] = torch.nn.Parameter(layer.lora_B["default"][:, :0])
    assert any(not t.numel() for t in state_of(model).values())
    save_adapter(model, tmp_path / "adapter", base="tiny")
    again = load_adapter(tiny_llama(50), tmp_path / "adapter")
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)
