"""Merge-aware training: what is trained is, bit for bit, the model that one 4-bit or 8-bit file will hold."""

from contextlib import nullcontext

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_ft.models.quantised import keep_backward
from lora_ft.registry import QUANTIZERS
from lora_ft_adapters import AdapterError
from lora_ft_adapters.fast.merge_aware import MergeAware, merged_weight, requantised, values

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 97}
IDS = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _quantised(folder, kind):
    arguments = BitsAndBytesConfig(**KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=arguments, dtype=torch.float32)
    keep_backward(model)
    return model.eval()


def _adapted(folder, kind, **options):
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(_quantised(folder, kind), LoraConfig(**options)).eval()


def _stored_again(model, plain, folder, kind):
    """The merged model written in full and quantised by plain Transformers."""
    dense = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for path, layer in MergeAware(model).layers.items():
        dense.get_submodule(path.removeprefix("base_model.model.")).weight.data.copy_(merged_weight(layer))
    dense.save_pretrained(folder)
    return _quantised(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_file_that_is_shipped_has_the_logits_that_were_trained(plain, tmp_path, kind):
    model = _adapted(plain, kind)
    side_by_side = model(IDS).logits
    with MergeAware(model) as aware:
        assert len(aware.layers) == 14
        trained = model(IDS).logits
        with model.disable_adapter():
            without = model(IDS).logits
    shipped = _stored_again(model, plain, tmp_path, kind)(IDS).logits
    assert torch.equal(trained, shipped)
    assert not torch.allclose(side_by_side, shipped, atol=1e-3)  # what merging QLoRA into 4 bits costs
    assert torch.equal(without, _quantised(plain, kind)(IDS).logits)
    assert torch.equal(model(IDS).logits, side_by_side)  # switched off without a trace


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_quantiser_of_the_recipe(plain, kind):
    layer = MergeAware(_adapted(plain, kind)).layers["base_model.model.model.layers.0.mlp.up_proj"]
    merged = merged_weight(layer)
    options = {} if kind != "fp4" else {"bnb_4bit_use_double_quant": False}
    expected = QUANTIZERS.get(kind).configure(options).round_trip(merged, torch.float32)
    assert torch.equal(values(requantised(layer.get_base_layer(), merged)).float(), expected)
    assert not torch.equal(expected, merged)


def test_the_gradient_is_that_of_the_straight_through_formula(plain):
    model = _adapted(plain, "nf4")
    layer = MergeAware(model).layers["base_model.model.model.layers.0.mlp.up_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 5, 64, requires_grad=True)
    weight = torch.randn(3, 5, 128)
    m = values(layer.get_base_layer()) + layer.scaling["default"] * b @ a
    q = values(requantised(layer.get_base_layer(), m.detach()))
    wanted = torch.autograd.grad(((x @ (m + (q - m).detach()).t()) * weight).sum(), (x, a, b))
    with MergeAware(model):
        got = torch.autograd.grad((layer(x) * weight).sum(), (x, a, b))
    for w, g in zip(wanted, got, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_write_that_torch_does_not_count_is_seen(plain):
    model = _adapted(plain, "nf4")
    with MergeAware(model) as aware:
        before = model(IDS).logits
        for layer in aware.layers.values():
            layer.lora_B["default"].weight.data.zero_()
        after = model(IDS).logits
    assert not torch.allclose(before, after)


def _trained(model, steps):
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_loss_that_training_saw_is_the_loss_of_the_file(plain, tmp_path):
    losses = {}
    for way in (True, False):
        model = _adapted(plain, "nf4", init_lora_weights=True)
        with MergeAware(model) if way else nullcontext():
            before = float(model(IDS, labels=IDS).loss.detach())
            _trained(model, 40)
            with torch.no_grad():
                own = float(model(IDS, labels=IDS).loss)
        with torch.no_grad():
            shipped = float(_stored_again(model, plain, tmp_path / str(way), "nf4")(IDS, labels=IDS).loss)
        losses[way] = (before, own, shipped)
    before, own, shipped = losses[True]
    assert shipped == own < before - 0.5
    before, own, shipped = losses[False]
    assert shipped > own + 0.005  # beside its base it was better than merged


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout has no meaning"),
        ({"use_dora": True}, "does more than add to the weight"),
        ({"lora_bias": True}, "lora_bias changes the bias"),
    ],
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_what_is_no_sum_with_the_weight_is_refused(plain, options, reason):
    with pytest.raises(AdapterError, match=reason):
        MergeAware(_adapted(plain, "nf4", **options))


def test_a_method_or_base_without_such_a_layer_is_refused(plain):
    ia3 = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    dense = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for model in (get_peft_model(_quantised(plain, "nf4"), ia3), get_peft_model(dense, LoraConfig(r=2))):
        with pytest.raises(AdapterError, match="this adapter has no such layer"):
            MergeAware(model)
