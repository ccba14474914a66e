"""Sounds for a model: found and read at the model's rate, augmented, made into what the model takes, and answered."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.errors import UsageError
from lora_ft.media import Media, cache, find_media, read_sound, sound_info
from lora_ft.media.sound_augment import SoundAugment, augment_sound, mask_features
from lora_ft.records import Batch, EncodeOptions, Example, Sample

from ._base import Options, in_dtype_of
from ._decoder import plain_model
from ._draws import sample_rng

FRAME = 320  # samples for one position of wav2vec 2.0 and all that is built like it: 20 ms at 16 kHz
SHORTEST_S = 0.025  # what one position sees; less gives none
PROBE_S = 1.0
# Transformers' own masking and dropping of layers draw from the global random state, so a run could not be repeated;
# without mask_time_prob the model has no embedding for masked positions either, which many files on the hub lack.
QUIET = {
    "apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0,
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip


class SoundOptions(Options):
    """Options of all tasks whose samples are sounds."""

    augment: SoundAugment = Field(
        default_factory=SoundAugment,
        description="Noise, gain, shift and SpecAugment on the training sounds, another draw in each epoch.",
    )


@dataclass(frozen=True)
class Heard:
    """A row's sound, read once.

    Attributes:
        media: where it is.
        samples: that the model gets, at its rate.
        cut: whether it is longer, and the rest is left out.
        limit: longest allowed, in seconds.
        note: what was done to it, "" for nothing.
    """

    media: Media
    samples: int
    cut: bool
    limit: float
    note: str

    def inputs(self) -> dict[str, Any]:
        """Of a sample; `features` reads them."""
        found = {"audio": self.media, "samples": self.samples, "max_seconds": self.limit}
        return {**found, "cut": 1} if self.cut else found


def check_sounds(processor: Any, augment: SoundAugment) -> None:
    """Refuse a processor that takes no sound, or augmentation of a spectrogram that the model does not have."""
    extractor = extractor_of(processor)
    if not isinstance(getattr(extractor, "sampling_rate", None), int):
        raise UsageError(
            f"the model's processor ({type(processor).__name__}) takes no sound",
            fix="a model for sound, such as facebook/wav2vec2-base or openai/whisper-tiny",
        )
    if augment.frequency_mask is not None and _raw(extractor):
        raise UsageError(
            "task.augment.frequency_mask: this model hears the sound itself, so there is no spectrogram to mask",
            fix="time_mask and noise_snr_db work on the sound",
        )


def extractor_of(processor: Any) -> Any:
    """The part of a processor that takes sound."""
    return getattr(processor, "feature_extractor", processor)


def hear(example: Example, processor: Any, options: EncodeOptions) -> Heard:
    """The row's sound, read to its allowed end.

    Raises:
        ValueError: it cannot be read, or is too short for any model.
    """
    media = find_media(example.fields["audio"], "audio", example.root)
    rate = extractor_of(processor).sampling_rate
    limit = min(options.max_seconds, _window(processor))
    seconds, own = sound_info(media)
    sound = _read(media, rate, limit) if options.resample else read_sound(media, rate, limit, resample=False)
    if len(sound) < SHORTEST_S * rate:
        raise ValueError(f"{media.shown}: {seconds:.3f} s of sound, a model needs at least {SHORTEST_S} s")
    note = "" if own == rate else f"resampled from {own:,} Hz"
    return Heard(media, min(len(sound), round(limit * rate)), seconds > limit + 1 / own, limit, note)


def cost(processor: Any, samples: int) -> int:
    """Positions of the model for so many samples of sound."""
    window = getattr(extractor_of(processor), "nb_max_frames", None)
    return max(1, samples // FRAME) if window is None else int(window) // 2


def features(samples: Sequence[Sample], processor: Any, augment: SoundAugment, draw: int) -> Batch:
    """What the model's own feature extractor makes of the sounds, padded; attention_mask where it gives one.

    Args:
        samples: with the inputs of `Heard`.
        processor: or the feature extractor itself.
        augment: how training sounds are changed.
        draw: 0 for sounds as they are.
    """
    extractor = extractor_of(processor)
    changes = bool(draw) and augment.on
    sounds = [_augmented(s, extractor, augment, draw) if changes else _sound(s, extractor) for s in samples]
    known = inspect.signature(extractor.__call__).parameters
    padding = known["padding"].default if "padding" in known else None
    extra = {} if padding == "max_length" else {"padding": True, "return_attention_mask": True}  # Whisper's pads itself
    made = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt", **extra)
    batch: Batch = {k: v.long() if k == "attention_mask" else v.float() for k, v in made.items()}
    name = extractor.model_input_names[0]
    if changes and not _raw(extractor):
        pairs = zip(batch[name], samples, strict=True)
        batch[name] = torch.stack([_masked(x, s, extractor, augment, draw) for x, s in pairs])
    return batch


def short(sample: Sample, processor: Any) -> Sample:
    """The sample with the first second of its sound."""
    most = int(PROBE_S * extractor_of(processor).sampling_rate)
    return Sample({**sample.inputs, "samples": min(most, sample.inputs["samples"])}, sample.length, 0, sample.where)


def sound_answer(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The model's answer to a batch without labels, the same for each row whoever stands beside it.

    A model whose first convolution is normalised over time (wav2vec2-base, HuBERT base) sees padding, masked or not.
    Its rows are answered in groups of equal length, without any.
    """
    batch = in_dtype_of(model, dict(batch))
    mask = batch.get("attention_mask")
    grouped = getattr(plain_model(model).config, "feat_extract_norm", "") == "group"
    if not grouped or mask is None or bool(mask.all()):
        return model(**batch)
    lengths = mask.sum(-1).tolist()
    rows: list[Tensor] = [mask] * len(lengths)
    for length in sorted(set(lengths)):
        chosen = [i for i, n in enumerate(lengths) if n == length]
        logits = model(input_values=batch["input_values"][chosen, :length]).logits
        for i, row in zip(chosen, logits, strict=True):
            rows[i] = row
    return SimpleNamespace(logits=torch.stack(rows) if rows[0].dim() == 1 else nn.utils.rnn.pad_sequence(rows, True))


