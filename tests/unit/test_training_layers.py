"""Gradual unfreezing and layer-wise rates on encoders with a head, encoder-decoders and plain stacks."""

from collections import defaultdict

import pytest
import torch
import transformers as tf
from torch import nn

from lora_ft.recipe import TrainSection
from lora_ft.records import LossSum, Silent
from lora_ft.training.loop import train
from lora_ft.training.rates import below_top, block_places, rate_scales
from lora_ft_adapters import add_adapter, build_config, trainable
from tests.unit.test_training_loop import make_job, samples

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40,
}  # fmt: skip
DISTIL = {"dim": 16, "hidden_dim": 32, "n_layers": 3, "n_heads": 2, "vocab_size": 40}
DEBERTA = {**SIZES, "relative_attention": True, "position_buckets": 4, "pos_att_type": ["c2p"]}


def classifier(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = {
        "Bert": lambda: tf.BertConfig(**SIZES),
        "Roberta": lambda: tf.RobertaConfig(**SIZES),
        "DistilBert": lambda: tf.DistilBertConfig(**DISTIL),
        "DebertaV2": lambda: tf.DebertaV2Config(**DEBERTA),
        "Electra": lambda: tf.ElectraConfig(**SIZES, embedding_size=8),
    }[name]()
    return getattr(tf, f"{name}ForSequenceClassification")(config)


def depths(model: nn.Module, task: str | None, method: str = "full") -> dict[str, int]:
    adapted = add_adapter(model, build_config(method, {}, task, model))
    names = [n for n, _ in trainable(adapted)]
    return below_top(names, block_places(adapted))


@pytest.mark.parametrize(("name", "method"), [
    ("Bert", "full"), ("Roberta", "full"), ("DistilBert", "full"), ("DebertaV2", "full"), ("Electra", "full"),
    ("Bert", "lora"), ("Roberta", "lora"), ("DebertaV2", "lora"),
])  # fmt: skip
def test_head_and_pooler_are_above_an_encoders_blocks_and_all_embeddings_below(name, method):
    found = depths(classifier(name), "SEQ_CLS", method)
    for parameter, depth in found.items():
        if "classifier" in parameter or "pooler" in parameter:
            assert depth == -1, parameter
        elif "embedding" in parameter:
            assert depth == 3, parameter
    assert any("classifier" in n for n in found)
    assert {0, 1, 2} <= set(found.values())
    assert method == "lora" or 3 in found.values()


def test_a_decoders_own_embeddings_do_not_wake_before_its_blocks():
    found = depths(tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ)), "SEQ_2_SEQ_LM")
    outside = {n: d for n, d in found.items() if ".layers." not in n}
    assert any("decoder.embed_positions" in n for n in outside)
    assert set(outside.values()) == {2}


def test_a_head_called_embed_out_wakes_first():
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_in = nn.Embedding(5, 4)
            self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.embed_out = nn.Linear(4, 5)

        def get_output_embeddings(self):
            return self.embed_out

        def forward(self, ids):
            return self.embed_out(self.blocks(self.embed_in(ids)))

    found = depths(Writer(), None)
    assert {d for n, d in found.items() if "embed_out" in n} == {-1}
    assert {d for n, d in found.items() if "embed_in" in n} == {2}


def test_activations_between_layers_are_no_blocks():
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
    adapted = add_adapter(net, build_config("full", {}, None, net))
    names = [n for n, _ in trainable(adapted)]
    scales = rate_scales(names, TrainSection(layer_lr_decay=0.5), {}, block_places(adapted))
    assert list(scales.values()) == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]


def test_a_bert_classifier_trains_its_head_first_and_its_embeddings_last(tmp_path):
    base = classifier("Bert")
    model = add_adapter(base, build_config("full", {}, "SEQ_CLS", base))
    depth = below_top([n for n, _ in trainable(model)], block_places(model))
    start = {n: p.detach().clone() for n, p in trainable(model)}
    first: dict[int, set[int]] = defaultdict(set)

    class Watch(Silent):
        def step(self, record):
            for name, p in model.named_parameters():
                moved = name in start and not torch.equal(p, start[name])
                if moved and not any(name in woken for woken in seen):
                    seen.append(name)
                    first[max(0, depth[name])].add(record["step"])

    seen: list[str] = []

    def collate(chosen, draw):
        ids = torch.tensor([[1 + s.inputs["label"], 7, 9 + s.length] for s in chosen])
        return {"input_ids": ids, "labels": torch.tensor([s.inputs["label"] % 2 for s in chosen])}

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return LossSum(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"), len(logits))

    job = make_job(
        tmp_path, model, collate=collate, loss=loss, steps=8, unfreeze_every=2, listener=Watch(), learning_rate=1e-3,
        tokens_per_micro_batch=1000, samples=samples(),
    )  # fmt: skip
    train(job)
    assert {d: min(steps) for d, steps in first.items()} == {0: 1, 1: 3, 2: 5, 3: 7}
    assert all(p.requires_grad for n, p in model.named_parameters() if n in start)
