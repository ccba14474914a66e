"""Images and sounds of rows: found, checked and read; the same from a file, from bytes and from an array."""

from . import cache
from ._ref import Media, find_media
from .cache import Cache
from .image_augment import ImageAugment
from .images import image_size, read_image, read_mask, write_mask
from .sound_augment import SoundAugment
from .sounds import read_sound, sound_info

__all__ = [
    "Cache", "ImageAugment", "Media", "SoundAugment", "cache", "find_media", "image_size", "read_image", "read_mask",
    "read_sound", "sound_info",
    "write_mask",
]  # fmt: skip
