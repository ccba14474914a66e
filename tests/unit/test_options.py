"""An option that PEFT would ignore, or take for another, is an error that names it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft_adapters import AdapterError, active, add_adapter, build_config, load_adapter, save_adapter, trainable
from tests.conftest import tiny_llama


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lora", {"use_dora": "no"}, "use_dora is 'no', not bool"),
        ("lora", {"r": "8"}, "r is '8', not int"),
        ("lora", {"r": True}, "r is True"),
        ("lora", {"target_modules": 5}, "target_modules is 5, not list or str"),
        ("lora", {"target_modules": [5]}, "5 is no name"),
        ("lora", {"modules_to_save": ["lm_hed"]}, "modules_to_save: 'lm_hed' matches no module.*lm_head"),
        ("houlsby", {"modules_to_save": ["lm_hed"]}, "modules_to_save"),
        ("lora", {"exclude_modules": ["nonsense"]}, "exclude_modules"),
        ("lora", {"exclude_modules": "nonsense"}, "exclude_modules"),
        ("lora", {"rank_pattern": {"nope": 3}}, "rank_pattern: 'nope'"),
        ("lora", {"alpha_pattern": {"nope": 3}}, "alpha_pattern: 'nope'"),
        ("lora", {"target_parameters": ["nope.weight"]}, "target_parameters: 'nope.weight'"),
        ("lora", {"target_modules": ["q_proj"], "layers_to_transform": [0, 99]}, "no block 99"),
        ("eva", {"eva_config": {"rh": 1}}, "eva_config has no option 'rh'.*rho"),
        ("corda", {"corda_config": {"x": 1}}, "corda_config has no option 'x'"),
        ("pissa", {"init_lora_weights": "gaussian"}, "is init_lora_weights='pissa'"),
        ("full", {"last": 1}, "go with layers"),
        ("head", {"layers_to_transform": [1]}, "go with layers"),
        ("layers", {"last": 1, "target_modules": ["mlp"]}, "not both"),
        ("lora", {"target_modules": ["lm_head"]}, "shares its weight"),
        ("lora", {"target_modules": ["embed_tokens"]}, "shares its weight"),
    ],
)
def test_an_option_that_would_do_nothing_or_something_else_is_refused(name, options, said):
    with pytest.raises(AdapterError, match=said):
        build_config(name, options, "CAUSAL_LM", tiny_llama(50))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", {"init_lora_weights": "pissa_niter_4"}),
        ("lora", {"init_lora_weights": False, "lora_alpha": 16.0, "lora_dropout": 0}),
        ("lora", {"rank_pattern": {"q_proj": 3, "model.layers.1.mlp.up_proj": 2}, "alpha_pattern": {"k_.*": 2}}),
        ("eva", {"eva_config": {"rho": 1.0}}),
        ("lora", {"exclude_modules": ".*down_proj"}),
        ("houlsby", {"layers_to_transform": [-1]}),
        ("lora", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    ],
)
def test_options_that_are_right_are_taken(name, options):
    config = build_config(name, options, "CAUSAL_LM", tiny_llama(50))
    for option, value in options.items():
        held = getattr(config, option)
        held = {"rho": held.rho} if option == "eva_config" else sorted(held) if isinstance(held, set) else held
        assert held == value, option


def test_an_adapter_without_a_single_number_is_refused():
    config = build_config("prompt_tuning", {"num_virtual_tokens": 0}, "CAUSAL_LM", tiny_llama(50))
    with pytest.raises(AdapterError, match="nothing is trainable"):
        add_adapter(tiny_llama(50), config)


def test_what_a_method_freezes_stays_frozen_when_the_adapter_was_off():
    for name in ("lorafa", "mica", "shadow"):
        model = add_adapter(tiny_llama(50), build_config(name, {}, "CAUSAL_LM", tiny_llama(50)))
        before = [n for n, _ in trainable(model)]
        with model.disable_adapter():
            pass
        assert [n for n, _ in trainable(model)] == before, name
        with active(model):
            pass
        assert [n for n, _ in trainable(model)] == before, name


@pytest.mark.parametrize("name", ["lora", "houlsby"])
@pytest.mark.parametrize("damage", ["missing", "extra"])
def test_a_damaged_adapter_file_is_refused(name, damage, tmp_path):
    model = add_adapter(tiny_llama(50), build_config(name, {}, "CAUSAL_LM", tiny_llama(50)))
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        tensors.pop(sorted(tensors)[3])
    else:
        tensors["base_model.model.nonsense"] = torch.zeros(2)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"lacks|unknown tensor"):
        load_adapter(tiny_llama(50), tmp_path)
    beside = add_adapter(tiny_llama(50), build_config(name, {}, "CAUSAL_LM", tiny_llama(50)), "first")
    with pytest.raises(AdapterError, match=r"lacks|unknown tensor"):
        load_adapter(beside, tmp_path, "second")
