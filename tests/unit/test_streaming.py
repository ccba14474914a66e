"""A merge that reads one layer at a time is PEFT's own merge, and a model that is filled part by part answers alike."""

import copy
import json
import threading
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_ft.errors import ArtifactError
from lora_ft.exports import behind
from lora_ft.exports.shards import write_shards
from lora_ft.models.opening import BaseSpec
from lora_ft.models.streaming import NotStreamable, SavedWeights, hollow_base, read_streamed
from lora_ft_adapters import (
    AdapterError,
    UnmergeableError,
    add_adapter,
    build_config,
    load_adapter,
    merge,
    save_adapter,
)
from lora_ft_adapters.hollow import Hollow, lend
from lora_ft_adapters.streaming import MergedWeights, kept
from lora_ft_adapters.weights import StateWeights, TensorFolder

IDS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24, 25, 26]])}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
KINDS = {
    "llama": ("CausalLM", "Llama", SMALL | {"tie_word_embeddings": False}, IDS),
    "tied": ("CausalLM", "Llama", SMALL | {"tie_word_embeddings": True}, IDS),
    "gpt2": ("CausalLM", "GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}, IDS),
    "bert": ("SequenceClassification", "Bert", SMALL, IDS),
    "t5": (
        "Seq2SeqLM", "T5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
        {**IDS, "decoder_input_ids": IDS["input_ids"]},
    ),
    "vit": (
        "ImageClassification", "ViT", {**SMALL, "image_size": 16, "patch_size": 8},
        {"pixel_values": torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16)},
    ),
}  # fmt: skip
MERGEABLE = [
    ("lora", {"init_lora_weights": False}), ("dora", {}), ("vera", {}), ("oft", {}), ("loha", {}), ("ia3", {}),
    ("lokr", {}), ("pissa", {}), ("full", {}), ("layers", {}), ("ln_tuning", {}), ("hira", {}), ("randlora", {}),
    ("lora", {"modules_to_save": ["lm_head"]}), ("lora", {"trainable_token_indices": [1, 2]}),
]  # fmt: skip


