"""Tones that spell words, by the letter."""

from tests.task_cases import Case, without
from tests.tiny_sounds import write_tone

WORDS = ("go", "stop", "no")


def _files(folder):
    for i in range(36):
        write_tone(folder / f"{i}.wav", (300, 800, 1900)[i % 3], 0.2 + 0.05 * (i % 4))


CASE = Case(
    row=lambda i: {"audio": f"{i}.wav", "text": WORDS[i % 3]}, unlabelled=without("text"),
    bad={"audio": "0.wav", "text": "a text of so many letters that no sound is long enough for it"},
    metrics=frozenset({"loss", "wer", "cer", "exact_match"}), model="builtin:tiny-wav2vec2", files=_files,
)  # fmt: skip
