"""Algebra on adapters: the result does what the formula says, for every variant, and stock PEFT loads it."""

import itertools
import json
import warnings

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import nn

from lora_ft_adapters import AdapterError, build_config
from lora_ft_adapters.algebra import AdapterDeltas, Cut, combine, delta_weights, factorise, merged_deltas, share
from tests.conftest import tiny_llama

IDS = torch.arange(24).reshape(2, 12)
TARGETS = ["q_proj", "v_proj", "down_proj"]
VARIANTS = {
    "lora": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"q_proj": 5}},
    "loha": {"type": "loha", "r": 2},
}


def adapted(base, options, seed=0, **more):
    """A PeftModel over `base` with random weights in every adapter tensor."""
    options = {"target_modules": TARGETS, **options, **more}
    config = build_config(options.pop("type", "lora"), options, "CAUSAL_LM" if hasattr(base, "config") else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(share(base), config).eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def reloaded(result, base, folder):
    """The result, written, and read by stock PEFT under another name."""
    result.write(folder, result.config(base))
    return PeftModel.from_pretrained(share(base), str(folder), adapter_name="again").eval()


def dense(model):
    return {n: d.matrix() for n, d in delta_weights(model)}


@pytest.fixture(scope="module")
def base():
    return tiny_llama(50)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_one_gives_back_the_same_adapter_through_stock_peft(base, variant, tmp_path):
    model = adapted(base, VARIANTS[variant])
    wanted = logits(model)
    assert (wanted - logits(base)).abs().max() > 0.01
    result = combine([AdapterDeltas(model)], [1.0])
    again = reloaded(result, base, tmp_path)
    assert torch.allclose(logits(again), wanted, atol=1e-5)
    assert result.error < 1e-6
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["lora_alpha"], config["use_dora"]) == ("LORA", config["r"], False)
    assert all(s["again"] == 1 for s in _attribute(again, "scaling"))
    for name, delta in dense(model).items():
        error = (AdapterDeltas(again, "again")[name].matrix() - delta).norm() / delta.norm()
        assert error < 1e-6, name


def _attribute(model, name):
    return [getattr(m, name) for m in model.modules() if isinstance(getattr(m, name, None), dict) and hasattr(m, "r")]


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(VARIANTS, 2)))
def test_a_sum_of_any_two_variants_is_the_sum_of_their_changes(base, a, b):
    models = [adapted(base, VARIANTS[a], 1), adapted(base, VARIANTS[b], 2, target_modules=["v_proj", "o_proj"])]
    result = combine([AdapterDeltas(m) for m in models], [0.7, -0.3])
    one, two = (dense(m) for m in models)
    assert {n.rsplit(".", 1)[-1] for n in result.factors} == {"q_proj", "v_proj", "down_proj", "o_proj"}
    for name, f in result.factors.items():
        wanted = 0.7 * one.get(name, 0) - 0.3 * two.get(name, 0)
        got = f.left.double() @ f.right.double()
        assert (got - wanted).norm() / wanted.norm() < 3e-7, name
        assert f.left.dtype == torch.float32


