"""Heads and embeddings that share a weight, or do not: merged models that answered nonsense or could not be written."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import lora_ft
from lora_ft.errors import UsageError
from tests.unit.test_tasks_seq2seq import tiny_t5
from tests.words import T5, word_tokenizer

WORDS = "count one two three red blue"


EMBEDDING = {"type": "lora", "r": 4, "modules_to_save": ["embed_tokens"]}


@pytest.mark.parametrize(
    ("method", "kept", "tied"), [("head", True, False), ("full", False, True), (EMBEDDING, False, False)],
    ids=["head", "full", "embedding"],
)  # fmt: skip
def test_one_end_trained_on_a_tied_model_is_merged_and_exported(recipe, base_folder, tmp_path, method, kept, tied):
    """What was trained was once written over the other end as well, and nothing could be published."""
    run = lora_ft.train({**recipe, "method": method}, out=tmp_path / "run")
    figures = lora_ft.merge(run, tmp_path / "merged", dtype="float32")
    assert figures["max_difference"] < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    old = AutoModelForCausalLM.from_pretrained(base_folder).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, old) == kept
    assert merged.config.tie_word_embeddings == tied
    lora_ft.export(run, tmp_path / "gguf", format_name="gguf", dtype="float32")
    with pytest.raises(UsageError, match="replaced as a whole"):
        lora_ft.unmerge(tmp_path / "merged", run, tmp_path / "back")


@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_base_whose_config_ties_what_its_files_hold_apart_is_merged(recipe, tmp_path, method):
    """T5 1.1 and Flan-T5: the config says tied, the files have a head of its own."""
    tokenizer = word_tokenizer(WORDS, T5)
    model = tiny_t5(len(tokenizer))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"source": f"count {a} {b}", "target": b} for a in ("one", "two", "three") for b in ("red", "blue")] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe |= {"model": str(tmp_path / "base"), "task": "seq2seq-lm", "method": method}
    recipe["data"] = {"train": str(tmp_path / "rows.jsonl"), "eval": "25%"}
    run = lora_ft.train(recipe, out=tmp_path / "run")
    lora_ft.merge(run, tmp_path / "merged", dtype="float32")
    batch = AutoTokenizer.from_pretrained(tmp_path / "base")(["count one red"], return_tensors="pt")
    batch["decoder_input_ids"] = torch.tensor([[1, 5]])
    inputs = {k: v for k, v in batch.items() if k != "token_type_ids"}
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, lora_ft.load(run).model(**inputs).logits, atol=1e-4)


def test_new_tokens_cannot_be_taken_out_of_a_merged_model(recipe, tmp_path):
    """Their rows were once computed from a base without numbers, and unmerging crashed with NaN."""
    recipe["data"]["add_tokens"] = ["<tool>"]
    run = lora_ft.train(recipe, out=tmp_path / "run")
    lora_ft.merge(run, tmp_path / "merged")
    with pytest.raises(UsageError, match="rows of tokens"):
        lora_ft.unmerge(tmp_path / "merged", run, tmp_path / "back")
