"""builtin:tiny-whisper."""

import math
from pathlib import Path

from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ._write import write

VERSION = "1"
DESCRIPTION = "A Whisper with 0.5 M RANDOM weights that hears 2 seconds at a time, to try recipes; knows nothing."
WIDTH = 96
SECONDS = 2
END, START = "<|endoftext|>", "<|startoftranscript|>"
TASKS = ("<|translate|>", "<|transcribe|>")
MARKS = ("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")


def tokenizer() -> WhisperTokenizer:
    """One token for each byte, and Whisper's special tokens in Whisper's order."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = WhisperTokenizer(vocab={**letters, END: len(letters)}, merges=[], pad_token=END)
    languages = [f"<|{code}|>" for code in LANGUAGES]
    made.add_special_tokens({"additional_special_tokens": [START, *languages, *TASKS, *MARKS]})
    made.set_prefix_tokens()
    return made


def build(folder: Path) -> None:
    """Two layers of width 96 on either side."""
    words = tokenizer()
    extractor = WhisperFeatureExtractor(chunk_length=SECONDS)  # type: ignore[no-untyped-call]
    vocabulary = words.get_vocab()
    end, start = vocabulary[END], vocabulary[START]
    config = WhisperConfig(
        vocab_size=len(words), d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=2 * WIDTH, decoder_ffn_dim=2 * WIDTH,
        max_source_positions=SECONDS * 50, classifier_proj_size=WIDTH, decoder_start_token_id=start,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config = _generation(words, start, end)

    def spread(name: str, weight: nn.Parameter) -> float:
        """Small embeddings, since the vocabulary head is the same matrix; linear layers keep a signal's size."""
        return 0.05 if "embed" in name else math.sqrt(1.0 / weight[0].numel())

    write(model, folder, WhisperProcessor(extractor, words), spread)  # type: ignore[no-untyped-call]


def _generation(words: WhisperTokenizer, start: int, end: int) -> GenerationConfig:
    """What `generate` of the original asks for: languages and tasks by their tokens."""
    return GenerationConfig(
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end, max_length=448,
        is_multilingual=True, return_timestamps=False,
        lang_to_id={f"<|{code}|>": words.convert_tokens_to_ids(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={t.strip("<|>"): words.convert_tokens_to_ids(t) for t in TASKS},
        no_timestamps_token_id=words.convert_tokens_to_ids("<|notimestamps|>"),
    )  # type: ignore[no-untyped-call]  # fmt: skip
