"""Signals that are made of formulas, and how they become files."""

import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Signal = NDArray[np.float64]
FULL_SCALE = 32767
EDGE_S = 0.01  # a sound fades in and out, so that its borders do not click


def envelope(samples: int, rate: int) -> Signal:
    """Ones with a linear fade of 10 ms at either end."""
    edge = min(int(EDGE_S * rate), samples // 2)
    shape = np.ones(samples)
    shape[:edge] = np.arange(edge) / edge
    shape[samples - edge :] = shape[:edge][::-1]
    return shape


def tone(hertz: float, samples: int, rate: int) -> Signal:
    """A sine."""
    return np.asarray(envelope(samples, rate) * np.sin(2 * np.pi * hertz / rate * np.arange(samples)))


def hiss(samples: int, rng: np.random.Generator) -> Signal:
    """White noise from -1 to 1."""
    return rng.uniform(-1.0, 1.0, samples)


def write_wav(path: Path, signal: Signal, rate: int) -> None:
    """16-bit mono."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(np.clip(signal, -1, 1) * FULL_SCALE).astype("<i2").tobytes())
