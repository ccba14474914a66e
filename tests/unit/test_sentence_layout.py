"""A merged encoder of sentences tells sentence-transformers its pooling, its scaling and its prefixes."""

import json

import pytest

from lora_ft.exports._sentence import write_sentence_layout
from lora_ft.tasks.sentence_embedding import EmbeddingOptions


@pytest.mark.parametrize(("pooling", "key"), [("mean", "mean_tokens"), ("cls", "cls_token"), ("last", "lasttoken")])
@pytest.mark.parametrize("normalize", [True, False])
def test_each_pooling_is_named_once_and_each_module_has_its_folder(tmp_path, pooling, key, normalize):
    write_sentence_layout(tmp_path, EmbeddingOptions(pooling=pooling, normalize=normalize, query_prefix="q: "), 16)
    modules = json.loads((tmp_path / "modules.json").read_text())
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    assert kinds == ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    assert all((tmp_path / m["path"]).is_dir() for m in modules)
    said = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert [k for k, v in said.items() if v is True and k.startswith("pooling")] == [f"pooling_mode_{key}"]
    assert said["word_embedding_dimension"] == 16
    about = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert about["prompts"] == {"query": "q: ", "document": ""}
