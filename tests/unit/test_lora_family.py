"""LoRA's variants against PEFT's own way of doing them, and against the formula in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn

from lora_ft.errors import UsageError
from lora_ft.recipe import TrainSection
from lora_ft.training.optim import build_optimizer
from lora_ft.training.rates import below_top, block_places, rate_scales, waking
from lora_ft_adapters import (
    AdapterError,
    Calibration,
    add_adapter,
    build_config,
    load_adapter,
    resolve_targets,
    save_adapter,
    trainable,
)
from lora_ft_adapters.behaviour import driver_of, quiet
from lora_ft_adapters.registry import find_method
from tests.conftest import tiny_llama

IDS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(0))


def _loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_shifted_start_trains_as_pefts_own_that_changes_the_base(name):
    """Plain SGD, so that both see the same arithmetic: W - s B0 A0 in the base, or s (B A - B0 A0) beside it."""
    ours = add_adapter(tiny_llama(50), build_config(name, {"r": 4}, "CAUSAL_LM", tiny_llama(50)))
    with quiet():
        theirs = get_peft_model(
            tiny_llama(50),
            LoraConfig(r=4, lora_alpha=32, init_lora_weights=name, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    driver = driver_of(ours)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for _, p in trainable(model)], lr=0.05)
        for step in range(1, 4):
            _loss(model.train()).backward()
            if model is ours:
                driver.before_step()
            optimizer.step()
            if model is ours:
                driver.after_step(step)
            optimizer.zero_grad()
    with torch.no_grad():
        a, b = ours.eval()(input_ids=IDS).logits, theirs.eval()(input_ids=IDS).logits
    assert torch.allclose(a, b, atol=2e-5)


def test_the_frozen_half_stays_frozen_under_weight_decay():
    model = add_adapter(tiny_llama(50), build_config("pissa", {"r": 2}, "CAUSAL_LM", tiny_llama(50)))
    driver = driver_of(model)
    weights = [layer.lora_A["default"].weight for layer in model.modules() if hasattr(layer, "lora_A")]
    frozen = [w.detach()[2:].clone() for w in weights]
    optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=0.1, weight_decay=0.5)
    for step in (1, 2):
        _loss(model).backward()
        driver.before_step()
        optimizer.step()
        driver.after_step(step)
    assert all(torch.equal(w.detach()[2:], f) for w, f in zip(weights, frozen, strict=True))
    assert not any(torch.equal(w.detach()[:2], f) for w, f in zip(weights, frozen, strict=True))


def test_a_shifted_adapter_is_plain_lora_on_the_original_base_for_stock_peft(tmp_path):
    from peft import PeftModel

    options = {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    model = add_adapter(tiny_llama(50), build_config("pissa", options, "CAUSAL_LM", tiny_llama(50))).eval()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, tiny_llama(50)(IDS).logits, atol=1e-5)
        for name, p in trainable(model):
            p[:2].mul_(1.5) if "lora_A" in name else p[:, :2].mul_(1.5)
        want = model(IDS).logits
    save_adapter(model, tmp_path)
    with quiet():
        stock = PeftModel.from_pretrained(tiny_llama(50), str(tmp_path)).eval()
    assert torch.allclose(stock(IDS).logits, want, atol=1e-6)


def test_lorafa_equals_pefts_optimizer(monkeypatch):
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)  # or it projects in 8 bits
    ours = add_adapter(tiny_llama(50), build_config("lorafa", {"r": 4, "lora_alpha": 8}, "CAUSAL_LM", tiny_llama(50)))
    theirs = copy.deepcopy(ours)
    driver, rate = driver_of(ours), 1e-2
    optimizer = torch.optim.AdamW([p for _, p in trainable(ours)], lr=rate, eps=1e-12, weight_decay=0.0)
    reference = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=rate)
    for group in reference.param_groups:  # it adds eps before the correction of bias, which matters at small gradients
        group["eps"] = 1e-12
    for step in (1, 2, 3):
        _loss(ours).backward()
        driver.before_step()
        optimizer.step()
        driver.after_step(step)
        optimizer.zero_grad()
        _loss(theirs).backward()
        reference.step()
        reference.zero_grad()
    for (name, a), (_, b) in zip(trainable(ours), trainable(theirs), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm(), name


def test_lorafa_projects_as_the_formula_says():
    model = add_adapter(tiny_llama(50), build_config("lorafa", {"r": 4, "lora_alpha": 8}, "CAUSAL_LM", tiny_llama(50)))
    driver = driver_of(model)
    _loss(model).backward()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, grad = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.grad.double()
    want = grad @ torch.linalg.inv(a @ a.T) / 2.0**2
    driver.before_step()
    assert torch.allclose(layer.lora_B["default"].weight.grad.double(), want, rtol=1e-4, atol=1e-7)


def test_loraga_starts_along_the_gradient_of_the_full_weight():
    base = tiny_llama(50)
    for p in base.parameters():
        p.requires_grad_(True)
    _loss(base).backward()
    gradient = base.model.layers[0].mlp.up_proj.weight.grad.double()
    data = Calibration([{"input_ids": IDS}], lambda model, _: _loss(model))
    model = add_adapter(tiny_llama(50), build_config("loraga", {"r": 4}, "CAUSAL_LM", tiny_llama(50)), data=data)
    b0 = model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight[:, :4].detach().double()
    left = torch.linalg.svd(gradient)[0][:, 4:8]  # ArB2r: B takes the second r directions
    overlap = torch.linalg.svdvals(torch.linalg.qr(b0)[0].T @ left)
    assert overlap.min() > 0.99


def test_eva_starts_at_the_principal_directions_of_the_inputs(tmp_path):
    data = Calibration([{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], lambda model, _: _loss(model))
    options = {"r": 4, "eva_config": {"rho": 1.0}}
    model = add_adapter(tiny_llama(50), build_config("eva", options, "CAUSAL_LM", tiny_llama(50)), data=data)
    seen = []
    base = tiny_llama(50)
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: seen.append(x[0].flatten(0, 1)))
    base(IDS)
    x = seen[0].double()
    want = torch.linalg.svd(x - x.mean(0))[2][:4]
    a = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach().double()
    assert torch.linalg.svdvals(torch.linalg.qr(a.T)[0].T @ want.T).min() > 0.95
    save_adapter(model, tmp_path)
    load_adapter(tiny_llama(50), tmp_path)  # needs no data any more


def test_loraplus_and_layer_decay_set_the_rate_of_each_parameter():
    model = add_adapter(tiny_llama(50), build_config("loraplus", {"r": 2}, "CAUSAL_LM", tiny_llama(50)))
    named = list(trainable(model))
    names = [n for n, _ in named]
    settings = TrainSection(layer_lr_decay=0.5, lr_multipliers={"*down_proj*": 3.0})
    scales = rate_scales(names, settings, find_method("loraplus").lr_scales, block_places(model))

    def scale(block: int, layer: str, factor: str) -> float:
        return next(s for n, s in scales.items() if f"layers.{block}." in n and layer in n and factor in n)

    assert scale(1, "q_proj", "lora_B") / scale(1, "q_proj", "lora_A") == 16
    assert scale(0, "q_proj", "lora_B") == scale(1, "q_proj", "lora_B") / 2
    assert scale(1, "down_proj", "lora_A") == 3 * scale(1, "up_proj", "lora_A")
    optimizer = build_optimizer(named, settings, scales)
    held = {id(p): g["scale"] for g in optimizer.param_groups for p in g["params"]}
    assert all(held[id(p)] == scales[n] for n, p in named)


def test_blocks_wake_from_the_top_and_embeddings_come_last():
    names = ["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "head.weight"]

    def place(name: str) -> int | None:
        return 2 - int(name.split(".")[1]) if name.startswith("layers") else None

    assert list(below_top(names, place).values()) == [3, 2, 1, 0, -1]
    assert list(waking(names, 10, 100, place).values()) == [30, 20, 10, 0, 0]
    assert set(waking(names, None, 5, place).values()) == {0}
    with pytest.raises(UsageError, match="leaves 2 of 5 tensors untrained after 20 steps"):
        waking(names, 10, 20, place)
    with pytest.raises(UsageError, match="nothing that trains lies in one"):
        waking(["prompt.weight"], 10, 20, place)


def test_encoder_and_decoder_blocks_count_from_their_own_top():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(num_layers=4, num_decoder_layers=2, **sizes))
    chosen = resolve_targets(model, ["q", "layers:-2"])
    assert {n.split(".layer.")[0] for n in chosen} == {
        "encoder.block.2", "encoder.block.3", "decoder.block.0", "decoder.block.1",
    }  # fmt: skip
    adapted = add_adapter(model, build_config("lora", {"r": 2, "target_modules": ["q"]}, "SEQ_2_SEQ_LM", model))
    names = [n for n, _ in trainable(adapted)]
    depth = below_top(names, block_places(adapted))
    assert {d for n, d in depth.items() if "encoder.block.3." in n or "decoder.block.1." in n} == {0}
    assert {d for n, d in depth.items() if "encoder.block.0." in n} == {3}
    with pytest.raises(AdapterError, match="no range"):
        resolve_targets(model, ["q", "layers:-0"])
