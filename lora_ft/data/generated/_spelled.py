"""Texts that are spelled in tones: every letter has one, a space is silence."""

import json
from pathlib import Path

import numpy as np

from ._sounds import Signal, hiss, tone, write_wav

RATE = 8_000  # so that every run with these resamples
LETTERS = "abdeinot"
LETTER_S, PAUSE_S, SPACE_S = 0.06, 0.02, 0.08
LOWEST_HZ, STEP = 350.0, 1.25  # each letter is a major third above the one before


def write_spelled(folder: Path, seed: int, rows: int) -> None:
    """Sounds, and metadata.jsonl with the columns audio and text."""
    lines = []
    for row in range(rows):
        rng = np.random.default_rng([seed, row])
        text = " ".join(_word(rng) for _ in range(rng.integers(1, 3)))
        name = f"{row:04}.wav"
        write_wav(folder / name, spell(text, rng), RATE)
        lines.append(json.dumps({"audio": name, "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def spell(text: str, rng: np.random.Generator) -> Signal:
    """The tones of a text in quiet noise, a little faster or slower and higher or lower each time."""
    speed, height, loud = rng.uniform(0.9, 1.1), rng.uniform(0.97, 1.03), rng.uniform(0.3, 0.8)
    parts = [np.zeros(int(0.05 * RATE))]
    for letter in text:
        if letter == " ":
            parts.append(np.zeros(int(SPACE_S * speed * RATE)))
            continue
        hertz = LOWEST_HZ * STEP ** LETTERS.index(letter) * height
        parts += [loud * tone(hertz, int(LETTER_S * speed * RATE), RATE), np.zeros(int(PAUSE_S * speed * RATE))]
    signal = np.concatenate([*parts, parts[0]])
    return signal + 0.01 * hiss(len(signal), rng)


def _word(rng: np.random.Generator) -> str:
    return "".join(LETTERS[i] for i in rng.integers(0, len(LETTERS), rng.integers(2, 5)))
