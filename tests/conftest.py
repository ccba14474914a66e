"""Tiny seeded models and tokenizers, made here; no network."""

import json
import os
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import CHATML, tiny_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with the ChatML template."""
    return tiny_tokenizer(CHATML)


def tiny_llama(vocabulary: int, seed: int = 0, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny Llama with tokenizer, as a folder that Transformers loads."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """48 short questions with answers, of different lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"say {'please ' * (i % 5)}{i}", "completion": json.dumps({"n": i % 4, "word": "ab" * (i % 3)})}
        for i in range(48)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def recipe(base_folder, rows_file) -> dict:
    """A recipe that trains in a second."""
    return {
        "model": str(base_folder),
        "data": {"train": str(rows_file), "eval": "25%", "max_length": 128},
        "method": {"type": "lora", "r": 4},
        "train": {"steps": 6, "batch_size": 8, "learning_rate": 5e-3, "dtype": "float32"},
        "eval": {"generate": 4, "max_new_tokens": 8},
    }
