"""Options of tasks that say where in an image things are."""

from collections import Counter

from pydantic import Field, field_validator

from lora_ft.media import ImageAugment

from ._image_options import ImageOptions
from ._labels import LabelName


class PictureOptions(ImageOptions):
    """Names of classes, and how images are prepared."""

    labels: tuple[LabelName, ...] | None = Field(
        None, description="All classes in the order of their ids; default: those of the training rows, sorted."
    )

    @field_validator("augment", mode="after")
    @classmethod
    def _without_mixing(cls, value: ImageAugment) -> ImageAugment:
        if value.mixup or value.cutmix:
            raise ValueError("mixup and cutmix mix the classes of whole images: they are for image-classification")
        return value

    @field_validator("labels", mode="after")
    @classmethod
    def _once_each(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        twice = [name for name, count in Counter(value or ()).items() if count > 1]
        if twice:
            raise ValueError(f"the label {twice[0]!r} is listed twice")
        return value

    @property
    def sizes(self) -> dict[str, int] | None:
        """As a processor's `size`."""
        return None if self.size is None else {"height": self.size[0], "width": self.size[1]}
