"""Blocks, stages and heads of image, audio and image-text models, and bottlenecks on convolutional ones."""

import pytest
import torch
from torch import nn

from lora_ft_adapters import AdapterError, add_adapter, build_config, load_adapter, save_adapter, trainable
from lora_ft_adapters.blocks import places, stacks, transformer_blocks
from tests.tiny_vision import make, scores

STACKS = {
    "resnet": {"resnet.encoder.stages": 4},
    "mobilenet": {"mobilenet_v2.layer": 16},
    "convnext": {"convnext.encoder.stages": 4},
    "efficientnet": {"efficientnet.encoder.blocks": 10},
    "own": {"blocks": 3},
    "vit": {"vit.layers": 3},
    "deit": {"deit.layers": 3},
    "swin": {"swin.encoder.layers": 4},
    "segformer": {"segformer.stages": 4},
    "detr": {"model.encoder.layers": 2, "model.decoder.layers": 2},
    "wav2vec2": {"wav2vec2.encoder.layers": 2},
    "whisper": {"model.encoder.layers": 2, "model.decoder.layers": 2},
    "clip": {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 3},
    "smolvlm": {"model.vision_model.encoder.layers": 3, "model.text_model.layers": 2},
    "llava": {"model.vision_tower.encoder.layers": 2, "model.language_model.layers": 2},
}
ATTENTIONS = {"model.decoder.layers": 2}  # of a block: its own, and the one that looks at the encoder


@pytest.mark.parametrize("kind", STACKS)
def test_the_blocks_of_a_model_are_found_and_counted_through_its_stages(kind):
    """Older versions of Transformers have other names, so sizes are compared, not names."""
    model = make(kind)[0]
    blocks = transformer_blocks(model)
    found: dict[str, int] = {}
    for block in blocks:
        assert block.index == found.setdefault(block.stack, 0)
        found[block.stack] += 1
        assert model.get_submodule(block.name) is block.module
    assert sorted(found.values()) == sorted(STACKS[kind].values())
    assert [b.name for b in stacks(model)] == [b.name for b in blocks]


@pytest.mark.parametrize("kind", [k for k in STACKS if k not in ("resnet", "mobilenet", "convnext", "efficientnet",
                                                                 "own")])  # fmt: skip
def test_attention_and_feed_forward_of_every_block_are_found(kind):
    for block in transformer_blocks(make(kind)[0]):
        there = places(block)
        assert len(there.attention) == ATTENTIONS.get(block.stack, 1), block.name
        assert there.feed_forward
        assert there.reads


class Plain(nn.Module):
    """As torchvision writes a ResNet: stages that are attributes, blocks with a Sequential of their own."""

    class Block(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o)
            self.conv2, self.bn2 = nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o)
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1), nn.BatchNorm2d(o))

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + self.downsample(x))

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(self.Block(4, 4), self.Block(4, 4))
        self.layer2 = nn.Sequential(self.Block(4, 8), self.Block(8, 8))
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


def copied(model, method="layers", **options) -> list[str]:
    config = add_adapter(model, build_config(method, options, None, model)).peft_config["default"]
    return config.adapted_modules


def roots(names: list[str], parts: int) -> list[str]:
    return list(dict.fromkeys(".".join(n.split(".")[:parts]) for n in names))


def test_last_blocks_of_a_convnet_are_the_last_of_the_whole_network():
    assert roots(copied(make("resnet")[0], last=1), 6) == ["resnet.encoder.stages.1.layers.1"]
    assert roots(copied(make("mobilenet")[0], last=2), 3) == ["mobilenet_v2.layer.14", "mobilenet_v2.layer.15"]
    assert roots(copied(Plain(), last=3), 2) == ["layer1.1", "layer2.0", "layer2.1"]
    assert roots(copied(Plain(), layers_to_transform=[0, -1]), 2) == ["layer1.0", "layer2.1"]


def test_last_stages_are_whole_with_what_makes_them_smaller():
    convnext = copied(make("convnext")[0], stages=1)
    assert roots(convnext, 4) == ["convnext.encoder.stages.1"]
    assert any("downsampling" in n for n in convnext)
    assert roots(copied(make("swin")[0], stages=1), 4) == ["swin.encoder.layers.1"]
    assert roots(copied(Plain(), stages=1), 1) == ["layer2"]
    for kind in ("vit", "mobilenet"):
        with pytest.raises(AdapterError, match="do not stand in stages"):
            copied(make(kind)[0], stages=1)
    with pytest.raises(AdapterError, match="give last or stages, not both"):
        build_config("layers", {"last": 1, "stages": 1})


