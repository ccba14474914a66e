"""One adapter in the place of another: the same answers as when it is loaded alone, or nothing changes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft_adapters import AdapterError, AdapterSlot, add_adapter, build_config, load_adapter, save_adapter
from scripts.survey_methods import llama as tiny_llama

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def saved(folder, seed, **options):
    base = tiny_llama()
    torch.manual_seed(seed)
    config = build_config("lora", {"r": 4, "init_lora_weights": False, **options}, "CAUSAL_LM", base)
    save_adapter(add_adapter(base, config), folder)
    return folder


@torch.no_grad()
def answer(model):
    return model(input_ids=IDS).logits


def test_adapters_that_take_turns_answer_as_if_each_were_loaded_alone(tmp_path):
    one, two = saved(tmp_path / "one", 1), saved(tmp_path / "two", 2)
    model = load_adapter(tiny_llama(), one)
    slot = AdapterSlot(model)
    first = answer(model)
    for folder in (two, one, two):
        slot.put(folder)
        assert torch.equal(answer(model), answer(load_adapter(tiny_llama(), folder)))
    assert not torch.equal(answer(model), first)


def test_only_the_named_adapter_changes(tmp_path):
    one, two = saved(tmp_path / "one", 1), saved(tmp_path / "two", 2)
    model = load_adapter(load_adapter(tiny_llama(), one), one, "other")
    AdapterSlot(model, "other").put(two)
    model.set_adapter("default")
    assert torch.equal(answer(model), answer(load_adapter(tiny_llama(), one)))


@pytest.mark.parametrize(
    ("options", "says"), [({"r": 8}, "another r "), ({"lora_alpha": 3}, "lora_alpha"), ({"use_rslora": True}, "rslora")]
)
def test_an_adapter_of_another_form_is_refused_and_nothing_changes(tmp_path, options, says):
    model = load_adapter(tiny_llama(), saved(tmp_path / "one", 1))
    before = answer(model)
    with pytest.raises(AdapterError, match=says):
        AdapterSlot(model).put(saved(tmp_path / "two", 2, **options))
    assert torch.equal(answer(model), before)


def test_a_file_that_lacks_a_tensor_or_has_another_shape_is_refused_and_nothing_changes(tmp_path):
    model = load_adapter(tiny_llama(), saved(tmp_path / "one", 1))
    slot, before = AdapterSlot(model), answer(model)
    path = saved(tmp_path / "two", 2) / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(AdapterError, match="lacks"):
        slot.put(path.parent)
    save_file({**tensors, name: tensors[name][:1]}, path)
    with pytest.raises(AdapterError, match="shape"):
        slot.put(path.parent)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="cut off"):
        slot.put(path.parent)
    assert torch.equal(answer(model), before)


def test_a_merged_adapter_is_not_swapped_under_its_base(tmp_path):
    one = saved(tmp_path / "one", 1)
    model = load_adapter(tiny_llama(), one)
    slot = AdapterSlot(model)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        slot.put(one)


def test_a_method_whose_file_is_not_what_the_model_computes_with_has_no_slot(tmp_path):
    base = tiny_llama()
    model = add_adapter(base, build_config("shira", {}, "CAUSAL_LM", base))
    with pytest.raises(AdapterError, match="shira_indices"):
        AdapterSlot(model)
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        AdapterSlot(model, "x")
