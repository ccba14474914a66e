"""One class for an image, or any number of labels."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.errors import UsageError
from lora_ft.media import Media, image_size
from lora_ft.media.image_augment import augment_image, blend
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Sample
from lora_ft.registry import TASKS

from . import _images
from ._classes import ClassOptions, ClassTask, labels_of
from ._draws import sample_rng
from ._image_options import ImageOptions


class ImageClassificationOptions(ImageOptions, ClassOptions):
    """Options of image-classification."""


@dataclass(frozen=True)
class ImageClassification(ClassTask):
    """Images with classes."""

    options: ImageClassificationOptions = field(default_factory=ImageClassificationOptions)

    name = "image-classification"
    hub_task = "image-classification"
    description = "An image gets one class, or any number of labels."
    auto_class = "AutoModelForImageClassification"
    kinds = ("labelled_image",)
    processor_class = "AutoImageProcessor"
    media = True

    def check_processor(self, processor: Any) -> list[str]:
        """Refuse what is no image processor."""
        _images.check_processor(processor)
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample for each row; all images must come out of the processor in one size."""
        known = _Shapes(lambda image: self._pixels([image], processor))

        def encode(example: Example) -> Encoded:
            media = _images.find_image(example, options)
            shape = known.of(media)
            if shape != known.first:
                raise ValueError(
                    f"the processor makes {shape[0]} x {shape[1]} pixels of this image and {known.first[0]} x "
                    f"{known.first[1]} of another one; --set task.image_size=224 gives all of them one size"
                )
            answer, label = self.answer_of(example)
            sample = Sample(
                {"image": media, **answer}, _images.cost(*shape), int("labels" in answer), example.where, label
            )
            return Encoded((sample,))

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The file, its size and its label."""
        media: Media = sample.inputs["image"]
        width, height = _images.rgb(media).size
        return f"{media.shown} ({width} x {height}) [[{self.shown_answer(sample)}]]"

    def shown(self, example: Example) -> str:
        """Its path."""
        return _images.named(example)

    def answer(self, model: nn.Module, batch: Batch) -> Any:
        """The model's answer; images of a size of the recipe's own stretch its position embeddings."""
        if self.options.size is None:
            return super().answer(model, batch)
        try:
            stretch = {"interpolate_pos_encoding": True} if _images.resizable(model) else {}
            return super().answer(model, {**batch, **stretch})
        except ValueError as error:
            height, width = self.options.size
            raise UsageError(f"task.image_size: this model takes no images of {height} x {width}: {error}") from error

    def mix(self, samples: Sequence[Sample], draw: int) -> list[Sample]:
        """With a partner for each sample, drawn from the step, where images are mixed."""
        if not (self.options.augment.mixup or self.options.augment.cutmix):
            return list(samples)
        mixed = []
        for sample in samples:
            other = samples[int(sample_rng(sample, draw, "partner").integers(len(samples)))]
            inputs = {"partner": other.inputs["image"], "partner_labels": other.inputs["labels"]}
            mixed.append(replace(sample, inputs={**sample.inputs, **inputs}))
        return mixed

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """pixel_values (B, C, H, W), and labels where all samples have them."""
        labels = labels_of(samples)
        pixels = self._view(samples, "image", processor, draw)
        if not draw or not all("partner" in s.inputs for s in samples):
            return {"pixel_values": pixels, **labels}
        others = self._view(samples, "partner", processor, draw)
        targets = self._shares(labels["labels"])
        theirs = self._shares(torch.tensor([s.inputs["partner_labels"] for s in samples]))
        for row, sample in enumerate(samples):
            rng = sample_rng(sample, draw, "blend")
            pixels[row], share = blend(pixels[row], others[row], rng, self.options.augment)
            targets[row] = share * targets[row] + (1 - share) * theirs[row]
        return {"pixel_values": pixels, "labels": targets}

    def _view(self, samples: Sequence[Sample], name: str, processor: Any, draw: int) -> Tensor:
        images = [_images.rgb(s.inputs[name]) for s in samples]
        if draw and self.options.augment.on:
            rngs = [sample_rng(s, draw, name) for s in samples]
            images = [augment_image(i, self.options.augment, r) for i, r in zip(images, rngs, strict=True)]
        return self._pixels(images, processor)

    def _pixels(self, images: Sequence[Any], processor: Any) -> Tensor:
        size = self.options.size
        if size is None:
            return _images.pixel_values(images, processor)
        resized = [i.resize((size[1], size[0]), getattr(processor, "resample", None)) for i in images]
        return _images.pixel_values(resized, processor, do_resize=False, do_center_crop=False)

    def _shares(self, labels: Tensor) -> Tensor:
        """(B, classes) of what each label's share is."""
        if labels.is_floating_point():
            return labels.clone()
        return torch.nn.functional.one_hot(labels, len(self.labels)).float()


class _Shapes:
    """(height, width) after the processor, for each size before it; several threads may ask."""

    def __init__(self, pixels: Callable[[Any], Tensor]) -> None:
        self.pixels = pixels
        self.first = (0, 0)
        self._found: dict[tuple[int, int], tuple[int, int]] = {}
        self._lock = threading.Lock()

    def of(self, media: Media) -> tuple[int, int]:
        """The shape of this image."""
        size = image_size(media)
        with self._lock:
            if size not in self._found:
                height, width = self.pixels(_images.rgb(media)).shape[-2:]
                self._found[size] = (int(height), int(width))
                self.first = self._found[next(iter(self._found))]
            return self._found[size]


TASKS.register(ImageClassification())
