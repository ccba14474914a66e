"""The methods PEFT lacks: what each must do on a model, and the bottleneck family against the papers' formulas."""

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from lora_ft_adapters.blocks import places, transformer_blocks
from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.plugin import PluginType, plug_in
from lora_ft_adapters.registry import build_config, list_methods
from tests.conftest import tiny_llama

METHODS = {
    "houlsby": {"r": 4},
    "pfeiffer": {"r": 4, "non_linearity": "gelu"},
    "parallel": {"r": 4},
    "compacter": {"r": 4, "phm_dim": 2},
    "loreft": {},
    "noreft": {"positions": "f2+l1"},
    "direft": {},
    "bitfit": {"add_bias": True},
    "head": {"mlp_dim": 4},
    "layers": {"last": 1},
    "full": {},
}
MERGING = {"layers", "full"}
IDS = torch.tensor([[3, 9, 4, 1, 5], [2, 6, 5, 3, 5]])


def base() -> nn.Module:
    return tiny_llama(16)


def adapted(method: str, model: nn.Module | None = None, name: str = "default", **options):
    model = base() if model is None else model
    task = "CAUSAL_LM" if type(model).__name__.startswith("Llama") else None
    return get_peft_model(model, build_config(method, options, task), name)


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()


def shake(model: nn.Module) -> None:
    """Give every trained number a value that shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.3)


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


def test_all_are_listed_under_their_names_only():
    listed = list_methods()
    assert set(METHODS) <= set(listed)
    assert not [n for n in listed if n.startswith("lora_ft_")]
    config_class = listed["houlsby"].config_class
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING["LORA_FT_BOTTLENECK"]
    plug_in(PluginType("LORA_FT_BOTTLENECK"), config_class, tuner_class)  # again: changes nothing
    with pytest.raises(ValueError, match="taken"):
        plug_in(PluginType("LORA_FT_OTHER"), config_class, tuner_class)


def test_fresh_adapter_changes_nothing_and_training_leaves_the_base_bit_identical(method):
    plain = base()
    want = plain(IDS).logits
    before = {n: p.clone() for n, p in plain.state_dict().items()}
    model = adapted(method, **METHODS[method])
    assert torch.equal(model(IDS).logits, want)
    train(model)
    assert (model(IDS).logits - want).abs().max() > 1e-3, "training must show"
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, want)
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_adapter_loads_under_another_name(method, tmp_path, low_memory):
    model = adapted(method, **METHODS[method])
    train(model)
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    # "weight" and "0" are also parts of parameter names.
    other = PeftModel.from_pretrained(base(), tmp_path, adapter_name="weight", low_cpu_mem_usage=low_memory)
    assert torch.equal(other(IDS).logits, want)
    other.load_adapter(tmp_path, "0")
    other.set_adapter("0")
    assert torch.equal(other(IDS).logits, want)
    other.save_pretrained(tmp_path / "both")
    third = PeftModel.from_pretrained(base(), tmp_path / "both" / "weight", adapter_name="zero")
    assert torch.equal(third(IDS).logits, want)


def test_two_adapters_live_side_by_side(method):
    model = adapted(method, **METHODS[method])
    train(model)
    want = model(IDS).logits
    model.add_adapter("second", build_config(method, METHODS[method], "CAUSAL_LM"))
    assert torch.equal(model(IDS).logits, want)
    model.set_adapter("second")
    assert torch.equal(model(IDS).logits, base()(IDS).logits)
    grads = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grads
    assert all(".second." in n for n in grads)
    model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(model(IDS).logits, want, atol=1e-5)
    model.set_requires_grad("second", requires_grad=False)
    assert all(".default." in n for n, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(IDS).logits, want)


def test_merge_is_exact_or_refused_before_anything_changed(method):
    model = adapted(method, **METHODS[method])
    train(model)
    want = model(IDS).logits
    if method not in MERGING:
        with pytest.raises(NotImplementedError, match="cannot be merged: "):
            model.merge_and_unload()
        with pytest.raises(NotImplementedError, match="cannot be merged: "):
            model.merge_adapter()
        assert torch.equal(model(IDS).logits, want)
        return
    model.merge_adapter()
    assert torch.allclose(model(IDS).logits, want, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base()(IDS).logits)
    assert torch.allclose(model.merge_and_unload(safe_merge=True)(IDS).logits, want, atol=1e-5)


def test_bf16_base_keeps_float32_adapters_and_its_own_dtype(method):
    plain = base().bfloat16()
    want = plain(IDS).logits
    model = adapted(method, plain, **METHODS[method])
    assert torch.equal(model(IDS).logits, want)
    train(model, 1)
    assert model(IDS).logits.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_generate_runs_through_the_adapter(method):
    model = adapted(method, **METHODS[method])
    shake(model)
    out = model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    first = model(IDS).logits[:, -1].argmax(-1)
    assert out.shape == (2, 8)
    assert torch.equal(out[:, 5], first)


def test_adapter_names_that_cannot_be_module_names_are_refused():
    with pytest.raises(AdapterError, match="name"):
        adapted("houlsby", name="v1.2")
    with pytest.raises(AdapterError, match="name"):
        adapted("houlsby", name="keys")


def test_copied_model_has_its_own_adapters():
    model = copy.deepcopy(adapted("parallel", _Seq(), target_modules=["b"], r=2))
    x = torch.randn(2, 6)
    shake(model)
    assert not torch.equal(model(x), _Seq()(x))


class _Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


# ---- against the formulas ----


class _Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)))


class _Mlp(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)

    def forward(self, x):
        return self.down_proj(torch.relu(self.up_proj(x)))


class _Block(nn.Module):
    def __init__(self, d: int, flat: bool) -> None:
        super().__init__()
        self.self_attn = _Attention(d)
        if flat:  # as BERT and OPT: no module holds the feed-forward part
            self.fc1, self.fc2 = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)
        else:
            self.mlp = _Mlp(d)

    def forward(self, x):
        h = x + self.self_attn(x)
        return h + (self.mlp(h) if hasattr(self, "mlp") else self.fc2(torch.relu(self.fc1(h))))


class Toy(nn.Module):
    """Two residual blocks of width 8."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(_Block(8, flat) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _phm(p, name, rule, x):
    s, t = p[f"{name}.s"], p[f"{name}.t"]
    weight = sum(torch.kron(rule[i].contiguous(), (s[i] @ t[i]).contiguous()) for i in range(len(rule)))
    return x @ weight + p[f"{name}.bias"]


