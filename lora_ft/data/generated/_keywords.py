"""Six made-up spoken words: syllables of a hiss and a vowel with formants, by voices of different pitch, in noise."""

from pathlib import Path

import numpy as np

from ._sounds import Signal, envelope, hiss, write_wav

RATE = 16_000
SECONDS = 0.6
# The first two formants of a vowel, in hertz (Peterson and Barney 1952, men).
VOWELS = {"a": (730, 1090), "i": (270, 2290), "u": (300, 870), "e": (530, 1840), "o": (570, 840)}
WORDS = {"sa": "a", "ki": "i", "tutu": "uu", "meno": "eo", "nomi": "oi", "baba": "aa"}
WIDTH_HZ = 90.0  # of a formant's resonance


def write_keywords(folder: Path, seed: int, each: int) -> None:
    """`each` recordings of every word, in one folder per word."""
    for number, (word, vowels) in enumerate(WORDS.items()):
        for take in range(each):
            rng = np.random.default_rng([seed, number, take])
            write_wav(folder / word / f"{take:03}.wav", _spoken(vowels, rng), RATE)


def _spoken(vowels: str, rng: np.random.Generator) -> Signal:
    """One take: another voice, speed, loudness and place each time."""
    whole = int(SECONDS * RATE)
    pitch, tract = rng.uniform(90, 220), rng.uniform(0.9, 1.15)
    length = int(rng.uniform(0.8, 1.0) * 0.4 * RATE / len(vowels))
    word = np.concatenate([_syllable(v, length, pitch * rng.uniform(0.95, 1.05), tract, rng) for v in vowels])
    signal = 0.01 * hiss(whole, rng)
    start = int(rng.integers(0, whole - len(word)))
    signal[start : start + len(word)] += rng.uniform(0.3, 0.8) * word
    return signal


def _syllable(vowel: str, samples: int, pitch: float, tract: float, rng: np.random.Generator) -> Signal:
    """A short hiss, and harmonics of the pitch as loud as the vowel's formants let them through."""
    burst = int(0.03 * RATE)
    time = np.arange(samples - burst) / RATE
    voiced = np.zeros(samples - burst)
    for harmonic in np.arange(1, int(4000 / pitch) + 1) * pitch:
        gain = sum(1 / (1 + ((harmonic - f * tract) / WIDTH_HZ) ** 2) for f in VOWELS[vowel])
        voiced += gain * np.sin(2 * np.pi * harmonic * time)
    voiced *= envelope(len(voiced), RATE) / np.abs(voiced).max()
    return np.concatenate([0.2 * hiss(burst, rng) * envelope(burst, RATE), voiced])
