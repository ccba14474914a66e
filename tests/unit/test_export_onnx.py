"""An ONNX graph answers as the adapter on its base: any batch and length, padding, and the outputs' usual names."""

import pytest
import torch
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ResNetConfig,
    ViTConfig,
    Wav2Vec2Config,
    YolosConfig,
)

from lora_ft.errors import ArtifactError, UsageError
from lora_ft.exports import probe, publish
from lora_ft.exports.formats import onnx as format_onnx
from lora_ft.registry import EXPORTS, TASKS
from tests.tiny_artifacts import artifact_of

pytestmark = pytest.mark.slow

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 16, "init_lora_weights": False}


def text(length, *, types=False):
    ids = torch.randint(5, 200, (1, length))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found | ({"token_type_ids": torch.zeros_like(ids)} if types else {})


def ids_alone(length):
    return {"input_ids": torch.randint(5, 200, (1, length))}


def picture(length):
    return {"pixel_values": torch.randn(1, 3, 32, 32), "pixel_mask": torch.ones(1, 32, 32, dtype=torch.long)}


def sound(length):
    return {"input_values": torch.randn(1, 400 + 20 * length)}


def bert(vocabulary):
    return BertConfig(**SIZES, vocab_size=vocabulary, max_position_embeddings=64, pad_token_id=0)


def llama(vocabulary):
    return LlamaConfig(**SIZES, vocab_size=vocabulary, max_position_embeddings=64, pad_token_id=0)


def gpt2(vocabulary):
    return GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)


def wav2vec2(vocabulary):
    return Wav2Vec2Config(
        **SIZES, vocab_size=32, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip


def vit(vocabulary):
    return ViTConfig(**SIZES, image_size=32, patch_size=8)


def resnet(vocabulary):
    return ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")


def yolos(vocabulary):
    return YolosConfig(**SIZES, image_size=[32, 32], patch_size=8, num_detection_tokens=6)


CASES = {  # task: config, inputs, names of the graph's outputs
    "causal-lm": (llama, ids_alone, ["logits"]),
    "text-classification": (bert, lambda n: text(n, types=True), ["logits"]),
    "token-classification": (bert, text, ["logits"]),
    "question-answering": (bert, text, ["start_logits", "end_logits"]),
    "masked-lm": (bert, text, ["logits"]),
    "sentence-embedding": (bert, text, ["last_hidden_state", "sentence_embedding"]),
    "image-classification": (vit, picture, ["logits"]),
    "object-detection": (yolos, picture, ["logits", "pred_boxes"]),
    "speech-recognition-ctc": (wav2vec2, sound, ["logits"]),
}


@pytest.fixture
def exported(tokenizer, tmp_path):
    """Exports a small model; gives its figures, the session of the file and the adapter in memory."""

    def run(task, config, inputs, *, dtype="float32", options=LORA):
        torch.manual_seed(3)
        batches = [inputs(n) for n in (9, 23, 5)]
        artifact, model = artifact_of(
            config(len(tokenizer)), tmp_path / "adapter", tokenizer, auto_class=TASKS.get(task).auto_class, task=task,
            dtype=dtype, outputs=TASKS.get(task).outputs, inputs=batches[0], options=options,
        )  # fmt: skip
        export = EXPORTS.get("onnx")
        export.check(artifact.subject)
        probes = probe(model, batches, artifact.outputs)
        figures = publish(artifact, tmp_path / "out", export, probes, lambda folder, found: None)
        session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
        return figures, session, model

    return run


@pytest.mark.parametrize("task", CASES)
def test_graph_answers_as_the_adapter_under_the_usual_names(task, exported):
    config, inputs, names = CASES[task]
    figures, session, _ = exported(task, config, inputs)
    assert figures["max_difference"] < 1e-4
    assert figures["top1_agreement"] == 1
    assert [o.name for o in session.get_outputs()] == names
    assert all(isinstance(i.shape[0], str) for i in session.get_inputs())


@pytest.mark.parametrize(("config", "options"), [(gpt2, LORA), (resnet, LORA | {"target_modules": ["convolution"]})])
def test_other_layers_than_linear_ones(config, options, exported):
    task, inputs = ("causal-lm", ids_alone) if config is gpt2 else ("image-classification", picture)
    assert exported(task, config, inputs, options=options)[0]["update_kept"] > 0.999


def test_padded_batch_is_given_without_transformers(exported):
    _, session, model = exported("causal-lm", llama, ids_alone)
    ids = torch.randint(5, 200, (3, 31))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    got = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    with torch.no_grad():
        wanted = model(input_ids=ids[1:2, :17]).logits[0]
    torch.testing.assert_close(torch.from_numpy(got[1, :17]), wanted, atol=1e-4, rtol=0)


def test_float16_keeps_the_update(exported):
    figures, session, _ = exported("text-classification", bert, text, dtype="float16")
    assert 1e-6 < figures["max_difference"] < 0.05
    assert session.get_outputs()[0].type == "tensor(float)"  # numbers go in and come out in float32


@pytest.mark.filterwarnings("error")
def test_exporter_says_nothing(exported, capfd):
    exported("text-classification", bert, text)
    assert capfd.readouterr() == ("", "")


def test_wrong_graph_is_not_published(exported, tmp_path, monkeypatch):
    plain = format_onnx._load

    def broken(*given):
        model = plain(*given)
        with torch.no_grad():
            model.classifier.weight.zero_()
        return model

    monkeypatch.setattr(format_onnx, "_load", broken)
    with pytest.raises(ArtifactError, match="differs"):
        exported("text-classification", bert, text)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_graph_that_does_not_mind_the_mask_is_not_published(exported, monkeypatch):
    class Blind(format_onnx.Graph):
        def _outputs(self, *values):
            return super()._outputs(values[0], torch.ones_like(values[1]))

    monkeypatch.setattr(format_onnx, "Graph", Blind)
    with pytest.raises(ArtifactError, match="rows of a batch differ"):
        exported("text-classification", bert, text)


def test_what_is_no_single_graph_is_refused_with_a_way_out():
    with pytest.raises(UsageError, match="seq2seq-lm") as caught:
        EXPORTS.get("onnx").check(format_onnx.Subject("seq2seq-lm", "AutoModelForSeq2SeqLM", "lora", None, None))
    assert "merged" in caught.value.fix


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(format_onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="onnxruntime") as caught:
        EXPORTS.get("onnx").check(None)
    assert caught.value.fix == "pip install 'lora-ft[onnx]'"
