"""Adapter methods on image, audio and image-text models: where they go, what they promise, against plain PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_ft_adapters import AdapterError, add_adapter, build_config, merge, merged, trainable
from lora_ft_adapters.contract import Subject, check
from lora_ft_adapters.targets import resolve_targets
from tests.tiny_vision import CONVNETS, MAKERS, OwnConvNet, loss, make, scores

METHODS = ("lora", "houlsby", "head", "layers", "full", "bitfit")
ALL_METHODS_ON = ("resnet", "convnext", "own", "segformer")
PAIRS = [(k, m) for k in MAKERS for m in METHODS if k in ALL_METHODS_ON or m in ("lora", "houlsby", "layers")]


def subject(kind: str) -> Subject:
    batch = make(kind)[1]
    return Subject(
        lambda: make(kind)[0], lambda m: scores(m, batch), lambda m, one: loss(m, one), [dict(batch)] * 2,
        learning_rate=2e-3,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_a_method_keeps_its_promises_on_a_model_without_being_told_where_to_go(kind, method):
    report = check(method, subject(kind))
    assert report.faults == []  # gradients everywhere, the loss falls, base and statistics keep their bits, ...
    assert (report.fresh, report.second) == ("no-op", "yes")
    assert (report.merges == "yes") is (method != "houlsby")


def lora_on(model, **options):
    return add_adapter(model, build_config("lora", options, None, model))


def adapted_layers(model) -> list[str]:
    return [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("kind", CONVNETS)
def test_lora_takes_all_linear_layers_and_convolutions_of_a_convnet_but_depthwise_ones_and_the_new_head(kind):
    bare = make(kind)[0]
    wanted = {
        n for n, m in bare.named_modules()
        if (isinstance(m, nn.Conv2d) and m.groups == 1) or (isinstance(m, nn.Linear) and not n.startswith("classifier"))
    }  # fmt: skip
    model = lora_on(bare, modules_to_save=["classifier"])
    assert set(adapted_layers(model)) == wanted
    assert sum(isinstance(m, nn.Conv2d) for n, m in make(kind)[0].named_modules() if n in wanted) >= 2
    trained = [n for n, _ in trainable(model)]
    assert {n for n in trained if "lora_" not in n} == {n for n in trained if "modules_to_save" in n} != set()


@pytest.mark.parametrize(("kind", "part"), [("vit", "Linear"), ("whisper", "Linear"), ("detr", "both")])
def test_a_patch_embedding_does_not_make_a_transformer_convolutional_and_a_backbone_does(kind, part):
    model = make(kind)[0]
    if kind == "vit":  # of the width of a real one, where the patch embedding is a small part
        config = type(model.config)(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
                                    image_size=32, patch_size=8)  # fmt: skip
        model = type(model)(config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)}
    found = layers.keys() & set(adapted_layers(lora_on(model)))
    assert found == (layers.keys() if part == "both" else set())
    assert layers


@pytest.mark.parametrize("kind", [*CONVNETS, "detr"])
def test_lora_on_convolutions_is_plain_pefts_in_outputs_and_gradients(kind):
    names = adapted_layers(lora_on(make(kind)[0]))
    torch.manual_seed(1)
    ours = lora_on(make(kind)[0], r=4, lora_alpha=8)
    bare, batch = make(kind)
    with torch.no_grad():
        for n, p in ours.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names)
    theirs = get_peft_model(bare, config)
    state = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    own = dict(theirs.named_parameters())
    assert state.keys() == {n for n in own if "lora_" in n}
    with torch.no_grad():
        for n, p in state.items():
            own[n].copy_(p)
    for layer in theirs.modules():  # PEFT hides the stride that MobileNetV2 reads to pad
        if hasattr(layer, "lora_A") and isinstance(layer.get_base_layer(), nn.Conv2d):
            layer.stride, layer.kernel_size = layer.get_base_layer().stride, layer.get_base_layer().kernel_size
            layer.dilation = layer.get_base_layer().dilation
    assert torch.equal(scores(ours.eval(), batch), scores(theirs.eval(), batch))
    for model in (ours, theirs):
        loss(model, batch).backward()
    assert all(torch.equal(p.grad, own[n].grad) for n, p in state.items())
    still = {n for n, p in state.items() if not p.grad.any()}
    # DETR's first decoder block attends to zeros.
    assert all("decoder.layers.0.self_attn.v_proj" in n for n in still)


@pytest.mark.parametrize("kind", ["resnet", "mobilenet"])
def test_lora_on_convolutions_merges_exactly_and_comes_out_again(kind):
    model, batch = make(kind)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    model = lora_on(model.double())
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    model.eval()
    wanted = scores(model, batch)
    with merged(model):
        assert torch.allclose(scores(model, batch), wanted, rtol=0, atol=1e-10)
    kept = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.state_dict().items()}
    assert all(torch.equal(kept[n], v.double() if v.is_floating_point() else v) for n, v in before.items())
    assert torch.allclose(scores(merge(model), batch), wanted, rtol=0, atol=1e-10)


def test_convolutions_that_peft_would_copy_wrongly_are_left_out_or_refused():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Conv2d(3, 8, 3, padding=1)
            self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
            self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
            self.up = nn.ConvTranspose2d(8, 8, 2)

        def forward(self, x):
            return self.up(self.grouped(self.mirrored(self.wide(self.plain(x)))))

    assert resolve_targets(Net(), "all-conv") == ["plain"]
    assert adapted_layers(lora_on(Net())) == ["plain"]
    for name, why in (("wide", "dilation"), ("mirrored", "reflect")):
        with pytest.raises(AdapterError, match=why):
            build_config("lora", {"target_modules": [name]}, None, Net())


def test_methods_for_linear_layers_say_so_on_a_convnet_with_a_new_head():
    model = make("resnet")[0]
    with pytest.raises(AdapterError, match="works on linear layers"):
        build_config("pissa", {"modules_to_save": ["classifier"]}, None, model)


def test_blocks_of_a_vision_tower_that_llava_never_reads_get_no_adapter():
    model = lora_on(make("llava")[0])
    names = adapted_layers(model)
    assert any("vision_tower" in n and ".layers.1." in n for n in names)
    assert not any("vision_tower" in n and ".layers.2." in n for n in names)
    assert any("multi_modal_projector" in n for n in names)
    assert any("language_model.layers.1." in n for n in names)


def test_every_linear_layer_of_both_halves_of_whisper_is_adapted():
    model = lora_on(make("whisper")[0])
    bare = make("whisper")[0]
    linear = {n for n, m in bare.named_modules() if isinstance(m, nn.Linear) and n != "proj_out"}
    assert set(adapted_layers(model)) == linear
    assert {n.split(".")[1] for n in linear} == {"encoder", "decoder"}


def test_a_model_that_only_has_a_head_to_find_is_found_by_its_convolutions():
    model = add_adapter(OwnConvNet(), build_config("lora", {"target_modules": ["layers:-1", "all-conv"]}, None,
                                                   OwnConvNet()))  # fmt: skip
    assert adapted_layers(model) == ["blocks.2.first", "blocks.2.second"]
