"""A GGUF file that other programs read is the merged model, for every family, tensor by tensor and in its answers."""

import math
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader

from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import probe, publish
from lora_ft.exports._gguf.family import families
from lora_ft.exports._gguf.vocabulary import split_name
from lora_ft.exports._gguf.write import TYPES, Entry, _stored
from lora_ft.exports._gguf.writer import Writer
from lora_ft.models.random_models import tiny_bert
from lora_ft.registry import EXPORTS
from tests.tiny_artifacts import artifact_of

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
MODELS = {
    "llama": ("Llama", SIZES | {"tie_word_embeddings": False}),
    "llama tied": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "llama3": ("Llama", SIZES | {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 32}),
    "gemma": ("Gemma", SIZES | {"head_dim": 16}),
    "gemma2": ("Gemma2", SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3Text", SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", SIZES | {"pad_token_id": 0}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
TARGETS = {"gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}}


def config_of(name, size):
    kind, options = MODELS[name]
    return getattr(transformers, f"{kind}Config")(**options, vocab_size=size)


def written(name, tokenizer, tmp_path, dtype="float32", **more):
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, **TARGETS.get(name, {})}
    config = config_of(name, len(tokenizer))
    artifact, model = artifact_of(config, tmp_path / "adapter", tokenizer, dtype=dtype, options=options, **more)
    export = EXPORTS.get("gguf")
    export.check(artifact.subject)
    probes = probe(model, [{"input_ids": [[5, 6, 7, 8, 100, 50, 60]]}], artifact.outputs)
    return publish(artifact, tmp_path / "out", export, probes, lambda folder, figures: None)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_answers_as_the_adapter_on_its_base(name, tokenizer, tmp_path):
    figures = written(name, tokenizer, tmp_path)
    assert figures["max_difference"] < 1e-4
    assert figures["update_kept"] > 0.9999


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float16", 0.99), ("bfloat16", 0.95), ("q8_0", 0.9), ("q5_1", 0.7), ("q5_0", 0.7)]
)
def test_fewer_bits_keep_most_of_the_update(dtype, kept, tokenizer, tmp_path):
    assert written("llama", tokenizer, tmp_path, dtype)["update_kept"] > kept
    sizes = {"float16": "F16", "bfloat16": "BF16"}
    kinds = {t.tensor_type.name for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert sizes.get(dtype, dtype.upper()) in kinds
    assert "F32" in kinds  # norms


def test_the_table_of_families_has_every_model_tested_here():
    tested = {config_of(n, 64).model_type for n in MODELS}
    assert set(families()) - tested == {"bert"}


def test_a_model_of_no_family_is_refused_before_training(tokenizer, tmp_path):
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64, vocab_size=len(tokenizer),
        word_embed_proj_dim=32,
    )  # fmt: skip
    artifact, _ = artifact_of(config, tmp_path / "adapter", tokenizer)
    with pytest.raises(UsageError, match="opt model cannot be written") as caught:
        EXPORTS.get("gguf").check(artifact.subject)
    assert "llama" in caught.value.why


def test_a_classifiers_head_is_not_lost_in_silence(tokenizer, tmp_path):
    config = config_of("llama", len(tokenizer))
    config.pad_token_id = 0
    auto = "AutoModelForSequenceClassification"
    artifact, _ = artifact_of(config, tmp_path / "adapter", tokenizer, auto_class=auto, task="text-classification")
    with pytest.raises(UsageError, match="no place for its head"):
        EXPORTS.get("gguf").check(artifact.subject)


def test_a_permutation_that_is_forgotten_is_found(tokenizer, tmp_path, monkeypatch):
    from lora_ft.exports._gguf.families import llama

    monkeypatch.setattr(llama, "_heads", lambda name, config: 0)
    with pytest.raises(ArtifactError, match="differs"):
        written("llama", tokenizer, tmp_path)
    assert not (tmp_path / "out").exists()


def test_tokens_stops_and_template_are_the_tokenizers(tokenizer, tmp_path):
    written("llama", tokenizer, tmp_path, generation={"eos_token_id": [tokenizer.eos_token_id, 7, 9]})
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 7
    assert fields["tokenizer.ggml.eom_token_id"].contents() == 9
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [t for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


@pytest.mark.parametrize(("pooling", "number"), [("mean", 1), ("cls", 2), ("last", 3)])
def test_an_encoder_of_sentences_is_written_with_its_own_pooling(pooling, number, tmp_path):
    (tmp_path / "base").mkdir()
    tiny_bert.build(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    artifact, model = artifact_of(
        transformers.AutoConfig.from_pretrained(tmp_path / "base"), tmp_path / "adapter", tokenizer, pooling=pooling,
        auto_class="AutoModel", task="sentence-embedding", outputs=lambda m, batch: m(**batch).last_hidden_state,
    )  # fmt: skip
    export = EXPORTS.get("gguf")
    export.check(artifact.subject)
    probes = probe(model, [{"input_ids": [[2, 60, 70, 80, 3]]}], artifact.outputs)
    figures = publish(artifact, tmp_path / "out", export, probes, lambda folder, figures: None)
    assert figures["max_difference"] < 1e-4
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["bert.pooling_type"].contents() == number
    ends = [fields[f"tokenizer.ggml.{n}_token_id"].contents() for n in ("bos", "seperator")]
    assert ends == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert fields["tokenizer.ggml.normalizer.lowercase"].contents()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"), ("qwen2", {"hidden_act": "relu"}, "hidden_act"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act"), ("gpt2", {"activation_function": "relu"}, "activation"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("gemma", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ("qwen2", {"rope_parameters": YARN | {"beta_fast": 8.0}}, "beta_fast"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "truncate"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type"), ("mistral", {"rope_parameters": LLAMA3}, "rope_type"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("gemma2", {"attn_logit_softcapping": None}, "soft caps"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, change, said, tokenizer, tmp_path, monkeypatch):
    """It reads no such key; Transformers reads the file back with the run's own config and would see no difference."""
    kind, options = MODELS[name]
    monkeypatch.setitem(MODELS, name, (kind, options | change))
    with pytest.raises(UsageError, match=f"answer otherwise: .*{said}"):
        written(name, tokenizer, tmp_path)


def test_the_factor_of_yarn_is_that_beside_llama_cpps_own(tokenizer, tmp_path, monkeypatch):
    yarn = YARN | {"attention_factor": 2.0}
    monkeypatch.setitem(MODELS, "qwen2", ("Qwen2", SIZES | {"rope_parameters": yarn}))
    written("qwen2", tokenizer, tmp_path)
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    factor = fields["qwen2.rope.scaling.attn_factor"].contents()
    assert factor * (0.1 * math.log(2.0) + 1) == pytest.approx(2.0, rel=1e-6)


def test_a_window_that_llama_cpp_does_not_have_is_where_the_file_ends(tokenizer, tmp_path, monkeypatch):
    written("mistral", tokenizer, tmp_path / "all")
    assert _context(tmp_path / "all") == 128
    monkeypatch.setitem(MODELS, "mistral", ("Mistral", SIZES | {"sliding_window": 32}))
    written("mistral", tokenizer, tmp_path / "window")
    assert _context(tmp_path / "window") == 32


def _context(folder):
    return GGUFReader(folder / "out" / "model.gguf").fields["llama.context_length"].contents()


def test_a_way_of_splitting_text_without_a_name_is_refused():
    def rules(*steps):
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}

    level = {"type": "ByteLevel", "use_regex": True}
    assert split_name(rules({"type": "Digits", "individual_digits": True}, level)) == "smollm"
    end = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    start = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    newer = (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{words}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{words}|\p{{N}}{{1,3}}"
    )
    known = {
        start + "{1,3}" + end: "llama-bpe", start + end: "qwen2",
        newer + end.replace(r"[\r\n]*", r"[\r\n/]*"): "gpt-4o",
    }  # fmt: skip
    for pattern, name in known.items():
        split = {"type": "Split", "pattern": {"Regex": pattern}}
        assert split_name(rules(split, {**level, "use_regex": False})) == name
        for near in (pattern.replace(r"\p{L}+", r"[\p{L}\p{M}]+"), pattern + r"|\d"):
            if near != pattern:
                with pytest.raises(UsageError, match="no name here"):
                    split_name(rules({"type": "Split", "pattern": {"Regex": near}}, level))
    with pytest.raises(UsageError, match="no name here"):
        split_name(rules({"type": "Whitespace"}, level))


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs a checkout of llama.cpp in $LLAMA_CPP")
@pytest.mark.parametrize("dtype", [("float32", "f32"), ("float16", "f16"), ("q8_0", "q8_0")])
def test_every_tensor_is_that_of_llama_cpps_own_converter(dtype, tokenizer, tmp_path):
    ours, theirs = dtype
    written("llama", tokenizer, tmp_path, ours)
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False}
    artifact, model = artifact_of(
        config_of("llama", len(tokenizer)), tmp_path / "again", tokenizer, dtype="float32", options=options
    )
    merged = EXPORTS.get("merged")
    probes = probe(model, [{"input_ids": [[5, 6, 7, 8]]}], artifact.outputs)
    publish(artifact, tmp_path / "merged", merged, probes, lambda folder, figures: None)
    folder = Path(os.environ["LLAMA_CPP"])  # its table of tokenizers does not have this one

    script = (
        f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder / 'gguf-py')!r}]\n"
        "from conversion.base import TextModel\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        "import convert_hf_to_gguf; convert_hf_to_gguf.main()"
    )
    out = tmp_path / "theirs.gguf"
    command = [sys.executable, "-c", script, str(tmp_path / "merged"), "--outtype", theirs, "--outfile", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    one, other = ({t.name: t for t in GGUFReader(p).tensors} for p in (tmp_path / "out" / "model.gguf", out))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.tensor_type == other[name].tensor_type
        assert np.array_equal(tensor.data, other[name].data)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cast_is_that_of_the_gguf_package_to_the_last_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat([
        torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-9, 9, (4096,), generator=generator),
        torch.tensor([0.0, -0.0, 65504.0, 65519.9, -65520.0, 6e-8, 2.9e-8, 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8]),
        torch.zeros(21),
    ]).reshape(16, -1)  # fmt: skip
    kind = TYPES[dtype][0]
    with np.errstate(over="ignore"):
        wanted = gguf.quants.quantize(numbers.numpy(), kind)
    found = _stored(Entry("a.weight", kind, tuple(numbers.shape), lambda: numbers))
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == wanted.tobytes()


def test_lists_packed_at_once_are_those_of_the_gguf_package_to_the_last_byte(tmp_path):
    lists = [["a", "", "\u00e9\u4e16", "\U0001f600" * 3], [1, -2, 3], [0.5, -1.25], [True, False], [b"\xff", b""]]
    written = []
    for kind in (Writer, gguf.GGUFWriter):
        writer = kind(tmp_path / kind.__name__, "llama")
        for number, values in enumerate(lists):
            writer.add_array(f"list.{number}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        written.append((tmp_path / kind.__name__).read_bytes())
    assert written[0] == written[1]
