"""Built-in models with random weights are the same everywhere, need no network, and serve the tasks."""

import hashlib

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from lora_ft.models import builtin
from lora_ft.models.load import load_with_new_head
from lora_ft.models.resolve import resolve

# Of the first version; another value means other weights, and needs another `version` in builtin.py.
KNOWN = {
    "tiny-bert": ("AutoModelForPreTraining", "18bf5f4c77a075e5dd0f77fe5433fe0fb97ecf94d93ab28782c61ae1cee9eb49"),
    "tiny-t5": ("AutoModelForSeq2SeqLM", "4ae075c37f9e054538b0d34fcab71d29e053a5987676718519349f850d40ab24"),
}
RANDOM = sorted(n for n, m in builtin.BUILTINS.items() if m.kind == "random")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(builtin.subprocess, "run", lambda *a, **k: pytest.fail("a random model is never downloaded"))
        yield {name: resolve(f"builtin:{name}", lambda text: None) for name in RANDOM}


def load(folder, auto_class, **arguments):
    return load_with_new_head(
        folder, auto_class, dtype=torch.float32, device=torch.device("cpu"), model_arguments=arguments
    )


def test_every_random_model_has_a_known_hash():
    assert sorted(KNOWN) == RANDOM


@pytest.mark.parametrize("name", RANDOM)
def test_weights_are_the_same_on_every_machine(folders, name):
    base = load(folders[name], KNOWN[name][0])
    assert base.fresh == ()
    digest = hashlib.sha256()
    for _, weight in sorted(base.model.named_parameters()):
        digest.update(weight.detach().numpy().tobytes())
    assert digest.hexdigest() == KNOWN[name][1]


@pytest.mark.parametrize("name", RANDOM)
def test_weights_do_not_depend_on_the_seed_of_the_caller(folders, name, tmp_path):
    from lora_ft.models import random_models

    torch.manual_seed(123)
    random_models.build(name, tmp_path)
    first, second = (load(str(f), KNOWN[name][0]).model.state_dict() for f in (folders[name], tmp_path))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", RANDOM)
def test_the_listing_says_that_weights_are_random(name):
    assert "RANDOM" in builtin.BUILTINS[name].description


@pytest.mark.parametrize(
    ("auto_class", "fresh"),
    [("AutoModelForMaskedLM", ()), ("AutoModelForSequenceClassification", ("classifier",)),
     ("AutoModelForTokenClassification", ("classifier",)), ("AutoModelForQuestionAnswering", ("qa_outputs",))],
)  # fmt: skip
def test_the_tiny_bert_gets_every_head_like_a_real_one(folders, auto_class, fresh):
    assert load(folders["tiny-bert"], auto_class).fresh == fresh


def test_the_tiny_bert_reads_pairs_with_offsets_and_knows_no_unknown_word_of_ascii(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["tiny-bert"])
    text = "Zqxj's 42 Wörkings (at www.x-y.org)!"
    out = tokenizer(text, "second", return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(out["input_ids"])
    assert tokenizer.unk_token not in tokens
    assert (tokens[0], tokens[-1], set(out["token_type_ids"])) == ("[CLS]", "[SEP]", {0, 1})
    first = [(a, b) for (a, b), t in zip(out["offset_mapping"], out["token_type_ids"], strict=True) if t == 0 and b]
    assert "".join(text[a:b] for a, b in first) == text.replace(" ", "")
    assert tokenizer.mask_token_id is not None
    assert tokenizer.model_max_length == 512


def test_the_tiny_bert_has_the_spread_of_its_config(folders):
    model = load(folders["tiny-bert"], "AutoModelForMaskedLM").model
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            assert float(weight.detach().std()) == pytest.approx(model.config.initializer_range, rel=0.15), name


def test_the_tiny_t5_has_the_spread_that_transformers_gives_a_new_one(folders):
    model = load(folders["tiny-t5"], "AutoModelForSeq2SeqLM").model
    torch.manual_seed(0)
    plain = transformers.T5ForConditionalGeneration(model.config)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        limit = 0.3 if ours.numel() < 1000 else 0.05
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=limit, abs=1e-6), name


def test_the_tiny_t5_writes_and_its_bytes_come_back(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["tiny-t5"])
    model = load(folders["tiny-t5"], "AutoModelForSeq2SeqLM").model
    text = "Grüße, 世界!"
    batch = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == text
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert 0 < float(loss) < 50
    assert model.generate(**batch, max_new_tokens=3).shape[0] == 1
