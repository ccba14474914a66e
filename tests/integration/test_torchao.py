"""torchao's weights are tensors of a kind of their own; `make test-slow` installs the package for these tests alone."""

import pytest

import lora_ft
from lora_ft.errors import UsageError

pytest.importorskip("torchao", reason="make test-slow installs it beside")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("config", ["int8_weight_only", "float8_weight_only"])
def test_a_run_on_torchaos_weights_ends_and_merges_into_either_base(config, recipe, tmp_path):
    recipe = {**recipe, "quant": f"torchao:{config}"}
    recipe["train"] = recipe["train"] | {"steps": 12, "learning_rate": 1e-2}
    run = lora_ft.train(recipe, out=tmp_path / "run")
    after = run.metrics["after"]["loss"]
    assert after < run.metrics["before"]["loss"] - 0.2
    assert lora_ft.evaluate_run(run)[0]["after"]["loss"] == pytest.approx(after, rel=1e-4)  # from the cache
    figures = lora_ft.merge(run, tmp_path / "auto", dtype="float32")
    assert figures["loss_dequantised"] == pytest.approx(after, rel=1e-3)
    assert figures["loss_original"] != figures["loss_dequantised"]  # the rounding is there
    for into in ("original", "dequantised"):
        lora_ft.merge(run, tmp_path / into, dtype="float32", into=into)
        assert lora_ft.unmerge(tmp_path / into, run, tmp_path / f"{into} back")["weights_difference"] < 1e-5


def test_a_format_without_gradient_on_a_cpu_is_refused_before_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="no product with a gradient on a CPU"):
        lora_ft.train({**recipe, "quant": "torchao:int4_weight_only"}, out=tmp_path / "run")
