"""Tones that spell words, for a model that writes."""

from tests.cases.speech_recognition_ctc import WORDS, _files
from tests.task_cases import Case, without

CASE = Case(
    row=lambda i: {"audio": f"{i}.wav", "text": WORDS[i % 3]}, unlabelled=without("text"),
    bad={"audio": "gone.wav", "text": "go"},
    metrics=frozenset({"loss", "token_accuracy", "perplexity", "wer", "cer", "exact_match"}),
    model="builtin:tiny-whisper", options={"language": "en"}, files=_files,
    methods={"lora": {"r": 4}, "houlsby": {"r": 4}, "full": {}},
)  # fmt: skip