def _change(p, method, x, where, rule):
    """up(f(down(x))) of the adapter at `where`, from its saved parameters."""
    if method == "compacter":
        z = _phm(p, f"{where}.down", rule, x)
        return _phm(p, f"{where}.up", rule, 0.5 * z * (1 + torch.erf(z / math.sqrt(2))))
    scale = 4.0 if method == "parallel" else 1.0
    return scale * _linear(p, f"{where}.up", torch.relu(_linear(p, f"{where}.down", x)))


def _reference(p, method, flat, x):
    rule = next((v for k, v in p.items() if k.endswith(".rule")), None)
    first, last = ("fc1", "fc2") if flat else ("mlp.up_proj", "mlp.down_proj")
    for i in range(2):
        b, mark = f"layers.{i}", "lft_compacter_" if method == "compacter" else "lft_bottleneck_"
        a = _linear(p, f"{b}.self_attn.o_proj", torch.tanh(_linear(p, f"{b}.self_attn.q_proj", x)))
        if method in ("houlsby", "compacter"):
            a = a + _change(p, method, a, f"{b}.self_attn.o_proj.{mark}", rule)
        h = x + a
        y = _linear(p, f"{b}.{last}", torch.relu(_linear(p, f"{b}.{first}", h)))
        where = f"{b}.mlp.{mark}" if method == "parallel" and not flat else f"{b}.{last}.{mark}"
        x = h + y + _change(p, method, h if method == "parallel" else y, where, rule)
    return x


def parameters_by_saved_name(model: nn.Module) -> dict[str, nn.Parameter]:
    named = model.base_model.model.named_parameters()
    return {n.replace(".base_layer", "").replace(".default", ""): q for n, q in named}


