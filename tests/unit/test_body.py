"""What a model for one task leaves out of a pretrained body is not lost for the next task."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from lora_ft.models.body import keep_body
from tests.conftest import tiny_llama


@pytest.mark.parametrize("kind", [BertModel, BertForPreTraining])
def test_a_pooler_is_kept_and_no_head(tmp_path, kind):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    pretrained = kind(config)
    pretrained.save_pretrained(tmp_path / "base")
    masked = BertForMaskedLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        masked.bert.embeddings.word_embeddings.weight += 1
    masked.save_pretrained(tmp_path / "masked")
    before = load_file(tmp_path / "masked/model.safetensors")
    assert keep_body(str(tmp_path / "base"), tmp_path / "masked") == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
    ]
    after = load_file(tmp_path / "masked/model.safetensors")
    assert len(after) == len(before) + 2
    assert all(torch.equal(after[k], v) for k, v in before.items())
    body = pretrained if kind is BertModel else pretrained.bert
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked").bert
    assert torch.equal(found.pooler.dense.weight, body.pooler.dense.weight)
    assert torch.equal(found.embeddings.word_embeddings.weight, masked.bert.embeddings.word_embeddings.weight)
    assert keep_body(str(tmp_path / "base"), tmp_path / "masked") == []
    assert (
        BertForMaskedLM.from_pretrained(tmp_path / "masked").cls.predictions.decoder.weight.mean() > 0.9
    )  # still tied


def test_a_whole_model_stays_as_it_is(tmp_path):
    tiny_llama(300).save_pretrained(tmp_path / "base")
    tiny_llama(300, seed=1).save_pretrained(tmp_path / "merged")
    before = (tmp_path / "merged/model.safetensors").read_bytes()
    assert keep_body(str(tmp_path / "base"), tmp_path / "merged") == []
    assert (tmp_path / "merged/model.safetensors").read_bytes() == before
