"""An artifact is uploaded only when asked for, whole, and a hub that refuses leaves the folder as it is."""

from functools import partial
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from lora_ft.errors import ResourceError, UsageError
from lora_ft.exports import check_repository, push
from lora_ft.recipe import load_recipe
from lora_ft.report import model_card


@pytest.mark.parametrize("name", ["me", "me/a/b", "me/", "../x/y", "me/na me", "/me/x"])
def test_what_is_no_repository_is_refused_before_anything_is_done(name):
    with pytest.raises(UsageError, match="no repository"):
        check_repository(name)


def test_a_push_without_a_login_is_refused_before_anything_is_done(monkeypatch):
    monkeypatch.setattr("lora_ft.exports.upload.get_token", lambda: None)
    with pytest.raises(UsageError, match="logged in"):
        check_repository("me/model")
    monkeypatch.setattr("lora_ft.exports.upload.get_token", lambda: "hf_x")
    check_repository("me/model")


def test_a_machine_without_a_network_says_where_the_artifact_is(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("lora_ft.exports.upload.HfApi", partial(HfApi, endpoint="http://localhost:9", token="hf_x"))
    with pytest.raises(ResourceError, match="could not be uploaded") as caught:
        push(tmp_path, "me/model", private=False)
    assert str(tmp_path) in caught.value.fix


def test_the_whole_folder_goes_up_in_one_commit(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append(("create", name, options))

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], options["folder_path"]))
            return SimpleNamespace(commit_url="https://example.org/commit")

    monkeypatch.setattr("lora_ft.exports.upload.HfApi", Api)
    assert push(tmp_path, "me/model", private=True) == "https://example.org/commit"
    assert calls[0] == ("create", "me/model", {"private": True, "exist_ok": True})
    assert calls[1] == ("upload", "me/model", tmp_path)


def test_a_hub_that_refuses_says_what_to_do(tmp_path, monkeypatch):
    class Api:
        def create_repo(self, name, **options):
            raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr("lora_ft.exports.upload.HfApi", Api)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ResourceError, match="could not be uploaded") as caught:
        push(tmp_path, "me/model", private=False)
    assert "hf auth login" in caught.value.fix
    assert (tmp_path / "model.safetensors").is_file()


def test_the_card_is_one_that_the_hub_reads(tmp_path):
    recipe = load_recipe(
        [{"model": "builtin:smollm2-135m-instruct", "data": {"train": f"{tmp_path}/rows.jsonl"}}]
    ).recipe
    facts = {
        "origin": {"hub_id": "org/base", "licence": "apache-2.0"}, "hub_task": "text-generation", "quant": "nf4",
        "dtype": "float32", "metrics": {"before": {"loss": 2.0}, "after": {"loss": 1.0}},
    }  # fmt: skip
    text = model_card(recipe, facts, merged=False, figures={"kl": 0.25, "layers": {}})
    head = ModelCard(text).data.to_dict()
    assert (head["license"], head["base_model"], head["library_name"]) == ("apache-2.0", "org/base", "peft")
    assert head["pipeline_tag"] == "text-generation"
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.0
    assert "| loss | 2.0000 | 1.0000 |" in text
    assert "licence: apache-2.0" in text
    assert "quantised: nf4" in text
    assert "on no other" not in text
    correcting = recipe.model_copy(update={"method": recipe.method.model_copy(update={"type": "loftq"})})
    assert "on no other" in model_card(correcting, facts, merged=False, figures={})
    assert str(tmp_path) not in text
    unknown = model_card(recipe, {}, merged=True, figures={}, form="gguf")
    assert "whose files do not name it" in unknown
    assert "format: gguf" in unknown
