"""Sentence embeddings: losses by their formulas, the gradient of a step in parts, recall, equal texts."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.metrics import top_k_accuracy_score
from torch.nn import functional
from transformers import AutoModel, BertConfig, DistilBertConfig, LlamaConfig

from lora_ft.errors import DivergedError, UsageError
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.registry import TASKS
from tests.words import BERT, word_tokenizer

WORDS = "the cat sat on a mat and dog ran to big red house while rain fell all night long"
PROCESSOR = word_tokenizer(WORDS + " query: passage:", BERT)
TASK = TASKS.get("sentence-embedding")
OPTIONS = EncodeOptions(max_length=16, overlong="truncate")
PREDICT = PredictOptions(1, 2, OPTIONS)


def row(number, anchor, positive=None, negative=None):
    texts = {"anchor": anchor, "positive": positive, "negative": negative}
    return Example({k: v for k, v in texts.items() if v}, f"r.jsonl:{number}")


PAIRS = [
    row(1, "the cat sat", "a cat sat on a mat"),
    row(2, "dog ran", "the dog ran to a big red house", "the cat sat on a mat"),
    row(3, "rain fell all night long", "night rain"),
    row(4, "red house", "a big red house", "dog"),
    row(5, "long night", "all night long", "mat"),
    row(6, "a mat", "the mat on a house", "rain rain"),
]


def encoded(rows=PAIRS, task=TASK, options=OPTIONS):
    encode = task.encoder(PROCESSOR, options)
    return [s for e in rows for s in encode(e).samples]


def model(kind="bert"):
    torch.manual_seed(0)
    small = {"vocab_size": len(PROCESSOR), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "bert": lambda: BertConfig(**small, intermediate_size=32, max_position_embeddings=64),
        "llama": lambda: LlamaConfig(**small, intermediate_size=32),
        "distilbert": lambda: DistilBertConfig(vocab_size=len(PROCESSOR), dim=16, n_heads=2, n_layers=2, hidden_dim=32),
    }[kind]()
    arguments = TASK.model_arguments() if kind == "bert" else {}
    made = AutoModel.from_config(config, **arguments).eval()
    made.get_input_embeddings().weight.data.normal_(std=1.0)
    return made


def by_hand(anchor, positive, negative, temperature=0.05):
    """Mean of -log softmax of each anchor's own positive, in float64; `negative` may hold None."""
    losses = []
    for i, a in enumerate(anchor):
        others = [p for j, p in enumerate(positive) if j != i] + [n for n in negative if n is not None]
        scores = [float(a.double() @ c.double()) / temperature for c in [positive[i], *others]]
        losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[0])
    return sum(losses) / len(losses)


def texts_of(representations):
    return representations[..., :-2].unbind(1)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", ["bert", "llama", "distilbert"])
def test_padding_does_not_change_an_embedding(kind, pooling):
    """Each text alone through the plain model, pooled by the definition."""
    task, made = TASK.configure({"pooling": pooling}), model(kind)
    with torch.no_grad():
        found = texts_of(task.represent(made, task.collate(encoded(), PROCESSOR)))
        for column, role in enumerate(("anchor", "positive", "negative")):
            for i, example in enumerate(PAIRS):
                if role not in example.fields:
                    assert not found[column][i].any()
                    continue
                hidden = made(torch.tensor([PROCESSOR(example.fields[role])["input_ids"]])).last_hidden_state[0]
                pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
                assert torch.allclose(found[column][i], functional.normalize(pooled, dim=0), atol=1e-5)


def test_the_loss_is_that_of_its_formula():
    made = model()
    with torch.no_grad():
        batch = TASK.collate(encoded(), PROCESSOR)
        loss = TASK.loss(made, batch)
        anchor, positive, negative = texts_of(TASK.represent(made, batch))
    given = [n if "negative" in e.fields else None for n, e in zip(negative, PAIRS, strict=True)]
    assert loss.count == 6
    assert float(loss.total / loss.count) == pytest.approx(by_hand(anchor, positive, given), rel=1e-5)
    assert loss.outputs["representation"].shape == (6, 3, 18)


def test_temperature_and_symmetry_do_what_they_say():
    made = model()
    task = TASK.configure({"temperature": 0.5, "symmetric": True})
    with torch.no_grad():
        batch = task.collate(encoded(), PROCESSOR)
        loss = task.loss(made, batch)
        anchor, positive, negative = texts_of(task.represent(made, batch))
    given = [n if "negative" in e.fields else None for n, e in zip(negative, PAIRS, strict=True)]
    both = (by_hand(anchor, positive, given, 0.5) + by_hand(positive, anchor, [], 0.5)) / 2
    assert float(loss.total / loss.count) == pytest.approx(both, rel=1e-5)


