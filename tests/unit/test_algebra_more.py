"""Algebra on adapters: smaller, converted and extracted ones, and everything that is no plain matrix."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lora_ft_adapters import AdapterError, load_adapter
from lora_ft_adapters.algebra import (
    AdapterDeltas,
    Guard,
    attach,
    combine,
    compress,
    convert,
    delta_weights,
    extract,
    merged_deltas,
    share,
)
from tests.conftest import tiny_llama
from tests.unit.test_algebra import IDS, adapted, logits, reloaded


class Parts(nn.Module):
    """One layer of each kind that has a bias of its own, and one that has none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 12)
        self.conv = nn.Conv1d(12, 10, 3, padding=1)
        self.image = nn.Conv2d(1, 4, (3, 3))
        self.turned = Conv1D(6, 10)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 5)

    def forward(self, ids):
        hidden = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        hidden = self.image(hidden[:, None]).mean((1, 2))[:, None, :1] + hidden
        return self.out(self.norm(self.turned(hidden.contiguous())))


@pytest.fixture(scope="module")
def base():
    return tiny_llama(50)


@pytest.fixture(scope="module")
def parts():
    return Parts().eval()


@pytest.fixture
def _peft_on_plain_modules():
    """PEFT warns that it cannot read the config of a model that has none, and that it sets fan_in_fan_out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(config|fan_in_fan_out|no bias).*")
        yield


def output(model):
    with torch.no_grad():
        return model(IDS)


@pytest.mark.usefixtures("_peft_on_plain_modules")
@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({"r": 3, "use_rslora": True}, ["embed", "conv", "image", "turned", "out"]),
        ({"r": 3, "use_dora": True}, ["embed", "conv", "image", "turned", "out"]),
        ({"r": 3, "lora_bias": True}, ["conv", "image", "turned", "out"]),
        ({"type": "ia3", "feedforward_modules": []}, ["image", "turned", "out"]),  # scales weight and bias
        ({"type": "oft", "oft_block_size": 2, "r": 0}, ["out"]),
        ({"type": "lokr", "r": 2}, ["conv", "image", "out"]),
    ],
    ids=lambda v: v.get("type", "-".join(v)) if isinstance(v, dict) else "",
)
def test_embeddings_convolutions_and_transposed_layers_come_out_the_same(parts, options, targets, tmp_path):
    model = adapted(parts, options, target_modules=targets)
    assert (output(model) - output(parts)).abs().max() > 0.01
    again = reloaded(convert(AdapterDeltas(model)), parts, tmp_path)
    assert torch.allclose(output(again), output(model), atol=1e-5)
    found = AdapterDeltas(again, "again")
    for name, delta in delta_weights(model):
        assert torch.allclose(found[name].weight(), delta.weight(), atol=1e-6), name
        assert delta.weight().shape == parts.get_submodule(name).weight.shape


@pytest.mark.usefixtures("_peft_on_plain_modules")
def test_a_merge_of_peft_that_differs_from_the_adapters_outputs_is_refused(parts):
    """PEFT 0.21.2 merges OFT on Conv2d into weights that give other outputs than the adapter does."""
    model = adapted(parts, {"type": "oft", "oft_block_size": 3, "r": 0}, target_modules=["image"])
    with pytest.raises(AdapterError, match="merge of oft on a Conv2d is not what the adapter computes"):
        list(delta_weights(model))


@pytest.mark.usefixtures("_peft_on_plain_modules")
def test_a_bias_that_changes_is_kept_or_refused_never_lost(parts, tmp_path):
    biased = adapted(parts, {"r": 3, "lora_bias": True}, target_modules=["out"])
    embedded = adapted(parts, {"r": 3}, target_modules=["embed"])
    result = combine([AdapterDeltas(biased), AdapterDeltas(embedded)], [1.0, 1.0])
    with pytest.raises(AdapterError, match=r"lora_bias does not go with an embedding \(embed\)"):
        result.config(parts)
    layer = biased.base_model.model.out
    (delta,) = [d for _, d in delta_weights(biased)]
    assert torch.allclose(delta.bias, layer.lora_B.default.bias.double() * layer.scaling["default"])
    whole = adapted(parts, {"r": 3, "bias": "all"}, target_modules=["out"])
    for name, parameter in whole.named_parameters():
        if name.endswith("bias"):
            parameter.data += 1.0
    with pytest.raises(AdapterError, match="overwrites the base's own biases"):
        list(delta_weights(whole))
    known = AdapterDeltas(whole, base=parts)
    assert torch.allclose(known["out"].bias, (whole.base_model.model.out.base_layer.bias - parts.out.bias).double())
    assert {"norm", "conv", "turned", "out"} <= set(known)
    again = reloaded(combine([known], [1.0]), parts, tmp_path)
    assert torch.allclose(output(again), output(whole), atol=1e-5)


def test_modules_to_save_and_trainable_tokens_are_carried_along(base, tmp_path):
    options = {"r": 2, "modules_to_save": ["norm"], "trainable_token_indices": {"embed_tokens": [3, 5]}}
    one = adapted(base, options, 1)
    two = adapted(base, options | {"trainable_token_indices": {"embed_tokens": [5, 7]}}, 2)
    alone = reloaded(combine([AdapterDeltas(one)], [1.0]), base, tmp_path / "one")
    assert torch.allclose(logits(alone), logits(one), atol=1e-5)
    name = "base_model.model.model.norm.weight"
    kept = load_file(tmp_path / "one" / "adapter_model.safetensors")[name]
    assert torch.equal(kept, one.base_model.model.model.norm.modules_to_save.default.weight)
    result = combine([AdapterDeltas(one), AdapterDeltas(two)], [0.5, 2.0])
    result.write(tmp_path / "two", result.config(base))
    found = load_file(tmp_path / "two" / "adapter_model.safetensors")
    norms = [m.base_model.model.model.norm.modules_to_save.default.weight for m in (one, two)]
    plain = base.model.norm.weight
    assert torch.allclose(found[name], plain + 0.5 * (norms[0] - plain) + 2 * (norms[1] - plain), atol=1e-6)
    rows = [m.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default for m in (one, two)]
    table = base.model.embed_tokens.weight
    wanted = [
        table[3] + 0.5 * (rows[0][0] - table[3]),
        table[5] + 0.5 * (rows[0][1] - table[5]) + 2 * (rows[1][0] - table[5]),
        table[7] + 2 * (rows[1][1] - table[7]),
    ]
    got = found["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert torch.allclose(got, torch.stack(wanted), atol=1e-6)
    stock = PeftModel.from_pretrained(share(base), str(tmp_path / "two"), adapter_name="again").eval()
    assert torch.allclose(logits(stock), logits(attach(result, base)), atol=1e-6)


def test_one_module_adapted_by_one_and_replaced_by_another_is_refused(base):
    saved = adapted(base, {"r": 2, "modules_to_save": ["o_proj"]})
    lora = adapted(base, {"r": 2}, target_modules=["o_proj"])
    with pytest.raises(AdapterError, match=r"o_proj is adapted and replaced as a whole by different adapters"):
        combine([AdapterDeltas(saved), AdapterDeltas(lora)], [1.0, 1.0])


def test_a_start_that_moves_the_base_is_measured_from_the_base_itself(base, tmp_path):
    model = adapted(base, {"r": 4, "init_lora_weights": "pissa"})
    again = reloaded(combine([AdapterDeltas(model, base=base)], [1.0]), base, tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"type": "prompt_tuning", "num_virtual_tokens": 4}, "changes no weight"),
        ({"type": "lily"}, "lily cannot be merged"),
        ({"type": "poly"}, "poly cannot be merged"),
        ({"r": 2, "alora_invocation_tokens": [1]}, "lora cannot be merged"),
    ],
)
def test_a_method_that_cannot_merge_is_refused_with_the_reason(base, options, said):
    targets = {} if options.get("type") == "prompt_tuning" else {"target_modules": ["q_proj"]}
    options = {"target_modules": None, **options, **targets}
    if not targets:
        del options["target_modules"]
    with pytest.raises(AdapterError, match=said):
        list(delta_weights(_model(base, options)))


def _model(base, options):
    from peft import get_peft_model

    from lora_ft_adapters import build_config

    options = dict(options)
    return get_peft_model(share(base), build_config(options.pop("type", "lora"), options, "CAUSAL_LM"))


def test_a_quantised_base_serves_plain_lora_only(base):
    model = adapted(base, {"r": 2})
    dora = adapted(base, {"r": 2, "use_dora": True})
    for one in (model, dora):
        for layer in one.base_model.model.model.layers:
            weight = layer.self_attn.q_proj.base_layer.weight
            stored = nn.Parameter(weight.data.to(torch.int8), requires_grad=False)  # as bitsandbytes stores it
            layer.self_attn.q_proj.base_layer.weight = stored
    assert len(list(delta_weights(model))) == 6
    with pytest.raises(AdapterError, match="quantised"):
        list(delta_weights(dora))


@pytest.mark.parametrize(
    "options",
    [
        {"type": "lokr", "r": 2},
        {"type": "oft", "oft_block_size": 4, "r": 0},
        {"type": "ia3", "feedforward_modules": []},
    ],
    ids=["lokr", "oft", "ia3"],
)
def test_a_conversion_states_its_error_truly(base, options):
    source = AdapterDeltas(adapted(base, options))
    for result in (convert(source, rank=3), convert(source, energy=0.9), convert(source)):
        for m in result.modules:
            f, wanted = result.factors[m.name], source[m.name].matrix()
            true = float((f.left.double() @ f.right.double() - wanted).norm() / wanted.norm())
            assert true == pytest.approx(m.error, rel=1e-4, abs=3e-7)
            values = torch.linalg.svdvals(wanted)
            assert m.error == pytest.approx(float(values[m.rank :].norm() / values.norm()), rel=1e-6, abs=1e-7)
    cut = convert(source, energy=0.9)
    for m in cut.modules:
        share_kept = torch.linalg.svdvals(source[m.name].matrix()).square().cumsum(0)
        share_kept /= share_kept[-1].clone()
        assert float(share_kept[m.rank - 1]) >= 0.9
        assert m.rank == 1 or float(share_kept[m.rank - 2]) < 0.9


def test_compress_finds_the_smallest_rank_that_keeps_the_metric(base):
    model = adapted(base, {"r": 8, "use_rslora": True})
    for layer in (m for m in model.modules() if hasattr(m, "lora_A") and m.lora_A):
        layer.lora_A.default.weight.data *= 0.4 ** torch.arange(8.0)[:, None]  # each rank matters less than the last
    wanted = logits(model)
    source = AdapterDeltas(model)

    def distance(other):
        return float((logits(other) - wanted).square().mean())

    by_rank = [distance(attach(convert(source, rank=r), base)) for r in range(1, 9)]
    tolerance = (by_rank[3] + by_rank[4]) / 2
    first = next(r for r, d in enumerate(by_rank, 1) if d <= tolerance)
    found = compress(source, guard=Guard(distance, tolerance, base))
    assert found.result.rank == first
    assert found.kept <= found.whole + tolerance
    assert found.kept == pytest.approx(by_rank[first - 1], rel=1e-3)
    assert found.tried <= 5
    assert compress(source, rank=first + 1, guard=Guard(distance, tolerance, base)).result.rank == first + 1
    energy = compress(source, energy=0.3, guard=Guard(distance, tolerance, base))
    assert energy.cut.energy > 0.3
    assert energy.kept <= tolerance + energy.whole
    nothing = compress(source, guard=Guard(distance, 1e-12, base))
    assert (nothing.result.rank, nothing.result.error) == (8, pytest.approx(0, abs=1e-7))
    with pytest.raises(AdapterError, match="metric is nan"):
        compress(source, guard=Guard(lambda m: float("nan"), 0.1, base))
    with pytest.raises(AdapterError, match="needs a rank"):
        compress(source)
    with pytest.raises(AdapterError, match="not both"):
        compress(source, rank=1, energy=0.5)


def tuned(model, seed=3):
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return other


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_extract_reproduces_a_fully_tuned_model_at_full_rank(family, base, tmp_path):
    """Llama ties its head to the embedding; GPT-2 has transposed layers with biases, and ties too."""
    if family == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        base = GPT2LMHeadModel(config).eval()
    full = tuned(base)
    result = extract(base, full)
    assert result.error < 1e-7
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|no bias|a tied layer is part).*")
        again = reloaded(result, base, tmp_path / "a")
    assert torch.allclose(logits(again), logits(full), atol=1e-4)
    lower = extract(base, full, rank=2)
    assert {m.rank for m in lower.modules} == {2}
    assert 0.1 < lower.error < 1
    for folder, model in (("base", base), ("tuned", full)):
        model.save_pretrained(tmp_path / folder, max_shard_size="4KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    read = extract(tmp_path / "base", tmp_path / "tuned", model=base, energy=0.9)
    direct = extract(base, full, energy=0.9)
    assert {m.name: m.rank for m in read.modules} == {m.name: m.rank for m in direct.modules}
    assert read.saved.keys() == direct.saved.keys()


def test_extract_refuses_models_that_do_not_match_and_names_the_first_three(base, tmp_path):
    weights = {n: t.clone() for n, t in base.state_dict().items()}
    other = {n: t for n, t in weights.items() if "q_proj" not in n}
    other |= {"model.norm.weight": torch.zeros(3), "more": torch.zeros(1)}
    with pytest.raises(AdapterError, match=r"q_proj.weight is only in the base.*more is only in the tuned.*and 1 more"):
        extract(weights, other, model=base)
    with pytest.raises(AdapterError, match="changes nothing"):
        extract(base, base)
    with pytest.raises(AdapterError, match="weights by name alone"):
        extract(weights, weights)
    with pytest.raises(AdapterError, match="one tensor in the base's model but two"):
        extract(base, weights | {"lm_head.weight": weights["lm_head.weight"] + 1})
    with pytest.raises(AdapterError, match="no safetensors"):
        extract(tmp_path, tmp_path, model=base)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(AdapterError, match="no file of its folder"):
        extract(tmp_path, tmp_path, model=base)


def test_a_damaged_adapter_is_refused_and_the_base_stays_as_it_was(base, tmp_path):
    before = {n: t.clone() for n, t in base.state_dict().items()}
    model = adapted(base, {"r": 2, "use_dora": True})
    result = combine([AdapterDeltas(model)], [1.0])
    result.write(tmp_path, result.config(base, base_name="org/base"))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(n for n in tensors if n.endswith("lora_A.weight"))
    save_file({**tensors, first: tensors[first] * float("nan")}, path)
    with pytest.raises(AdapterError, match="NaN"):
        convert(AdapterDeltas(load_adapter(share(base), tmp_path)))
    assert str(tmp_path) not in (tmp_path / "adapter_config.json").read_text()
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_sparse_merges_treat_replaced_modules_by_the_same_rule(base):
    models = [adapted(base, {"r": 2, "modules_to_save": ["norm"]}, i) for i in (1, 2)]
    sources = [AdapterDeltas(m) for m in models]
    merged = dict(merged_deltas(sources, [1.0, 1.0], "magnitude", density=0.25))["model.norm"]
    changes = [s["model.norm"].change["weight"] for s in sources]
    kept = [torch.where(c.abs() >= c.abs().sort().values[-8], c, 0.0) for c in changes]  # 8 of 32
    assert torch.allclose(merged.change["weight"], kept[0] + kept[1])
