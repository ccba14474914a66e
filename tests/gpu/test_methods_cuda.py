"""The contract of every method on a GPU: bfloat16 base, and 4-bit where the table says so."""

import json

import pytest
import torch

from lora_ft.models.load import original_weights
from lora_ft.models.opening import BaseSpec
from lora_ft.registry import QUANTIZERS
from lora_ft_adapters import list_methods
from lora_ft_adapters.contract import Subject, check
from scripts.methods_table import FACTS
from scripts.survey_methods import NF4_ROUGH, ON_QUANTISED, OPTIONS, ROUGH, llama, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
SAID = json.loads(FACTS.read_text())
TRAINED = [n for n, m in list_methods().items() if not m.refusal]


def _subject(make, **extra) -> Subject:
    batch = {k: v.cuda() for k, v in tokens().items()}
    return Subject(
        make,
        lambda model: model(**batch).logits[:, -10:],
        lambda model, one: model(**one, labels=one["input_ids"]).loss,
        [batch] * 2,
        "CAUSAL_LM",
        **extra,
    )


@pytest.mark.parametrize("name", [n for n in TRAINED if n not in ON_QUANTISED])
def test_a_method_keeps_its_promises_in_bfloat16(name):
    subject = _subject(lambda: llama().bfloat16().cuda(), tolerance=ROUGH)
    assert check(name, subject, OPTIONS.get(name)).faults == []


@pytest.mark.parametrize("name", [n for n in TRAINED if SAID[n]["nf4"] == "yes"])
def test_a_method_keeps_its_promises_on_four_bits(name, tmp_path):
    llama().save_pretrained(tmp_path)
    quantizer = QUANTIZERS.get("nf4")

    def make():
        arguments = quantizer.load_arguments(torch.bfloat16)
        model = (
            BaseSpec(str(tmp_path), "AutoModelForCausalLM")
            .open(dtype=torch.bfloat16, device=torch.device("cuda", 0), arguments=arguments)
            .model
        )
        quantizer.prepare(model)
        return model

    subject = _subject(make, tolerance=max(ROUGH, NF4_ROUGH), merges=False, original=original_weights(str(tmp_path)))
    assert check(name, subject, OPTIONS.get(name)).faults == []
