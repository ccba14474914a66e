"""Long rows must not reach beyond the last position that a model has."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_ft.models.lengths import check_lengths
from tests.words import BERT, word_tokenizer

SMALL = {"vocab_size": 66, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PLACES = {"max_position_embeddings": 66}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 66}  # fmt: skip
T5 = {"vocab_size": 66, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def reads(model, length: int) -> bool:
    """Whether a forward pass over a row of real tokens of this length works."""
    ids = torch.full((1, length), 5)
    ids[0, -1] = model.config.eos_token_id or 5
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (RobertaForSequenceClassification, RobertaConfig(**SMALL, **PLACES, pad_token_id=1)),
        (RobertaForSequenceClassification, RobertaConfig(**SMALL, **PLACES, pad_token_id=3)),
        (MPNetForSequenceClassification, MPNetConfig(**SMALL, **PLACES)),
        (BertForSequenceClassification, BertConfig(**SMALL, **PLACES)),
        (BartForSequenceClassification, BartConfig(**BART, **PLACES, pad_token_id=1)),
    ],
)
def test_the_longest_row_runs_and_a_longer_one_would_crash(kind, config):
    with torch.device("meta"):
        limit = check_lengths(kind(config), 512, None)
    model = kind(config).eval()
    assert reads(model, limit)
    assert not reads(model, limit + 1)


@pytest.mark.parametrize(
    ("model", "told", "found"),
    [
        (BertForSequenceClassification(BertConfig(**SMALL, **PLACES)), 32, 32),  # trained on less than it has room for
        (BertForSequenceClassification(BertConfig(**SMALL, **PLACES)), int(1e30), 66),
        (LlamaForCausalLM(LlamaConfig(**SMALL, **PLACES)), 80, 66),
        (T5ForConditionalGeneration(T5Config(**T5)), 32, 40),  # without numbered positions there is no end
    ],
)
def test_the_tokenizer_may_know_of_a_lower_limit(model, told, found):
    tokenizer = word_tokenizer("a b", BERT)
    tokenizer.model_max_length = told
    wanted = 40 if found == 40 else 512
    assert check_lengths(model, wanted, tokenizer) == found
    assert check_lengths(model, wanted, SimpleNamespace(tokenizer=tokenizer)) == found
    assert check_lengths(model, 8, tokenizer) == 8