def test_the_triplet_loss_is_torchs():
    rows = [e for e in PAIRS if "negative" in e.fields]
    task, made = TASK.configure({"loss": "triplet", "margin": 0.4}), model()
    with torch.no_grad():
        batch = task.collate(encoded(rows, task), PROCESSOR)
        loss = task.loss(made, batch)
        expected = torch.nn.TripletMarginLoss(margin=0.4)(*texts_of(task.represent(made, batch)))
    assert float(loss.total / loss.count) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="needs a negative"):
        task.encoder(PROCESSOR, OPTIONS)(PAIRS[0])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_in_parts_has_the_gradient_of_one_batch(size):
    """GradCache by hand; a micro-batch without negatives stands beside ones that have some."""
    made, samples = model(), encoded()
    made.zero_grad()
    TASK.loss(made, TASK.collate(samples, PROCESSOR)).total.backward()
    wanted = torch.cat([p.grad.flatten() for p in made.parameters()])
    made.zero_grad()
    batches = [TASK.collate(samples[i : i + size], PROCESSOR) for i in range(0, len(samples), size)]
    with torch.no_grad():
        whole = torch.cat([TASK.represent(made, b) for b in batches])
    TASK.combine(whole.requires_grad_()).total.backward()
    for batch, gradient in zip(batches, whole.grad.split(size), strict=True):
        (TASK.represent(made, batch) * gradient).sum().backward()
    got = torch.cat([p.grad.flatten() for p in made.parameters()])
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5)
    assert wanted.norm() > 0.1


def test_every_linear_layer_gets_a_gradient_under_dropout():
    """No pooler is left that would get none; rows without negatives give no NaN."""
    adapted = get_peft_model(
        model(), LoraConfig(task_type=TASK.peft_task_type, target_modules="all-linear", init_lora_weights=False)
    ).train()
    TASK.loss(adapted, TASK.collate(encoded(), PROCESSOR)).total.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)


def test_the_same_text_is_never_a_wrong_answer_even_under_dropout():
    """Rows 1 and 2 share their positive, 1 and 3 their anchor, and 4 has row 1's positive as its negative.

    So "a cat" and "the cat" are right for "cat", wherever they stand.
    """
    rows = [row(1, "cat", "a cat"), row(2, "dog", "a cat"), row(3, "cat", "the cat"), row(4, "rain", "long", "a cat")]
    made = model().train()
    representations = TASK.represent(made, TASK.collate(encoded(rows), PROCESSOR))
    anchor, positive, negative = texts_of(representations.detach())
    assert not torch.allclose(positive[0], positive[1])  # dropout
    candidates = [
        [positive[0], positive[3]],
        [positive[1], positive[2], positive[3]],
        [positive[2], positive[3]],
        [positive[3], positive[0], positive[1], positive[2], negative[3]],
    ]
    losses = [
        float(torch.logsumexp(torch.stack(c).double() @ a.double() / 0.05, 0) - c[0].double() @ a.double() / 0.05)
        for a, c in zip(anchor, candidates, strict=True)
    ]
    assert TASK.combine(representations).total.item() == pytest.approx(sum(losses), rel=1e-4)


def representation(anchors, positives, names=None):
    """As `represent` would give it, from vectors; equal names are equal texts."""
    names = names or [(i, i) for i in range(len(anchors))]
    out = torch.zeros(len(anchors), 3, len(anchors[0]) + 2)
    for i, (a, p) in enumerate(zip(anchors, positives, strict=True)):
        out[i, 0, :-2], out[i, 1, :-2] = torch.as_tensor(a), torch.as_tensor(p)
        out[i, 0, -2:], out[i, 1, -2:] = 1.0 + names[i][0], 1.0 + names[i][1]
    return [{"representation": r} for r in out]


def test_recall_of_a_case_by_hand():
    """Row 2 finds row 0's positive first; rows 1 and 3 share a positive text, which is right for both."""
    anchors = [[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]]
    positives = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 1.0]]
    samples = [None] * 4
    judged = TASK.measure(samples, representation(anchors, positives, [(0, 0), (1, 1), (2, 2), (3, 1)]))
    assert judged.right == [True, True, False, True]
    assert judged.metrics["recall_at_1"] == 0.75
    assert judged.metrics["recall_at_5"] == judged.metrics["recall_at_10"] == 1.0


def test_another_right_answer_to_the_same_question_is_no_mistake():
    anchors, positives = [[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.5, 0.5]]
    assert TASK.measure([None] * 2, representation(anchors, positives, [(0, 0), (0, 1)])).right == [True, True]
    assert TASK.measure([None] * 2, representation(anchors, positives)).right == [True, False]


def test_recall_is_scikit_learns(monkeypatch):
    monkeypatch.setattr("lora_ft.tasks._retrieval.RANKED_TOGETHER", 7)
    generator = torch.Generator().manual_seed(0)
    anchors = functional.normalize(torch.randn(40, 6, generator=generator), dim=-1)
    positives = functional.normalize(anchors + 0.9 * torch.randn(40, 6, generator=generator), dim=-1)
    judged = TASK.measure([None] * 40, representation(anchors.tolist(), positives.tolist()))
    scores = (anchors @ positives.T).numpy()
    for k in (1, 5, 10):
        expected = top_k_accuracy_score(range(40), scores, k=k, labels=range(40))
        assert 0 < expected < 1
        assert judged.metrics[f"recall_at_{k}"] == pytest.approx(expected)
    assert sum(judged.right) / 40 == judged.metrics["recall_at_1"]


