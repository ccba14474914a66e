"""Augmentation of sounds and of their features: functions of the input, the options and one random generator."""

from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from ._options import Augment, Share

Rng = np.random.Generator
Range = tuple[float, float]
Count = Annotated[int, Field(ge=0)]


class SoundAugment(Augment):
    """How training sounds are changed, each epoch anew."""

    noise: Share = Field(0.0, description="Probability of added white noise.")
    noise_snr_db: Range = Field((5.0, 30.0), description="[least, most] ratio of signal to noise, in dB.")
    gain_db: Range | None = Field(None, description="[least, most] change of loudness in dB, such as [-6, 6].")
    shift: Share = Field(0.0, description="Most share of its length by which a sound is shifted; silence fills up.")
    time_mask: tuple[Count, Share] | None = Field(
        None, description="[number, longest share of the sound] of stretches that are set to the mean."
    )
    frequency_mask: tuple[Count, Count] | None = Field(
        None, description="[number, most bins] of bands of the spectrogram that are set to the mean (SpecAugment)."
    )

    @field_validator("noise_snr_db", "gain_db")
    @classmethod
    def _in_order(cls, value: Range | None) -> Range | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("the first number is larger than the second")
        return value


def augment_sound(sound: Any, options: SoundAugment, rng: Rng) -> Any:
    """The sound (frames,), changed; as long as before."""
    sound = np.array(sound, dtype=np.float32)
    if options.shift:
        by = round(float(rng.uniform(-options.shift, options.shift)) * len(sound))
        moved = np.zeros_like(sound)
        moved[max(0, by) : len(sound) + min(0, by)] = sound[max(0, -by) : len(sound) - max(0, by)]
        sound = moved
    if options.gain_db is not None:
        sound *= np.float32(10 ** (float(rng.uniform(*options.gain_db)) / 20))
    if rng.random() < options.noise:
        power = float(np.mean(sound.astype(np.float64) ** 2))
        level = np.sqrt(power / 10 ** (float(rng.uniform(*options.noise_snr_db)) / 10))
        sound += (level * rng.standard_normal(len(sound))).astype(np.float32)
    return sound


def mask_features(features: Any, options: SoundAugment, rng: Rng) -> Any:
    """Features (time, bands) with stretches and bands set to their mean.

    SpecAugment without warping (Park et al. 2019, arXiv:1904.08779).
    """
    out = np.array(features)
    mean = out.mean()
    times, share = options.time_mask or (0, 0.0)
    bands, bins = options.frequency_mask or (0, 0)
    for axis, number, widest in ((0, times, int(out.shape[0] * share)), (1, bands, min(bins, out.shape[1]))):
        length = out.shape[axis]
        for _ in range(number):
            width = int(rng.integers(0, widest + 1))
            start = int(rng.integers(0, length - width + 1))
            out[(slice(None),) * axis + (slice(start, start + width),)] = mean
    return out