def _window(processor: Any) -> float:
    """Seconds that the model hears at once; infinite where only memory is the limit."""
    extractor = extractor_of(processor)
    if hasattr(extractor, "n_samples"):  # Whisper
        return float(extractor.n_samples / extractor.sampling_rate)
    frames = getattr(extractor, "max_length", None)  # of the audio spectrogram transformer, 10 ms each
    return frames * 0.01 if isinstance(frames, int) else math.inf


def _raw(extractor: Any) -> bool:
    """Whether the model gets the sound itself and no spectrogram."""
    return extractor.model_input_names[0] == "input_values" and not hasattr(extractor, "num_mel_bins")


def _read(media: Media, rate: int, limit: float) -> Any:
    return cache.shared().through(f"{media.key}-{rate}-{limit:g}", lambda: read_sound(media, rate, limit))


def _sound(sample: Sample, extractor: Any) -> Any:
    """(samples,) as the feature extractor takes it."""
    found = sample.inputs
    return _read(found["audio"], extractor.sampling_rate, found["max_seconds"])[: found["samples"]]


def _augmented(sample: Sample, extractor: Any, augment: SoundAugment, draw: int) -> Any:
    """The same, changed as this draw has it; a sound that is heard as it is has its masks here."""
    sound = augment_sound(_sound(sample, extractor), augment, sample_rng(sample, draw, "sound"))
    if not _raw(extractor):
        return sound
    return mask_features(sound[:, None], augment, sample_rng(sample, draw, "mask"))[:, 0]


def _masked(spectrogram: Tensor, sample: Sample, extractor: Any, augment: SoundAugment, draw: int) -> Tensor:
    """The spectrogram with SpecAugment on the part that is no padding."""
    across = hasattr(extractor, "nb_max_frames")  # Whisper's has its frames in the second dimension
    rows = spectrogram.T if across else spectrogram
    real = -(-sample.inputs["samples"] // getattr(extractor, "hop_length", extractor.sampling_rate // 100))
    found = rows.clone()
    masked = mask_features(rows[:real].numpy(), augment, sample_rng(sample, draw, "mask"))
    found[:real] = torch.from_numpy(masked)
    return found.T.contiguous() if across else found
