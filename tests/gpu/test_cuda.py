"""On a CUDA device: the same path, in bfloat16 and on a 4-bit base."""

import pytest
import torch

import lora_ft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_training_on_a_gpu_learns_and_merges(recipe, tmp_path):
    recipe["train"] |= {"dtype": "auto", "steps": 20}
    run = lora_ft.train(recipe, out=tmp_path / "run")
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
    assert lora_ft.merge(run, tmp_path / "merged")["max_difference"] <= 1e-3


def test_a_four_bit_base_trains(recipe, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the quant extra")
    run = lora_ft.train({**recipe, "quant": "nf4"}, out=tmp_path / "run")
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
