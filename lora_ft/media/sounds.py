"""Sound: mono, 32-bit floats, at the rate that a model wants."""

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft.errors import UsageError

from ._ref import Media
from ._whole import check_whole

HARD_SECONDS = 3600.0  # never decoded, whatever a recipe says
UNKNOWN = 2**40  # frames from here on mean that the file's header does not say how many there are
RATES = (1_000, 768_000)  # Hz
CHANNELS = 64
LOUDEST = 16.0  # 24 dB over full scale; above it the numbers are not in [-1, 1] at all
Sound = NDArray[np.float32]


def sound_info(media: Media) -> tuple[float, int]:
    """(seconds, rate in Hz), from the header alone.

    Raises:
        ValueError: it is no sound, has no frames, or no rate.
    """
    if isinstance(media.content, np.ndarray):
        rate = _checked_rate(media, media.rate)
        return _channels(media).shape[1] / rate, rate
    with _opened(media) as file:
        return _length(media, file) / file.samplerate, file.samplerate


def read_sound(media: Media, rate: int, max_seconds: float | None = None, resample: bool = True) -> Sound:
    """The sound (frames,) in [-1, 1]: the mean of its channels. What is a little louder is clipped.

    Args:
        media: which.
        rate: wanted, in Hz.
        max_seconds: what is beyond is not read.
        resample: whether another rate is changed to the wanted one.

    Raises:
        ValueError: corrupt, empty, not finite, longer than an hour, or of another rate with `resample` off.
    """
    if isinstance(media.content, np.ndarray):
        own, found = _checked_rate(media, media.rate), _channels(media)
        _check_rates(media, own, rate, resample)
        found = _floats(media, found[:, : _frames_wanted(media, own, found.shape[1], max_seconds)])
    else:
        with _opened(media) as file:
            own = file.samplerate
            _check_rates(media, own, rate, resample)
            found = _decoded(media, file, _frames_wanted(media, own, _length(media, file), max_seconds))
    sound = _mono(media, found)
    if own != rate:
        sound = _resampled(media, sound, own, rate)
    return np.ascontiguousarray(sound.clip(-1, 1), dtype=np.float32)


def _frames_wanted(media: Media, own: int, frames: int, max_seconds: float | None) -> int:
    seconds, limit = frames / own, float("inf") if max_seconds is None else max_seconds
    if seconds > HARD_SECONDS and limit > HARD_SECONDS:
        raise ValueError(f"{media.shown}: {seconds:.0f} s of sound, allowed {HARD_SECONDS:.0f} s; cut it into parts")
    return frames if seconds <= limit else int(limit * own)


def _length(media: Media, file: Any) -> int:
    """Frames of an opened file."""
    frames = int(file.frames)
    if not frames:
        raise ValueError(f"{media.shown}: the sound is empty (0 frames); take the row out")
    if frames >= UNKNOWN:
        raise ValueError(
            f"{media.shown}: the header does not say how long the sound is, as of a file that was written to a pipe; "
            "write it anew to a file"
        )
    return frames


def _decoded(media: Media, file: Any, frames: int) -> NDArray[np.float32]:
    """(channels, frames) from the start of a file."""
    try:
        found = file.read(frames=frames, dtype="float32", always_2d=True)
    except Exception as error:  # soundfile's own errors are RuntimeErrors of several kinds
        raise ValueError(f"{media.shown}: a damaged sound: {error}; make the file anew, or take the row out") from error
    if len(found) < frames:
        raise ValueError(f"{media.shown}: a truncated sound: {len(found):,} of {frames:,} frames can be read")
    return np.asarray(found.T)


class _Memory(io.BytesIO):
    """Bytes as a file is: asked for a place before its start, it stays; an exception would end in C, on the screen."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The place after it."""
        with contextlib.suppress(ValueError):
            super().seek(offset, whence)
        return self.tell()


@contextmanager
def _opened(media: Media) -> Iterator[Any]:
    try:
        import soundfile
    except ImportError as error:
        raise UsageError("sounds need the package soundfile", fix="pip install 'lora-ft[audio]'") from error
    with media.open() as data:
        start = data.read(16)
        check_whole(media, data)
        source: Any = _Memory(media.content or b"")
        if media.path:  # by its number, so that no meaning is read into its name
            source = data.fileno()
            os.lseek(source, 0, os.SEEK_SET)
        try:
            file = soundfile.SoundFile(source, closefd=False)
        except Exception as error:  # soundfile raises RuntimeErrors of several kinds
            raise ValueError(
                f"{media.shown}: no sound that can be read (starts with {start[:8]!r}); "
                "allowed: WAV, FLAC, OGG, Opus, MP3, AIFF, AU, CAF"
            ) from error
        with file:
            _checked_rate(media, file.samplerate)
            yield file


def _channels(media: Media) -> NDArray[Any]:
    """(channels, frames): a view of an array of sound."""
    array = media.content
    if array.ndim == 1:
        array = array[None]
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        array = array.T
    if array.ndim != 2 or len(array) > CHANNELS:
        raise ValueError(
            f"a sound has the shape (frames,), (channels, frames) or (frames, channels), got {media.content.shape}"
        )
    return np.asarray(array)


def _floats(media: Media, array: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers in [-1, 1]; integers of 8, 16 and 32 bits are those of PCM files."""
    kind, bits = array.dtype.kind, array.dtype.itemsize * 8
    if kind == "f":
        with np.errstate(over="ignore"):  # what is too large for 32 bits becomes infinite and is refused
            return array.astype(np.float32)
    if kind == "u" and bits == 8:
        return np.asarray((array.astype(np.float32) - 128) / 128, dtype=np.float32)
    if kind == "i" and bits <= 32:
        return np.asarray(array / 2.0 ** (bits - 1), dtype=np.float32)
    if kind == "i" and np.abs(array).max() <= 1:
        return array.astype(np.float32)
    raise ValueError(
        f"{media.shown}: a sound of {array.dtype} has no known loudest value; allowed: floats in [-1, 1], int16, "
        "int32, uint8"
    )


def _mono(media: Media, found: NDArray[np.float32]) -> Sound:
    if not np.isfinite(found).all():
        raise ValueError(f"{media.shown}: the sound holds NaN or infinity; make the file anew, or take the row out")
    top = float(np.abs(found).max(initial=0))
    if top > LOUDEST:
        raise ValueError(
            f"{media.shown}: the sound holds numbers up to {top:g}; allowed: floats in [-1, 1]; divide them by what "
            "stands for full loudness, such as 32768"
        )
    return np.asarray(found.mean(0, dtype=np.float32))


def _checked_rate(media: Media, rate: int) -> int:
    if not rate:
        raise ValueError(f"{media.shown}: an array of sound without its sampling_rate")
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{media.shown}: a rate of {rate:,} Hz, allowed {RATES[0]:,} to {RATES[1]:,}")
    return rate


def _check_rates(media: Media, own: int, rate: int, resample: bool) -> None:
    if own != rate and not resample:
        raise ValueError(
            f"{media.shown}: sound at {own:,} Hz, the model wants {rate:,} Hz; resample it, or data.resample=true"
        )


def _resampled(media: Media, sound: Sound, own: int, rate: int) -> Sound:
    try:
        import soxr
    except ImportError as error:
        raise UsageError("resampling sound needs the package soxr", fix="pip install 'lora-ft[audio]'") from error
    found = np.asarray(soxr.resample(sound, own, rate), dtype=np.float32)
    if not len(found):
        raise ValueError(f"{media.shown}: the sound is empty at {rate:,} Hz ({len(sound)} frames at {own:,} Hz)")
    return found
