"""Image, audio and image-text models of Transformers and a CNN of a user's own, tiny, with random weights.

Each maker gives a model and one batch that uses the whole of it; `loss` is a number that all of it matters to.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Batch = dict[str, Tensor]
CONVNETS = ("resnet", "mobilenet", "convnext", "efficientnet", "own")


def _pixels(size: int = 32, images: int = 2) -> Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


def _labels(kinds: int = 3) -> Tensor:
    return torch.arange(2) % kinds


def resnet() -> tuple[Any, Batch]:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )  # fmt: skip
    return hf.ResNetForImageClassification(config), {"pixel_values": _pixels(), "labels": _labels()}


def mobilenet() -> tuple[Any, Batch]:
    config = hf.MobileNetV2Config(
        image_size=32, depth_multiplier=0.25, finegrained_output=False, num_labels=3, classifier_dropout_prob=0.0
    )
    return hf.MobileNetV2ForImageClassification(config), {"pixel_values": _pixels(), "labels": _labels()}


def convnext() -> tuple[Any, Batch]:
    config = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, image_size=32, num_labels=3)
    return hf.ConvNextForImageClassification(config), {"pixel_values": _pixels(), "labels": _labels()}


def efficientnet() -> tuple[Any, Batch]:
    config = hf.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320, num_labels=3, dropout_rate=0.0,
        drop_connect_rate=0.0,
    )  # fmt: skip
    return hf.EfficientNetForImageClassification(config), {"pixel_values": _pixels(), "labels": _labels()}


class OwnBlock(nn.Module):
    """Two convolutions around a residual sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(torch.relu(self.norm(self.first(x))))
        return y


class OwnConvNet(nn.Module):
    """What somebody writes in a notebook: a stem, blocks in a Sequential, pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(OwnBlock(8), OwnBlock(8), OwnBlock(8))
        self.classifier = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.classifier(self.blocks(self.stem(pixel_values)).mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return hf.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


def own() -> tuple[Any, Batch]:
    return OwnConvNet(), {"pixel_values": _pixels(), "labels": _labels()}


_VIT = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def vit() -> tuple[Any, Batch]:
    model = hf.ViTForImageClassification(hf.ViTConfig(**_VIT, num_labels=3))
    return model, {"pixel_values": _pixels(), "labels": _labels()}


def deit() -> tuple[Any, Batch]:
    model = hf.DeiTForImageClassification(hf.DeiTConfig(**_VIT, num_labels=3))
    return model, {"pixel_values": _pixels(), "labels": _labels()}


def swin() -> tuple[Any, Batch]:
    config = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=3,
        drop_path_rate=0.0,
    )  # fmt: skip
    return hf.SwinForImageClassification(config), {"pixel_values": _pixels(), "labels": _labels()}


def segformer() -> tuple[Any, Batch]:
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[2, 2], sr_ratios=[4, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3, drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )  # fmt: skip
    masks = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(2))
    return hf.SegformerForSemanticSegmentation(config), {"pixel_values": _pixels(), "labels": masks}


def detr() -> tuple[Any, Batch]:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )  # fmt: skip
    config = hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=5, num_labels=3, dropout=0.0,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config), {"pixel_values": _pixels()}


def wav2vec2() -> tuple[Any, Batch]:
    config = hf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8],
        conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, vocab_size=12, apply_spec_augment=False, layerdrop=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0, final_dropout=0.0,
    )  # fmt: skip
    sound = torch.randn(2, 800, generator=torch.Generator().manual_seed(1))
    return hf.Wav2Vec2ForCTC(config), {"input_values": sound, "labels": torch.tensor([[3, 4], [5, 6]])}


def whisper() -> tuple[Any, Batch]:
    config = hf.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, vocab_size=40, max_source_positions=20,
        max_target_positions=10, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    mel = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": mel, "labels": torch.tensor([[3, 4, 5], [6, 7, 8]])
    }  # fmt: skip


_TEXT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40,
}  # fmt: skip


def clip() -> tuple[Any, Batch]:
    config = hf.CLIPConfig(
        text_config={**_TEXT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}, vision_config=_VIT,
        projection_dim=8,
    )  # fmt: skip
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    return hf.CLIPModel(config), {"pixel_values": _pixels(), "input_ids": ids, "return_loss": torch.tensor(True)}


def smolvlm() -> tuple[Any, Batch]:
    text = {**_TEXT, "model_type": "llama", "num_key_value_heads": 1, "pad_token_id": 0}
    config = hf.SmolVLMConfig(text_config=text, vision_config=_VIT, scale_factor=2, image_token_id=39, pad_token_id=0)
    return hf.SmolVLMForConditionalGeneration(config), _with_image(4, {"pixel_values": _pixels()[:, None]})


def llava() -> tuple[Any, Batch]:
    vision = hf.CLIPVisionConfig(**_VIT)
    text = hf.LlamaConfig(**_TEXT, num_key_value_heads=1)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-2)
    return hf.LlavaForConditionalGeneration(config), _with_image(16, {"pixel_values": _pixels()})


def _with_image(tokens: int, image: Batch) -> Batch:
    ids = torch.tensor([[1, *[39] * tokens, 5, 6, 7], [1, *[39] * tokens, 8, 9, 10]])
    labels = torch.where(torch.arange(ids.shape[1]) > tokens, ids, -100)
    return {**image, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


MAKERS: dict[str, Callable[[], tuple[Any, Batch]]] = {
    f.__name__: f
    for f in (resnet, mobilenet, convnext, efficientnet, own, vit, deit, swin, segformer, detr, wav2vec2, whisper,
              clip, smolvlm, llava)
}  # fmt: skip


def make(kind: str) -> tuple[Any, Batch]:
    """The same model every time, frozen, in evaluation mode, with statistics, gains and biases as after training."""
    torch.manual_seed(0)
    model, batch = MAKERS[kind]()
    seeds = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn(p.shape, generator=seeds)
        if p.dim() == 4:  # some start so small that nothing is left of a gradient after a few blocks
            nn.init.kaiming_normal_(p, generator=seeds)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=seeds))
        if name.endswith("running_var"):
            buffer.copy_(1 + 0.1 * torch.rand(buffer.shape, generator=seeds))
    return model.eval().requires_grad_(False), batch


def loss(model: Any, batch: Batch) -> Tensor:
    """The model's own, or for a detector the sum of squares of what it puts out."""
    out = model(**batch)
    found: Tensor = (
        out.loss if getattr(out, "loss", None) is not None else (out.logits**2).mean() + (out.pred_boxes**2).mean()
    )
    return found


def scores(model: Any, batch: Batch) -> Tensor:
    """All scores of the model for a batch, without gradients."""
    with torch.no_grad():
        out = model(**batch)
    found: Tensor = out.logits if hasattr(out, "logits") else out.logits_per_image
    return found