def test_the_held_out_loss_does_not_depend_on_micro_batches(monkeypatch):
    monkeypatch.setattr("lora_ft.tasks.sentence_embedding.JUDGED_TOGETHER", 4)
    made, samples = model(), encoded()
    found = []
    with torch.no_grad():
        for size in (1, 6):
            kept = [
                r
                for i in range(0, 6, size)
                for r in TASK.loss(made, TASK.collate(samples[i : i + size], PROCESSOR)).outputs["representation"]
            ]
            found.append(TASK.measure(samples, [{"representation": r} for r in kept]).metrics["loss"])
        parts = [TASK.loss(made, TASK.collate(samples[i : i + 4], PROCESSOR)).total for i in (0, 4)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(float(sum(parts)) / 6, rel=1e-5)


def test_embeddings_that_are_not_numbers_are_named():
    kept = representation([[1.0, 0.0], [math.nan, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(DivergedError) as caught:
        TASK.measure(encoded()[:2], kept)
    assert caught.value.where == "r.jsonl:2"


def test_prediction_gives_similarities_or_embeddings():
    made = model()
    rows = [PAIRS[1], row(7, "a cat"), PAIRS[0], Example({"text": "the dog ran"}, "r.txt:8")]
    pair, alone, no_negative, text = TASK.predict(made, PROCESSOR, rows, PREDICT)
    with torch.no_grad():
        anchor, positive, negative = texts_of(TASK.represent(made, TASK.collate(encoded([PAIRS[1]]), PROCESSOR)))
        plain = TASK.outputs(made, TASK.collate(encoded([row(7, "a cat")]), PROCESSOR))
    assert pair.details["similarity"] == pytest.approx(float(anchor[0] @ positive[0]), abs=1e-5)
    assert pair.details["negative_similarity"] == pytest.approx(float(anchor[0] @ negative[0]), abs=1e-5)
    assert pair.output == f"{pair.details['similarity']:.4f}"
    assert set(no_negative.details) == {"similarity"}
    assert alone.details["embedding"] == pytest.approx(plain[0].tolist(), abs=1e-5)
    assert (alone.output, alone.where, text.input) == ("", "r.jsonl:7", "the dog ran")
    assert len(text.details["embedding"]) == 16


def test_a_probe_is_an_anchor_on_its_own():
    made = model()
    (probe,) = TASK.probes(encoded(PAIRS[:1]), PROCESSOR)
    assert set(probe) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        assert torch.allclose(TASK.outputs(made, probe).norm(dim=-1), torch.ones(1))


def test_prefixes_stand_before_the_texts():
    task = TASK.configure({"query_prefix": "query: ", "passage_prefix": "passage: "})
    (sample,) = encoded([PAIRS[1]], task)
    assert task.show(sample, PROCESSOR).splitlines() == [
        "anchor: [CLS] query: dog ran [SEP]",
        "positive: [CLS] passage: the dog ran to a big red house [SEP]",
        "negative: [CLS] passage: the cat sat on a mat [SEP]",
    ]


def test_rows_keep_what_they_hold():
    pair, triplet, alone = encoded([PAIRS[0], PAIRS[1], row(7, "a cat")])
    assert [s.labelled for s in (pair, triplet, alone)] == [1, 1, 0]
    assert pair.length == 3 + 6 + 4
    assert PROCESSOR.decode(triplet.inputs["negative"]) == "[CLS] the cat sat on a mat [SEP]"


@pytest.mark.parametrize(
    ("overlong", "samples", "said"),
    [("truncate", 1, "truncated"), ("drop", 0, "dropped: longer than max_length"), ("error", 0, "over max_length")],
)
def test_a_long_text_is_cut_between_its_special_tokens_or_refused(overlong, samples, said):
    long = row(1, "cat", WORDS)
    found = TASK.encoder(PROCESSOR, EncodeOptions(8, overlong))(long)
    assert (len(found.samples), found.outcome) == (samples, said)
    if samples:
        assert PROCESSOR.decode(found.samples[0].inputs["positive"]) == "[CLS] the cat sat on a mat [SEP]"


def test_a_cut_text_is_said_to_be_cut():
    options = PredictOptions(1, 2, EncodeOptions(8, "truncate"))
    assert [p.cut for p in TASK.predict(model(), PROCESSOR, [row(1, "cat", WORDS), PAIRS[0]], options)] == [True, False]


def test_unknown_options_are_named_with_the_nearest():
    with pytest.raises(UsageError, match="pooling"):
        TASK.configure({"poolin": "mean"})
    with pytest.raises(UsageError, match="temperature"):
        TASK.configure({"temperature": 0})