def made(kind, tmp_path, method="lora", options=None):
    """(folder, auto class, model in memory with a random adapter, folder of the adapter, inputs)."""
    auto, name, config, inputs = KINDS[kind]
    torch.manual_seed(0)
    auto = f"AutoModelFor{auto}"
    extra = {"decoder_start_token_id": 0} if kind == "t5" else {}
    real = getattr(transformers, auto).from_config(getattr(transformers, f"{name}Config")(**config, **extra))
    real.save_pretrained(tmp_path / "base")
    base = getattr(transformers, auto).from_pretrained(tmp_path / "base").eval()
    options = {"init_lora_weights": False} if options is None else options
    peft_type = "CAUSAL_LM" if auto == "AutoModelForCausalLM" else None
    model = add_adapter(copy.deepcopy(base), build_config(method, options, peft_type, base)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", auto, base, tmp_path / "adapter", inputs


def check(kind, tmp_path, method="lora", options=None):
    folder, auto, base, adapter, inputs = made(kind, tmp_path, method, options)
    model, weights = hollow_base(BaseSpec(str(folder), auto))
    assert all(isinstance(p, Hollow) for p in model.parameters())
    hollow = load_adapter(model, adapter)
    found = MergedWeights(hollow, weights)
    tensors = dict(found)
    in_memory = load_adapter(copy.deepcopy(base), adapter)
    with torch.no_grad():
        wanted = in_memory(**inputs)[0]
    reference = merge(in_memory).state_dict()
    assert {n for n in tensors if n not in reference} == set()
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, reference[name], atol=1e-6), name
        assert found.shape(name) == tuple(tensor.shape)
    lend(hollow, weights, torch.float32)
    with torch.no_grad():
        assert torch.allclose(hollow(**inputs)[0], wanted, atol=1e-5)
    target = tmp_path / "merged"
    target.mkdir()
    write_shards(target, SavedWeights(MergedWeights(hollow, weights), weights), torch.float32, shard_bytes=20_000)
    base.config.save_pretrained(target)
    if found.untied:
        settings = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    plain = getattr(transformers, auto).from_pretrained(target).eval()
    with torch.no_grad():
        assert torch.allclose(plain(**inputs)[0], wanted, atol=1e-4)
        assert torch.allclose(read_streamed(target, auto)(**inputs)[0], wanted, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_merged_layer_by_layer(kind, tmp_path):
    check(kind, tmp_path)


@pytest.mark.parametrize(("method", "options"), MERGEABLE, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_every_method_is_merged_layer_by_layer(method, options, tmp_path):
    check("llama", tmp_path, method, options)


def test_a_head_of_its_own_is_untied_and_new_tokens_of_a_tied_embedding_stay(tmp_path):
    check("tied", tmp_path / "a", "lora", {"trainable_token_indices": [1, 2]})
    check("tied", tmp_path / "b", "lora", {"modules_to_save": ["lm_head"]})


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("tied", "head", {}),
        ("tied", "full", {}),
        ("t5", "head", {}),
        ("bert", "head", {}),
        ("tied", "lora", {"modules_to_save": ["embed_tokens"]}),
        ("t5", "lora", {"modules_to_save": ["shared"]}),
        ("tied", "lora", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("tied", "layers", {"target_modules": ["model.embed_tokens"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_trained_at_one_end_of_a_tied_model_leaves_the_other_as_it_was(kind, method, options, tmp_path):
    check(kind, tmp_path, method, options)


@pytest.mark.parametrize(
    ("method", "error"), [("houlsby", UnmergeableError), ("prompt_tuning", UnmergeableError), ("boft", AdapterError)]
)
def test_what_cannot_be_merged_so_says_so_before_anything_is_written(method, error, tmp_path):
    folder, auto, _, adapter, _ = made("llama", tmp_path, method, {})
    model, weights = hollow_base(BaseSpec(str(folder), auto))
    with pytest.raises(error):
        dict(MergedWeights(load_adapter(model, adapter), weights))


def test_unmerging_gives_the_base_again(tmp_path):
    _, auto, base, adapter, _ = made("llama", tmp_path)
    merged = merge(load_adapter(copy.deepcopy(base), adapter))
    merged.save_pretrained(tmp_path / "merged")
    model, weights = hollow_base(BaseSpec(str(tmp_path / "merged"), auto))
    back = MergedWeights(load_adapter(model, adapter), weights, back=True)
    for name, tensor in back.items():
        assert torch.allclose(tensor, base.state_dict()[name], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [("head", {}), ("ln_tuning", {}), ("full", {}), ("trainable_tokens", {"token_indices": [1, 2]})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_replaced_is_not_taken_out(method, options, tmp_path):
    folder, auto, _, adapter, _ = made("llama", tmp_path, method, options)
    model, weights = hollow_base(BaseSpec(str(folder), auto))
    with pytest.raises(UnmergeableError, match="replaced as a whole"):
        MergedWeights(load_adapter(model, adapter), weights, back=True)


def test_a_part_that_is_not_filled_shows_as_nan(tmp_path):
    folder, auto, _, _, inputs = made("llama", tmp_path)
    model, _ = hollow_base(BaseSpec(str(folder), auto))
    with torch.no_grad():
        assert model(**inputs)[0].isnan().all()


def test_files_in_another_form_are_not_streamed(tmp_path):
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(NotStreamable, match="experts"):
        hollow_base(BaseSpec(str(tmp_path), "AutoModelForCausalLM"))


def test_shards_are_read_back_by_another_library(tmp_path):
    state = {f"t{i}": torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(7)}
    state["whole"] = torch.arange(4)
    dtypes = write_shards(tmp_path, StateWeights(state), torch.bfloat16, shard_bytes=70)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    found = {k: v for f in files for k, v in load_file(f).items()}
    assert found["whole"].dtype == torch.int64
    assert dtypes["t0"] == torch.bfloat16
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype))
        assert torch.equal(TensorFolder(tmp_path)[name], found[name])
        place = torch.tensor([0, 3])
        assert torch.equal(TensorFolder(tmp_path).values_at(name, place), found[name].flatten()[place])


def test_a_cut_file_and_a_lost_tensor_are_found(tmp_path):
    write_shards(tmp_path, StateWeights({"a": torch.ones(9), "b": torch.ones(9)}), None)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="cut off"):
        TensorFolder(tmp_path)
    folder, auto, _, _, _ = made("llama", tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    write_shards(folder, StateWeights(state | {"more": torch.ones(1)}), None)
    with pytest.raises(ArtifactError, match="more"):
        read_streamed(folder, auto)


def test_the_share_of_an_update_that_rounding_leaves():
    before = torch.full((100,), 1.0)
    assert kept(before, before + 1e-5, torch.bfloat16)[1] == 0.0
    assert kept(before, before + 0.5, torch.bfloat16)[1] == pytest.approx(1.0)
    assert kept(before, before + 1e-5, torch.float32)[0] == pytest.approx(1e-5, rel=1e-2)


def test_tensors_are_written_in_their_order_and_large_ones_are_alone_in_memory(monkeypatch):
    monkeypatch.setattr(behind, "LARGE", 10)
    log, lock = [], threading.Event()

    def make(n):
        log.append(f"made {n}")
        lock.set()
        return n

    def write(n):
        if n == 1:
            assert lock.wait(10)  # until the second is made, beside it
        log.append(f"written {n}")

    behind.write_behind([(1, partial(make, 0)), (1, partial(make, 1)), (1, partial(make, 2)), (10, partial(make, 3)),
                         (1, partial(make, 4))], write)  # fmt: skip
    assert [e for e in log if "written" in e] == [f"written {i}" for i in range(5)]
    assert log.index("written 2") < log.index("made 3")
    assert log.index("written 3") < log.index("made 4")


@pytest.mark.parametrize("side", ["make", "write"])
def test_a_full_disk_or_a_bad_tensor_stops_writing_with_its_own_error(side):
    def fail(*_):
        raise OSError(28, "No space left on device")

    make, write = (fail, print) if side == "make" else (lambda: 1, fail)
    with pytest.raises(OSError, match="No space"):
        behind.write_behind([(1, make), (1, make)], write)


def test_a_second_file_of_weights_beside_the_model_is_not_read(tmp_path):
    """Transformers reads model.safetensors; an average of weights that lies beside it must not win by its name."""
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "model_ema.safetensors")
    assert torch.equal(TensorFolder(tmp_path)["a"], torch.zeros(3))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match="and in another file"):
        TensorFolder(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(AdapterError, match="2 indices"):
        TensorFolder(tmp_path)


def test_a_merge_reads_each_tensor_once(tmp_path, monkeypatch):
    folder, auto, _, adapter, _ = made("llama", tmp_path)
    model, weights = hollow_base(BaseSpec(str(folder), auto))
    hollow = load_adapter(model, adapter)
    read = []
    inner = TensorFolder.__getitem__
    monkeypatch.setattr(TensorFolder, "__getitem__", lambda self, name: read.append(name) or inner(self, name))
    for name in (found := MergedWeights(hollow, weights)):
        assert found[name].isfinite().all()
    assert sorted(read) == sorted(set(read))
    assert "nothing" not in found
