"""A class for each pixel of a picture."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.errors import DataError, UsageError
from lora_ft.media import image_size
from lora_ft.records import (
    Batch,
    Encoded,
    EncodeOptions,
    Example,
    Judgement,
    LossSum,
    Prediction,
    PredictOptions,
    Sample,
)
from lora_ft.registry import TASKS

from . import _images
from ._base import Outputs, TaskBase
from ._detection_options import PictureOptions
from ._labels import label_arguments, learn_labels, values_of
from ._segmentation_masks import VOID, augmented, check_mask, classes_of, find_mask, numbers_of, shares, shown
from ._segmentation_metrics import confusion, judge_masks


class SegmentationOptions(PictureOptions):
    """Options of semantic-segmentation."""

    ignore_index: int | None = Field(
        255, ge=0, description="Number of the pixels of a mask that have no class; null: all pixels have one."
    )
    reduce_labels: bool | None = Field(
        None,
        description="Whether 0 means no class too, and the first class is 1. Must be said where the base's own "
        "processor does so (do_reduce_labels); else it is false.",
    )


@dataclass(frozen=True)
class SemanticSegmentation(TaskBase):
    """Pictures with masks.

    Attributes:
        labels: in the order of their ids.
        ids: the number of each in a mask.
    """

    options: SegmentationOptions = field(default_factory=SegmentationOptions)
    labels: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()

    name = "semantic-segmentation"
    hub_task = "image-segmentation"
    description = "Each pixel of a picture gets a class (SegFormer, UPerNet, DPT, BEiT)."
    auto_class = "AutoModelForSemanticSegmentation"
    kinds = ("image_mask",)
    processor_class = "AutoImageProcessor"
    media = True

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> "SemanticSegmentation":
        """The classes: those of the recipe, whose numbers follow each other, or the numbers found in all masks."""
        if self.options.labels is not None:
            labels = self.options.labels
            first = int(bool(self.options.reduce_labels))
            ids = tuple(range(first, first + len(labels)))
        else:
            read = partial(numbers_of, without=self._without)
            labels = learn_labels(values_of(examples, read), values_of(held_out, read), None)
            ids = tuple(int(n) for n in labels)
        if not 2 <= len(labels) <= VOID:
            raise DataError(f"{len(labels)} classes", why=f"allowed are 2 to {VOID}", fix="check the masks")
        return replace(self, labels=labels, ids=ids)

    @property
    def _without(self) -> list[int]:
        """Numbers of pixels that have no class."""
        void = [] if self.options.ignore_index is None else [self.options.ignore_index]
        return [0, *void] if self.options.reduce_labels else void

    def model_arguments(self) -> dict[str, Any]:
        """The labels both ways; without the head that helps some models while they are pretrained."""
        return {
            **label_arguments(self.labels), "semantic_loss_ignore_index": VOID, "use_auxiliary_head": False
        }  # fmt: skip

    def check_processor(self, processor: Any) -> list[str]:
        """It must be an image processor that takes masks and gives pictures of one size, uncut."""
        _images.check_processor(processor)
        kind = type(processor).__name__
        if "segmentation_maps" not in inspect.signature(processor.preprocess).parameters:
            raise UsageError(f"the base's processor, a {kind}, takes no masks", fix="use a base for segmentation")
        if getattr(processor, "do_reduce_labels", False) and self.options.reduce_labels is None:
            raise UsageError(
                "task.reduce_labels must be true or false with this base",
                why="its own processor takes 0 in a mask for 'no class' (do_reduce_labels), and your masks may not",
                fix="true: the first class is 1; false: the first class is 0",
            )
        fixed = processor.do_resize and processor.size.get("height") and processor.size.get("width")
        if self.options.sizes is None and (not fixed or getattr(processor, "do_center_crop", False)):
            raise UsageError(
                f"the base's processor, a {kind}, gives pictures of several sizes or cuts them", fix="task.image_size"
            )
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample for each picture."""
        size = self.options.sizes or processor.size
        cost = _images.cost(size["height"], size["width"])

        def encode(example: Example) -> Encoded:
            inputs: dict[str, Any] = {"image": _images.find_image(example, options)}
            share = 0.0
            if example.fields.get("mask") is not None:
                inputs["mask"] = find_mask(example)
                share = check_mask(inputs["mask"], inputs["image"], self.ids, self._without, options.max_pixels)
            return Encoded((Sample(inputs, cost, math.ceil(share * cost), example.where),))

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The file and the share of each class."""
        of_class = shares(classes_of(sample.inputs["mask"], self.ids), self.labels)
        return f"{sample.inputs['image'].shown} [[{shown(of_class)}]]"

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Pictures (B, 3, H, W); labels (B, H, W) of classes, VOID where there is none, as the processor makes them."""
        settings = self._settings(processor)
        if not all("mask" in s.inputs for s in samples):
            images = [_images.rgb(s.inputs["image"]) for s in samples]
            return {"pixel_values": _images.pixel_values(images, processor, **settings)}
        views = [augmented(s, self.ids, self.options.augment, draw) for s in samples]
        images, masks = [image for image, _ in views], [mask for _, mask in views]
        found = processor(images=images, segmentation_maps=masks, return_tensors="pt", **settings)
        return {"pixel_values": found["pixel_values"], "labels": found["labels"].long()}

    def _settings(self, processor: Any) -> dict[str, Any]:
        """Of a call of the processor: masks hold classes already; `image_size` overrules how it resizes."""
        settings: dict[str, Any] = {"do_reduce_labels": False}
        if self.options.sizes:
            settings |= {"do_resize": True, "do_center_crop": False, "do_pad": False, "keep_aspect_ratio": False}
        known = {k: v for k, v in settings.items() if hasattr(processor, k)}
        return known | ({"size": self.options.sizes} if self.options.sizes else {})

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross entropy over pixels that have a class, of logits enlarged to the labels' size."""
        labels = batch["labels"]
        logits = _enlarged(self.answer(model, batch).logits, labels.shape[-2:])
        total = nn.functional.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum")
        kept: dict[str, Tensor] = {}
        if not torch.is_grad_enabled():
            pairs = zip(logits.argmax(1), labels, strict=True)
            kept["confusion"] = torch.stack([confusion(g, w, len(self.labels)).int() for g, w in pairs])
        return LossSum(total, int((labels != VOID).sum()), outputs=kept)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits (B, h, w, classes)."""
        logits: Tensor = self.answer(model, batch).logits
        return logits.movedim(1, -1)

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """Mean intersection over union, mean accuracy, pixel accuracy, at the size that the processor gives."""
        return judge_masks([o["confusion"] for o in outputs], self.labels)

    def predict(
        self, model: nn.Module, processor: Any, examples: Iterable[Example], options: PredictOptions
    ) -> Iterator[Prediction]:
        """One batch after the other, so that the logits of one are in memory."""
        examples = list(examples)
        for start in range(0, len(examples), options.batch_size):
            yield from super().predict(model, processor, examples[start : start + options.batch_size], options)

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The mask in the picture's own size, with the numbers that the training masks had."""
        numbers = np.array(self.ids, dtype=np.uint8 if max(self.ids) < 256 else np.uint16)
        for example, (sample,), (kept,) in zip(examples, samples, outputs, strict=True):
            width, height = image_size(sample.inputs["image"])
            classes = _enlarged(kept["logits"][None], (height, width))[0].argmax(0).numpy()
            of_class = shares(classes, self.labels)
            reference = None
            if "mask" in sample.inputs:
                reference = shown(shares(classes_of(sample.inputs["mask"], self.ids), self.labels))
            details = {"mask": numbers[classes], "shares": of_class}
            where = sample.inputs["image"].shown
            yield Prediction(example.where, where, shown(of_class), reference, details=details)


def _enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(B, classes, height, width) in float32, as Transformers' own losses do it."""
    return nn.functional.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


TASKS.register(SemanticSegmentation())
