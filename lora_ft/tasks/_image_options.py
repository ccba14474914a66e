"""Options of tasks whose rows are images."""

from typing import Any

from pydantic import Field, field_validator

from lora_ft.media import ImageAugment

from ._base import Options


class ImageOptions(Options):
    """How images are prepared."""

    image_size: tuple[int, int] | int | None = Field(
        None,
        description="Height and width in pixels that every image is resized to (one number: both); default: what the "
        "model's processor says.",
    )
    augment: ImageAugment = Field(
        default_factory=ImageAugment, description="How training images are changed, each epoch anew."
    )

    @field_validator("image_size", mode="after")
    @classmethod
    def _above_zero(cls, value: Any) -> Any:
        sides = value if isinstance(value, tuple) else (value,)
        if value is not None and min(sides) < 1:
            raise ValueError("must be above 0")
        return value

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), or None."""
        if self.image_size is None or isinstance(self.image_size, tuple):
            return self.image_size
        return (self.image_size, self.image_size)
