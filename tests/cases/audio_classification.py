"""Tones of three heights."""

from tests.task_cases import Case, without
from tests.tiny_sounds import write_tone

NAMES = ("low", "middle", "high")
HERTZ = (300, 800, 1900)


def _files(folder):
    for i in range(36):
        write_tone(folder / f"{i}.wav", HERTZ[i % 3] * (1 + i / 400), 0.15 + 0.05 * (i % 4))


CASE = Case(
    row=lambda i: {"audio": f"{i}.wav", "label": NAMES[i % 3]}, unlabelled=without("label"),
    bad={"audio": "gone.wav", "label": "low"},
    metrics=frozenset({"loss", "accuracy", "f1_macro", "f1_micro", "precision_macro", "recall_macro"}),
    model="builtin:tiny-wav2vec2", files=_files,
)  # fmt: skip