def test_convolutions_in_a_row_are_blocks_where_there_are_no_others():
    vgg = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        nn.Flatten(), nn.Sequential(nn.Linear(8 * 4, 16), nn.ReLU(), nn.Linear(16, 2)),
    )  # fmt: skip
    assert [b.name for b in transformer_blocks(vgg)] == ["0.0", "0.2", "0.4"]
    assert copied(vgg, last=1) == ["0.4"]


def test_blocks_with_names_instead_of_numbers_keep_them():
    """As torchvision builds its ViT and its DenseNet."""
    named = nn.Sequential()
    for i in range(2):
        named.add_module(f"dense_{i}", nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    assert [b.name for b in transformer_blocks(nn.ModuleDict({"body": named}))] == ["body.dense_0", "body.dense_1"]
    adapted = add_adapter(named, build_config("houlsby", {"r": 2}, None, named))
    assert adapted(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 4, 4)
    encoder = nn.Module()
    encoder.layers = nn.Sequential()
    for i in range(2):
        encoder.layers.add_module(f"layer_{i}", nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert [b.name for b in transformer_blocks(encoder)] == ["layers.layer_0", "layers.layer_1"]


def test_the_head_is_what_puts_out_answers_and_no_pooler():
    assert roots(copied(make("detr")[0], "head"), 1) == ["class_labels_classifier", "bbox_predictor"]
    assert roots(copied(make("clip")[0], "head"), 1) == ["visual_projection", "text_projection"]
    assert roots(copied(make("segformer")[0], "head"), 1) == ["decode_head"]
    assert copied(make("resnet")[0], "head") == ["classifier.1"]
    assert copied(Plain(), "head") == ["fc"]


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("kind", ["resnet", "convnext", "own"])
def test_a_bottleneck_on_a_convnet_is_two_1x1_convolutions_after_every_residual_block(kind, method, tmp_path):
    model, batch = make(kind)
    off = scores(model, batch)
    model = model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    names = [b.name for b in transformer_blocks(model)]
    model = add_adapter(model, build_config(method, {"r": 3, "non_linearity": "gelu"}, None, model)).eval()
    assert model.peft_config["default"].adapted_modules == names
    assert torch.allclose(scores(model, batch).float(), off, atol=1e-5)
    with torch.no_grad():
        for _, p in trainable(model):
            p.normal_(std=0.3)
    layers = [model.get_submodule(f"base_model.model.{n}") for n in names]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [layer.register_forward_hook(lambda m, args, y: seen.append((m.base_layer(*args), y))) for layer in layers]
    on = scores(model, batch)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(names)
    for layer, (y, out) in zip(layers, seen, strict=True):
        adapter = layer.adapters["default"]
        down, up = adapter.down, adapter.up
        inner = nn.functional.conv2d(y, down.weight[:, :, None, None], down.bias)
        change = nn.functional.conv2d(nn.functional.gelu(inner), up.weight[:, :, None, None], up.bias)
        assert torch.allclose(out, y + change, rtol=0, atol=1e-12)
    assert not torch.allclose(on.float(), off, atol=1e-3)
    save_adapter(model, tmp_path)
    loaded = load_adapter(make(kind)[0].double(), tmp_path, "other")
    assert torch.allclose(scores(loaded, batch), on, rtol=0, atol=1e-12)
    with model.disable_adapter():
        assert torch.allclose(scores(model, batch).float(), off, atol=1e-5)


def test_methods_that_have_no_place_in_a_convolutional_block_say_so():
    model = make("resnet")[0]
    with pytest.raises(AdapterError, match="parallel has no place"):
        add_adapter(model, build_config("parallel", {}, None, model))
    with pytest.raises(AdapterError, match="edits tokens"):
        add_adapter(model, build_config("loreft", {}, None, model))


def test_biases_of_norms_over_channels_are_added_to_channels():
    """ConvNeXt's norms stand before (B, C, H, W) and after (B, H, W, C); the two have the same class."""
    model, batch = make("convnext")
    adapted = add_adapter(model, build_config("bitfit", {}, None, model))
    with torch.no_grad():
        for _, p in trainable(adapted):
            p.normal_(std=0.5)
    wanted = scores(adapted.eval(), batch)
    moved = make("convnext")[0]
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if name.endswith(".delta"):
                moved.get_submodule(name.split("base_model.model.")[1].split(".lft_")[0]).bias += p
    assert torch.allclose(scores(moved, batch), wanted, atol=1e-5)
