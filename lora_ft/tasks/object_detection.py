"""Boxes around what is in a picture, and the class of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.media import image_size
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Judgement, LossSum, Prediction, Sample
from lora_ft.registry import TASKS

from . import _images
from ._base import Outputs, TaskBase
from ._detection_batch import augmented, by_size, padded_pictures, processed_size, target
from ._detection_loss import set_loss
from ._detection_metrics import Boxes, judge_boxes, need_packages
from ._detection_options import PictureOptions
from ._labels import label_arguments, label_ids, learn_labels, values_of

MOST = 100  # boxes of a picture that are judged, as COCO does


class DetectionOptions(PictureOptions):
    """Options of object-detection."""

    threshold: float = Field(0.5, ge=0, lt=1, description="Score from which predict gives a box.")


@dataclass(frozen=True)
class ObjectDetection(TaskBase):
    """Pictures with boxes.

    Attributes:
        labels: in the order of their ids.
        boxes_per_picture: mean of the training rows, by which the loss of held-out rows is divided.
    """

    options: DetectionOptions = field(default_factory=DetectionOptions)
    labels: tuple[str, ...] = ()
    boxes_per_picture: float = 1.0

    name = "object-detection"
    hub_task = "object-detection"
    description = "Boxes around what is in a picture, each with a class (DETR, Conditional DETR, RT-DETR, YOLOS)."
    auto_class = "AutoModelForObjectDetection"
    kinds = ("boxes",)
    processor_class = "AutoImageProcessor"
    media = True
    coco = True

    def configure(self, options: Mapping[str, Any]) -> "ObjectDetection":
        """With the recipe's options, when what matches and judges boxes is installed."""
        need_packages()
        return super().configure(options)

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> "ObjectDetection":
        """The classes, and how many boxes a picture has."""
        train, held = values_of(examples, _names), values_of(held_out, _names)
        labels = learn_labels(train, held, self.options.labels, least=1)
        return replace(self, labels=labels, boxes_per_picture=fmean(len(_plain(e)) for e in examples))

    def model_arguments(self) -> dict[str, Any]:
        """The labels both ways; without noised boxes, which RT-DETR makes from a whole batch at random."""
        return {**label_arguments(self.labels), "num_denoising": 0}

    def check_processor(self, processor: Any) -> list[str]:
        """It must be an image processor."""
        _images.check_processor(processor)
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample for each picture; its boxes stay in the pixels of the picture."""
        size = self.options.sizes or processor.size

        def encode(example: Example) -> Encoded:
            media = _images.find_image(example, options)
            width, height = image_size(media)
            inputs: dict[str, Any] = {"image": media, "size": (width, height)}
            if example.fields.get("boxes") is not None:
                _check_inside(example.fields["boxes"], width, height)
                inputs["boxes"] = example.fields["boxes"]
                inputs["labels"] = label_ids(_names(example), self.labels)
                inputs["crowd"] = list(example.fields.get("crowd") or [False] * len(inputs["boxes"]))
            cost = _images.cost(*processed_size(height, width, size))
            return Encoded((Sample(inputs, cost, int("labels" in inputs), example.where),))

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The file and its boxes."""
        found = zip(sample.inputs["labels"], sample.inputs["boxes"], strict=True)
        return f"{sample.inputs['image'].shown} [[{'; '.join(f'{self.labels[i]} at {_shown(b)}' for i, b in found)}]]"

    def mix(self, samples: Sequence[Sample], draw: int) -> list[Sample]:
        """Each knows how many boxes a picture of the step has on average: what the step's loss is divided by."""
        mean = fmean(s.inputs["crowd"].count(False) for s in samples)
        return [replace(s, inputs={**s.inputs, "per_picture": mean}) for s in samples]

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """Pictures (B, 3, H, W), filled up on the right and below, pixel_mask (B, H, W), and a target for each."""
        settings = {"size": self.options.sizes} if self.options.sizes else {}
        images, targets = [], []
        for sample in samples:
            image, boxes, labels = augmented(sample, self.options.augment, draw)
            images.append(_images.pixel_values([image], processor, **settings)[0])
            per_picture = sample.inputs.get("per_picture", self.boxes_per_picture)
            targets.append(target(boxes, labels, image.size, per_picture))
        batch = padded_pictures(images)
        return batch | ({"labels": targets} if all("labels" in s.inputs for s in samples) else {})

    def answer(self, model: nn.Module, batch: Batch) -> Any:
        """`logits` (B, queries, classes), `pred_boxes` (B, queries, 4) and, where there are labels, the summed loss.

        Pictures of one size go through the model together, without the others' filling: what a convolution makes of
        that would depend on which pictures share a batch.
        """
        parts = []
        for rows, one in by_size(model, batch):
            if "labels" in one:
                loss, found = set_loss(model, one)
            else:
                loss, found = torch.zeros(()), super().answer(model, one)
            parts.append((rows, loss, found))
        back = torch.argsort(torch.tensor([i for rows, *_ in parts for i in rows]))
        logits, boxes = (torch.cat([getattr(f, name) for *_, f in parts]) for name in ("logits", "pred_boxes"))
        return SimpleNamespace(
            loss=sum(loss for _, loss, _ in parts), logits=logits[back.to(logits.device)],
            pred_boxes=boxes[back.to(boxes.device)],
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The model's own loss, whose divisors of a batch became those of the step; the count is pictures."""
        answer = self.answer(model, batch)
        return LossSum(answer.loss, len(answer.logits), outputs=self.keep(answer, batch))

    def keep(self, answer: Any, batch: Batch) -> dict[str, Tensor]:
        """(B, boxes, 6) of the best boxes: centre x and y, width and height in shares of the picture, score, class."""
        logits, boxes = answer.logits.detach().float(), answer.pred_boxes.detach().float()
        classes, queries = len(self.labels), logits.shape[1]
        if logits.shape[-1] == classes + 1:  # the last class is "nothing", so a query has one class at most
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, chosen = scores.topk(min(MOST, queries), dim=1)
            labels = labels.gather(1, chosen)
        else:
            scores, flat = logits.sigmoid().flatten(1).topk(min(MOST, queries * classes), dim=1)
            chosen, labels = flat // classes, flat % classes
        boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
        return {"found": torch.cat([boxes, scores[..., None], labels[..., None].float()], -1)}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Boxes and logits of all queries (B, queries, 4 + classes)."""
        answer = self.answer(model, batch)
        return torch.cat([answer.pred_boxes, answer.logits], -1)

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """Mean average precision and recall, by pycocotools."""
        found = [_pixels(o["found"], s.inputs["size"]) for s, o in zip(samples, outputs, strict=True)]
        wanted = [Boxes(s.inputs["boxes"], s.inputs["labels"], crowd=s.inputs["crowd"]) for s in samples]
        return judge_boxes(found, wanted, self.labels)

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The boxes from the threshold on, best first, [x, y, width, height] in pixels of the picture."""
        for example, (sample,), (kept,) in zip(examples, samples, outputs, strict=True):
            width, height = sample.inputs["size"]
            found = _pixels(kept["found"], (width, height))
            good = [i for i, score in enumerate(found.scores) if score >= self.options.threshold]
            boxes, scores = [found.boxes[i] for i in good], [found.scores[i] for i in good]
            names = [self.labels[found.labels[i]] for i in good]
            output = "; ".join(
                f"{n} {s:.2f} at {_shown(b)}" for n, s, b in zip(names, scores, boxes, strict=True)
            )  # fmt: skip
            reference = None
            if example.fields.get("boxes") is not None:
                pairs = zip(_names(example), example.fields["boxes"], strict=True)
                reference = "; ".join(f"{n} at {_shown(b)}" for n, b in pairs)
            details = {"boxes": boxes, "labels": names, "scores": scores, "width": width, "height": height}
            yield Prediction(example.where, sample.inputs["image"].shown, output, reference, details=details)


def _names(example: Example) -> list[str]:
    """The class of each box; raises ValueError where the row has no list of boxes."""
    if example.fields.get("boxes") is None:
        raise ValueError("the row has no boxes; a picture without any has an empty list")
    return list(example.fields["labels"])


def _plain(example: Example) -> list[Any]:
    """The boxes that are not crowds."""
    crowd = example.fields.get("crowd") or [False] * len(example.fields["boxes"])
    return [b for b, many in zip(example.fields["boxes"], crowd, strict=True) if not many]


def _check_inside(boxes: Sequence[Sequence[float]], width: int, height: int) -> None:
    for number, (x, y, w, h) in enumerate(boxes, 1):
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise ValueError(
                f"box {number}, {_shown((x, y, w, h))}, lies outside of the picture of {width} x {height} pixels; a "
                "box is x, y, width, height in pixels"
            )


def _shown(box: Sequence[float]) -> str:
    return f"({', '.join(f'{v:.0f}' for v in box)})"


def _pixels(found: Tensor, size: tuple[int, int]) -> Boxes:
    """What `keep` kept of one picture, in its pixels."""
    x, y, w, h, scores, labels = found.double().unbind(-1)
    width, height = size
    boxes = torch.stack([(x - w / 2) * width, (y - h / 2) * height, w * width, h * height], -1)
    return Boxes(boxes.tolist(), labels.long().tolist(), scores.tolist())


TASKS.register(ObjectDetection())
