"""Built-in models with random weights are the same everywhere, need no network, and serve the tasks."""

import hashlib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lora_ft.models import builtin, random_models
from lora_ft.models.load import load_with_new_head
from lora_ft.models.resolve import resolve

# Of all tensors of the file; another value means other weights, and needs another `VERSION` of the model.
KNOWN = {
    "tiny-bert": "18bf5f4c77a075e5dd0f77fe5433fe0fb97ecf94d93ab28782c61ae1cee9eb49",
    "tiny-detr": "86c0c4f86ea268bdcc8f1bb09fbcd15bfdceed198a3f4d83dcf43f3b7d8b8b8c",
    "tiny-mobilenet": "e13d8ebb1e73a67e7226309ce4c0b0a92571572a5eb98b2d58e45641830b0d0e",
    "tiny-resnet": "2692828d4a9306a45653edf172be589f6b7cfa0ee75db94260cf099657ff4465",
    "tiny-rt-detr": "6958b3e90b1e20a80eadf6f85feba180d4c989f2f99024206eaa11fb6003869d",
    "tiny-segformer": "2a0124ba9beb915be0d8b38bff35826dc9e36893f65f74c49276bbbba7f7b0a3",
    "tiny-t5": "4ae075c37f9e054538b0d34fcab71d29e053a5987676718519349f850d40ab24",
    "tiny-vit": "e6760bf8ac7a7058c1f37cc2d799c131849c1adb9ed21020ec83614fb8f542a6",
    "tiny-vlm": "f6845dbab28b611081660b6b19580dde69a5071ed29267bfae4351173e2b22f8",
    "tiny-wav2vec2": "b5858a2f251842c74f0eb42aa6d8ba7fdd8a01afc6589860be02e757a7bd37c6",
    "tiny-whisper": "8de463a504615ddfc3eb1387ab4cbd5bceea74a8e6431ff074cc4d55dc298321",
}
RANDOM = sorted(n for n, m in builtin.builtins().items() if m.kind == "random")


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


def digest(folder):
    found = hashlib.sha256()
    for _, tensor in sorted(load_file(Path(folder) / "model.safetensors").items()):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", RANDOM)
def test_weights_are_the_same_on_every_machine(folders, name):
    assert digest(folders[name]) == KNOWN[name]


@pytest.mark.parametrize("name", RANDOM)
def test_weights_do_not_depend_on_the_seed_of_the_caller(name, tmp_path):
    torch.manual_seed(123)
    random_models.builders()[name].build(tmp_path)
    assert digest(tmp_path) == KNOWN[name]


@pytest.mark.parametrize("name", RANDOM)
def test_the_listing_says_that_weights_are_random(name):
    assert "RANDOM" in builtin.builtins()[name].description


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