def assert_same(model, reference, x):
    """Outputs and the gradient of every trained number, within 1e-6 of the reference in float64."""
    mine = parameters_by_saved_name(model)
    theirs = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in mine.items()}
    weight = torch.randn(x.shape, dtype=x.dtype)
    out, want = model(x), reference(theirs, x)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    pairs = [(out, want)] + [(mine[n].grad, theirs[n].grad) for n in mine if mine[n].requires_grad]
    assert len(pairs) > 4
    for got, expected in pairs:
        assert expected.abs().max() > 0
        assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel", "compacter"])
def test_outputs_and_gradients_are_those_of_the_paper(name, flat):
    options = {"r": 4} | ({"phm_dim": 2, "phm_rank": 2} if name == "compacter" else {})
    model = adapted(name, Toy(flat).double(), **options)
    shake(model)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert_same(model, lambda p, v: _reference(p, name, flat, v), x)


def test_compacter_rule_is_one_parameter_saved_once(tmp_path):
    model = adapted("compacter", Toy(), r=4)
    rules = [n for n, _ in model.named_parameters() if n.endswith(".rule")]
    assert len(rules) == 1
    own = adapted("compacter", Toy(), r=4, shared_phm_rule=False)
    assert len([n for n, _ in own.named_parameters() if n.endswith(".rule")]) == 4
    with pytest.raises(AdapterError, match="phm_dim 3 does not divide"):
        adapted("compacter", Toy(), phm_dim=3)


# ---- any module ----


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("name", ["houlsby", "parallel", "compacter"])
def test_convolutions_get_a_1x1_convolution_over_channels(conv, name, tmp_path):
    axes = int(conv.__name__[4])
    x = torch.randn(2, 4, *[5] * axes)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(conv(4, 8, 3, padding=1), nn.ReLU(), nn.Sequential(conv(8, 8, 1)))

    model = adapted(name, make(), target_modules=["2.0"], r=4)
    assert torch.equal(model(x), make()(x))
    shake(model)
    y = make()(x) if name != "parallel" else make()[:2](x)
    adapter = model.base_model.model.get_submodule("2.0").adapters["default"]
    if name != "compacter":
        kernel = [p.detach().reshape(*p.shape, *[1] * axes) for p in (adapter.down.weight, adapter.up.weight)]
        run = getattr(nn.functional, conv.__name__.lower())
        want = run(torch.relu(run(y, kernel[0], adapter.down.bias)), kernel[1], adapter.up.bias)
        assert torch.allclose(model(x) - make()(x), adapter.scaling * want, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path, adapter_name="again")
    assert torch.allclose(loaded(x), model(x), atol=1e-5)


def test_embedding_and_tuple_outputs():
    model = nn.Sequential(nn.Embedding(5, 6), nn.GRU(6, 6))
    ids = torch.tensor([[1, 2]])
    want = model(ids)[0].clone()
    model = adapted("pfeiffer", model, target_modules=["0"], r=2)
    assert torch.equal(model(ids)[0], want)
    shake(model)
    assert not torch.allclose(model(ids)[0], want)


def test_torch_transformer_layers_do_not_skip_the_adapter_in_inference():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = adapted("houlsby", nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), r=4)
    names = model.peft_config["default"].adapted_modules
    assert names == ["layers.0.self_attn", "layers.0.linear2", "layers.1.self_attn", "layers.1.linear2"]
    shake(model)
    x = torch.randn(2, 3, 8)
    want = model.train()(x).detach()
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), want, atol=1e-6)


def test_model_without_blocks_asks_for_targets():
    with pytest.raises(AdapterError, match="no list of transformer blocks") as caught:
        adapted("houlsby", _Seq())
    assert "target_modules" in caught.value.fix


def test_blocks_can_be_chosen_by_number():
    names = adapted("pfeiffer", layers_to_transform=[-1]).peft_config["default"].adapted_modules
    assert names == ["model.layers.1.mlp.down_proj"]
    with pytest.raises(AdapterError, match="names no block"):
        adapted("pfeiffer", layers_to_transform=[7])


def test_short_module_name_does_not_catch_others_that_end_alike():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4, bias=False)))
    config = adapted("bitfit", model).peft_config["default"]
    assert config.adapted_modules == ["0"]


def test_transformer_blocks_of_a_toy_are_found_in_order():
    assert [b.name for b in transformer_blocks(Toy())] == ["layers.0", "layers.1"]
    assert places(transformer_blocks(Toy(flat=True))[0]).reads == "fc1"
