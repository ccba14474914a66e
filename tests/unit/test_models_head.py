"""Modules that a base's files lack: a new head is one thing, a broken file another."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from lora_ft.errors import ArtifactError
from lora_ft.models.fresh import fresh_modules
from lora_ft.models.load import fitting, load_with_new_head
from lora_ft.models.random_models import builders
from lora_ft.models.resolve import resolve
from tests.conftest import tiny_llama

CPU = torch.device("cpu")


def bare_bert(folder, dropped=()):
    """A tiny BERT as sentence encoders are published: without its vocabulary head, and without `dropped`."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForMaskedLM(config).bert.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if k not in dropped}
    assert len(kept) == len(tensors) - len(dropped)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def with_head(source, **arguments):
    return load_with_new_head(source, "AutoModelForMaskedLM", dtype=torch.float32, device=CPU, **arguments)


def test_an_encoder_gets_a_vocabulary_head_tied_to_its_embedding(tmp_path):
    """Only the transform starts at random and must train; the bias of zeros needs no file."""
    base = with_head(bare_bert(tmp_path))
    head = base.model.cls.predictions
    assert base.fresh == ("cls.predictions.transform",)
    assert head.decoder.weight is base.model.bert.embeddings.word_embeddings.weight
    assert not head.bias.any()


@pytest.mark.parametrize(
    "dropped",
    ["encoder.layer.0.attention.self.query.weight", "encoder.layer.0.output.LayerNorm.weight",
     "embeddings.LayerNorm.weight"],
)  # fmt: skip
def test_a_broken_encoder_is_not_taken_for_one_without_a_head(tmp_path, dropped):
    """A matrix, and a vector that starts at one."""
    with pytest.raises(ArtifactError, match="not in its files"):
        with_head(bare_bert(tmp_path, [dropped]))


def test_a_missing_bias_alone_is_a_broken_file(tmp_path):
    """A bias of zeros is accepted beside a head that trains, and never on its own."""
    bare = bare_bert(tmp_path / "bare")
    whole = with_head(bare).model
    bias = "bert.encoder.layer.0.output.dense.bias"
    assert not whole.get_parameter(bias).any()
    assert fresh_modules(whole, [bias]) == ()
    assert fresh_modules(whole, []) == ()


def test_a_new_vocabulary_head_comes_back_as_it_was_trained(tmp_path):
    """Adapter and head saved by PEFT, loaded on the bare encoder again under another seed: the same logits."""
    source = bare_bert(tmp_path / "base")
    torch.manual_seed(0)
    base = with_head(source)
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=list(base.fresh))
    model = get_peft_model(base.model, config)
    ids = torch.arange(5, 17).view(2, 6)
    labels = torch.where(ids % 3 == 0, ids, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.base_model.model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    again = PeftModel.from_pretrained(with_head(source).model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_an_argument_that_only_some_architectures_have_is_left_out_of_the_others(tmp_path):
    """BERT's class can do without its pooler; Llama's knows none, and its config knows neither."""
    wanted = {"add_pooling_layer": False, "num_labels": 3}
    assert fitting(bare_bert(tmp_path / "bert"), "AutoModel", wanted) == wanted
    tiny_llama(50).save_pretrained(tmp_path / "llama")
    assert fitting(str(tmp_path / "llama"), "AutoModel", wanted) == {"num_labels": 3}
    options = {"dtype": torch.float32, "device": CPU, "model_arguments": wanted}
    assert load_with_new_head(str(tmp_path / "bert"), "AutoModel", **options).model.pooler is None
    assert load_with_new_head(str(tmp_path / "llama"), "AutoModel", **options).fresh == ()


@pytest.mark.real
def test_minilm_gets_a_vocabulary_head():
    base = with_head(resolve("builtin:minilm-l6", print))
    assert base.fresh == ("cls.predictions.transform",)
    assert base.model.cls.predictions.decoder.weight is base.model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "dropped",
    ["bert.encoder.layer.1.attention.self.query.", "bert.encoder.layer.2.", "bert.embeddings.word_embeddings."],
)
def test_a_body_that_lacks_a_whole_module_is_not_taken_for_a_new_head(tmp_path, dropped):
    builders()["tiny-bert"].build(tmp_path)
    kept = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith(dropped)}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="are not in its files"):
        load_with_new_head(
            str(tmp_path), "AutoModelForSequenceClassification", dtype=torch.float32, device=torch.device("cpu"),
            model_arguments={"num_labels": 3},
        )  # fmt: skip


def test_a_head_for_other_classes_starts_anew_and_nothing_else_may_differ(tmp_path):
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=5
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)

    def opened(**arguments):
        return load_with_new_head(
            str(tmp_path), "AutoModelForSequenceClassification", dtype=torch.float32, device=torch.device("cpu"),
            model_arguments=arguments,
        )  # fmt: skip

    assert opened(num_labels=5).fresh == ()
    assert opened(num_labels=3).fresh == ("classifier",)
    config.vocab_size = 60
    config.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="has shape"):
        opened(num_labels=3)