def test_the_change_of_lora_is_b_times_a_times_scaling_and_the_merge_of_dora_to_float64(base):
    model = adapted(base, VARIANTS["patterns"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wanted = layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double() * (5 / 2)
    assert torch.allclose(dense(model)["model.layers.0.self_attn.q_proj"], wanted, rtol=1e-12)
    model = adapted(base, VARIANTS["dora"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight.double()
    moved = (
        weight + layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double() * layer.scaling["default"]
    )
    magnitude = layer.lora_magnitude_vector.default.weight.double()
    wanted = magnitude[:, None] / moved.norm(dim=1, keepdim=True) * moved - weight
    assert torch.allclose(dense(model)["model.layers.0.self_attn.q_proj"], wanted, rtol=1e-10, atol=1e-14)


def test_the_order_of_the_adapters_does_not_matter(base):
    sources = [AdapterDeltas(adapted(base, o, i)) for i, o in enumerate(VARIANTS.values())]
    weights = [0.5, 0.4, -0.3, 0.2, 0.1]
    for how in ("sum", "ties", "magnitude", "dare", "dare_ties"):
        there = dict(merged_deltas(sources, weights, how))
        back = dict(merged_deltas(sources[::-1], weights[::-1], how))
        for name, delta in there.items():
            assert torch.allclose(delta.matrix(), back[name].matrix(), rtol=1e-9, atol=1e-13)


def test_cat_puts_ranks_side_by_side_and_sum_is_never_larger_nor_worse(base):
    models = [adapted(base, {"r": 3}, 1), adapted(base, {"r": 5}, 2)]
    sources = [AdapterDeltas(m) for m in models]
    side, summed = (combine(sources, [0.5, 0.5], how) for how in ("cat", "sum"))
    assert {m.rank for m in side.modules} == {8}
    same = combine([sources[0], sources[0]], [0.25, 0.5])  # one adapter twice is one adapter
    assert {m.rank for m in same.modules} == {3}
    for name, f in summed.factors.items():
        c = side.factors[name]
        wanted = c.left.double() @ c.right.double()
        assert f.left.shape[1] <= c.left.shape[1]
        assert (f.left.double() @ f.right.double() - wanted).norm() / wanted.norm() < 3e-7


def test_svd_is_the_best_of_its_rank_and_its_error_is_the_discarded_singular_values(base):
    sources = [AdapterDeltas(adapted(base, {"r": 4}, i)) for i in (1, 2)]
    result = combine(sources, [1.0, 1.0], "svd", rank=3)
    exact = {n: d.matrix() for n, d in merged_deltas(sources, [1.0, 1.0], "sum")}
    off = whole = 0.0
    for m in result.modules:
        values = torch.linalg.svdvals(exact[m.name])
        assert m.error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-9)
        f = result.factors[m.name]
        got = (f.left.double() @ f.right.double() - exact[m.name]).norm()
        assert float(got) == pytest.approx(m.error * m.norm, rel=1e-5)
        off, whole = off + float(got) ** 2, whole + float(exact[m.name].norm()) ** 2
    assert result.error == pytest.approx((off / whole) ** 0.5, rel=1e-5)
    assert 0.05 < result.error < 1


def reference(changes, weights, how, density):
    """The papers' formulas, entry by entry in float64; `changes` are already dropped for dare."""
    kept = []
    for change in changes:
        flat = change.flatten()
        if how in ("ties", "magnitude"):
            order = sorted(range(len(flat)), key=lambda i: -abs(float(flat[i])))
            for i in order[int(density * len(flat)) :]:
                flat[i] = 0
        kept.append(flat)
    out = []
    for entries in zip(*kept, strict=True):
        values = [float(e) for e in entries]
        if how in ("ties", "dare_ties"):
            sign = 1 if sum(values) >= 0 else -1
            agree = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
            out.append(sum(agree) / len(agree) if agree else 0.0)
        else:
            out.append(sum(w * v for w, v in zip(weights, values, strict=True)))
    return torch.tensor(out, dtype=torch.float64).reshape(changes[0].shape)


@pytest.mark.parametrize("how", ["ties", "magnitude"])
def test_trimmed_merges_equal_the_formula_and_peft_on_the_whole_change(base, how):
    models = [
        adapted(base, VARIANTS[v], i, target_modules=["v_proj"]) for i, v in enumerate(("rslora", "dora", "loha"))
    ]
    sources, weights = [AdapterDeltas(m) for m in models], [1.0, 0.5, 0.7]
    peft = {"ties": merge_utils.ties, "magnitude": merge_utils.magnitude_prune}[how]
    for name, delta in merged_deltas(sources, weights, how, density=0.3):
        changes = [s[name].matrix() for s in sources]
        assert torch.allclose(delta.matrix(), reference([c.clone() for c in changes], weights, how, 0.3), rtol=1e-9)
        theirs = peft(changes, torch.tensor(weights, dtype=torch.float64), 0.3)
        assert torch.allclose(delta.matrix(), theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("how", ["dare", "dare_ties"])
def test_dare_drops_at_random_rescales_and_is_seeded(base, how):
    sources = [AdapterDeltas(adapted(base, VARIANTS["lora"], i, target_modules=["down_proj"])) for i in (1, 2)]
    name = next(iter(sources[0]))
    alone = [dict(merged_deltas([{}, s] if i else [s, {}], [1.0, 1.0], "dare", density=0.4, seed=3))[name].matrix()
             for i, s in enumerate(sources)]  # fmt: skip
    for dropped, source in zip(alone, sources, strict=True):
        share_kept = float((dropped != 0).double().mean())
        assert share_kept == pytest.approx(0.4, abs=0.05)  # 2048 entries: 4.6 standard deviations
        assert torch.allclose(dropped, torch.where(dropped != 0, source[name].matrix() / 0.4, 0.0))
    merged = {s: dict(merged_deltas(sources, [1.0, 0.5], how, density=0.4, seed=s))[name].matrix() for s in (3, 4)}
    assert torch.allclose(merged[3], reference([a.clone() for a in alone], [1.0, 0.5], how, 0.4), rtol=1e-9)
    assert not torch.equal(merged[3], merged[4])


def test_full_density_and_one_adapter_change_nothing(base):
    source = AdapterDeltas(adapted(base, VARIANTS["dora"]))
    for how in ("ties", "dare", "dare_ties", "magnitude"):
        for name, delta in merged_deltas([source], [1.0], how, density=1.0):
            assert torch.allclose(delta.matrix(), source[name].matrix(), rtol=1e-12), how


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_pefts_own_weighted_sum_is_wrong_where_ours_is_right(base, variant, tmp_path):
    """peft#3761: `linear` mixes A with A and B with B under one scaling, and drops DoRA's magnitudes."""
    options = {"target_modules": TARGETS, **VARIANTS[variant]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(share(base), LoraConfig(task_type="CAUSAL_LM", **options), adapter_name="a")
        model.add_adapter("b", LoraConfig(task_type="CAUSAL_LM", **options))
        model.eval()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".a" in name or ".b" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        sources = [AdapterDeltas(model, n) for n in "ab"]
        wanted = share(base)
        for name, delta in merged_deltas(sources, [0.5, 0.5], "sum"):
            wanted.get_submodule(name).weight.data = (base.get_submodule(name).weight.double() + delta.weight()).float()
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "theirs", combination_type="cat")
        model.set_adapter("theirs")
    moved = float((logits(wanted) - logits(base)).abs().max())
    ours = reloaded(combine(sources, [0.5, 0.5]), base, tmp_path)
    assert float((logits(ours) - logits(wanted)).abs().max()) < 1e-5
    assert float((logits(model) - logits(wanted)).abs().max()) > 0.1 * moved


def test_wrong_requests_say_what_is_wrong(base):
    source = AdapterDeltas(adapted(base, VARIANTS["lora"]))
    for arguments, said in [
        (([source], [1.0], "tise"), "did you mean 'ties'"),
        (([source], [1.0, 2.0], "sum"), "1 adapters need as many weights"),
        (([source], [float("nan")], "sum"), "finite"),
        (([source], [1.0], "svd"), "needs a rank"),
        (([source, source], [1.0, -1.0], "sum"), "changes nothing"),
    ]:
        with pytest.raises(AdapterError, match=said):
            combine(*arguments)
    with pytest.raises(AdapterError, match="takes no rank"):
        combine([source], [1.0], "sum", rank=2)
    with pytest.raises(AdapterError, match="density"):
        combine([source], [1.0], "ties", density=0.0)
    for cut in ({"rank": 0}, {"energy": 1.5}):
        with pytest.raises(AdapterError, match="must be"):
            factorise(source.items(), Cut(**cut))


def test_a_name_that_ends_like_another_keeps_its_own_rank(tmp_path):
    torch.manual_seed(0)
    base = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 8)}), "c": nn.Linear(8, 8)})
    config = {"r": 2, "rank_pattern": {"b.a": 5}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(base, config, target_modules=["a"])
        result = combine([AdapterDeltas(model)], [1.0])
        del result.factors["a"]  # leaves b.a alone, which PEFT's list rule could not tell from a
        again = reloaded(result, base, tmp_path)
    assert [n for n, _ in delta_weights(again, "again")] == ["b.a"]
    both = combine([AdapterDeltas(model)], [1.0]).config(base)
    assert (both.r, both.rank_pattern) in [(2, {"^b\\.a": 5}), (5, {"^a": 2})]


def test_loha_with_its_own_config_class_is_read_too(base):
    model = get_peft_model(share(base), LoHaConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="changes nothing"):
        combine([AdapterDeltas(model)], [1.0])  # a fresh adapter is zero
