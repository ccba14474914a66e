"""The adapter utility on models that are nobody's Transformers model: what it wraps, switches, saves and merges."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_ft_adapters as adapters
from lora_ft_adapters import AdapterError, build_config
from lora_ft_adapters.targets import plain_modules, resolve_targets
from tests.conftest import tiny_llama

README = Path(__file__).resolve().parents[2] / "README.md"


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()


def test_the_example_in_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    (block,) = [b for b in blocks if "import lora_ft_adapters" in b]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(block, names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == re.search(r"count_parameters\(model\)\)\s+# (\(\d+, \d+\))", block)[1]
    fresh = names["plain"]
    assert not any("lora" in n for n, _ in fresh.named_parameters())
    assert not torch.allclose(names["base"], fresh(names["images"]), atol=1e-3)


@pytest.mark.parametrize(
    ("entries", "chosen"),
    [
        (["q_proj"], 2),
        (["*.self_attn.*"], 8),
        (["re:.*\\.(q|v)_proj"], 4),
        (["type:Linear", "layers:-1"], 7),
        (["all-linear", "layers:0"], 7),
        (["layers:0-1"], 14),
        (["q_proj", "*.gate_proj", "layers:1"], 2),
    ],
)
def test_targets_by_name_glob_regex_type_and_layer_range(entries, chosen):
    model = tiny_llama(50)
    config = build_config("lora", {"r": 2, "target_modules": entries}, "CAUSAL_LM", model)
    adapted = adapters.add_adapter(model, config)
    assert sum(n.endswith("lora_A.default.weight") for n, _ in adapters.trainable(adapted)) == chosen


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["type:Lineer"], "there are: .*Linear x15"),
        (["q_proj", "*.nothing.*"], "nothing"),
        (["q_proj", "layers:7"], "blocks 0 to 1"),
        (["lm_head", "layers:0"], "lies in"),
        (["q_proj", "layers:x"], "no range"),
        (["re:("], "no regular expression"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_names_the_nearest(entries, said):
    with pytest.raises(AdapterError, match=said):
        build_config("lora", {"target_modules": entries}, "CAUSAL_LM", tiny_llama(50))


def test_names_are_the_base_models_own_also_beside_an_adapter():
    model = tiny_llama(50)
    before = [n for n, _ in plain_modules(model)]
    adapted = adapters.add_adapter(model, build_config("lora", {"modules_to_save": ["lm_head"]}, "CAUSAL_LM", model))
    assert [n for n, _ in plain_modules(adapted)] == before
    assert resolve_targets(adapted, ["q_proj", "layers:1"]) == ["model.layers.1.self_attn.q_proj"]


def test_several_named_adapters_are_switched_alone_together_and_off():
    base, x = cnn(), torch.randn(2, 3, 8, 8)
    plain = base(x)
    one = build_config("lora", {"r": 2, "target_modules": ["0"], "init_lora_weights": False}, model=base)
    two = build_config("lora", {"r": 3, "target_modules": ["0", "4"], "init_lora_weights": False}, model=base)
    model = adapters.add_adapter(adapters.add_adapter(base, one, "one"), two, "two").eval()
    assert model.active_adapters == ["two"]
    outputs = {}
    for names in ((), ("one",), ("two",), ("one", "two")):
        with adapters.active(model, *names):
            outputs[names] = model(x)
    assert torch.equal(outputs[()], plain)
    assert len({o.sum().item() for o in outputs.values()}) == 4
    assert model.active_adapters == ["two"]
    assert [n for n, _ in adapters.trainable(model) if ".one" in n] == []
    with pytest.raises(AdapterError, match="no adapter 'three'; there are: one, two"), adapters.active(model, "three"):
        pass
    with pytest.raises(AdapterError, match="already"):
        adapters.add_adapter(model, one, "one")
    with pytest.raises(AdapterError, match="dot"):
        adapters.add_adapter(model, one, "a.b")


def test_an_adapter_goes_to_disk_and_back_under_any_name_beside_another(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    options = {"r": 2, "target_modules": ["type:Conv2d"], "init_lora_weights": False}
    model = adapters.add_adapter(cnn(), build_config("lora", options, model=cnn()), "mine").eval()
    want = model(x)
    adapters.save_adapter(model, tmp_path / "a", "mine")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "a" / "adapter_config.json").read_text()
    other = adapters.add_adapter(cnn(), build_config("lora", {"target_modules": ["4"]}, model=cnn()), "first")
    again = adapters.load_adapter(other, tmp_path / "a", "second")
    assert torch.allclose(again(x), want, atol=1e-6)
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        adapters.save_adapter(model, tmp_path / "b", "nobody")


def test_merging_gives_a_plain_model_with_the_same_outputs_or_says_why_not():
    base, x = cnn(), torch.randn(2, 3, 8, 8)
    options = {"r": 2, "target_modules": ["0", "4"], "init_lora_weights": False}
    model = adapters.add_adapter(base, build_config("lora", options, model=base)).eval()
    want = model(x)
    merged = adapters.merge(model)
    assert torch.allclose(merged(x), want, atol=1e-5)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in cnn().named_parameters()]
    bottleneck = adapters.add_adapter(cnn(), build_config("houlsby", {"target_modules": ["0"]}, model=cnn()))
    with pytest.raises(adapters.UnmergeableError, match="not linear"):
        adapters.merge(bottleneck)


def test_merging_for_a_while_gives_every_bit_back():
    base, x = cnn(), torch.randn(2, 3, 8, 8)
    options = {"r": 2, "target_modules": ["0", "4"], "init_lora_weights": False}
    weights = [p.detach().clone() for p in base.parameters()]
    model = adapters.add_adapter(base, build_config("lora", options, model=base)).eval()
    want = model(x)
    with adapters.merged(model):
        held = model.base_model.model[0].get_base_layer().weight
        assert not torch.equal(held, weights[0])
        assert torch.allclose(model(x), want, atol=1e-5)
    assert torch.equal(model(x), want)
    with adapters.active(model):
        assert torch.equal(model(x), cnn()(x))
    bottleneck = adapters.add_adapter(cnn(), build_config("houlsby", {"target_modules": ["0"]}, model=cnn()))
    with pytest.raises(adapters.UnmergeableError), adapters.merged(bottleneck):
        pass


def test_an_adapter_of_an_unknown_type_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "MAGIC"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="neither PEFT nor this version"):
        adapters.load_adapter(cnn(), tmp_path)
