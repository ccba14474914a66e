"""ReFT: the papers' formulas, orthonormal rows, and which positions an intervention touches."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from lora_ft_adapters.errors import AdapterError
from lora_ft_adapters.registry import build_config
from tests.tiny import checkpoint_activations
from tests.unit.test_own_families import make
from tests.unit.test_own_methods import Toy, _linear, adapted, assert_same, base, shake, train


def _gram_schmidt(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows of the same span, one after the other, as in a textbook."""
    done: list[torch.Tensor] = []
    for row in rows:
        for other in done:
            row = row - (row @ other) * other
        done.append(row / row.norm())
    return torch.stack(done)


def _reference(p, kind, x):
    for i in range(2):
        b = f"layers.{i}"
        h = x + _linear(p, f"{b}.self_attn.o_proj", torch.tanh(_linear(p, f"{b}.self_attn.q_proj", x)))
        h = h + _linear(p, f"{b}.mlp.down_proj", torch.relu(_linear(p, f"{b}.mlp.up_proj", h)))
        rows = p[f"{b}.lft_reft_.rotate"]
        rows = _gram_schmidt(rows) if kind == "loreft" else rows
        edit = _linear(p, f"{b}.lft_reft_.learned", h)
        x = h + (edit if kind == "direft" else edit - h @ rows.T) @ rows
    return x


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft"])
def test_outputs_and_gradients_are_those_of_the_paper(kind):
    model = adapted(kind, Toy().double(), r=3)
    shake(model)
    assert_same(model, lambda p, v: _reference(p, kind, v), torch.randn(2, 3, 8, dtype=torch.float64))


def test_rows_stay_orthonormal_while_training():
    model = adapted("loreft", r=4)
    train(model, 5)
    for layer in model.modules():
        if hasattr(layer, "rotate"):
            rows = layer.rows()
            assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-5)
            assert (layer.learned.weight - rows).abs().max() > 1e-3


def test_rows_used_without_gradients_follow_later_steps():
    model = adapted("loreft")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        first = model(ids).logits
    train(model)
    want = model(ids).logits
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, want, atol=1e-6)
    assert not torch.allclose(first, want)


IDS = torch.arange(1, 9).repeat(2, 1)


def touched(positions: str, **inputs) -> list[list[int]]:
    """Per row, the positions whose output of the first block the adapter changes."""
    model = adapted("noreft", positions=positions, layers_to_transform=[0])
    shake(model)
    seen: list[torch.Tensor] = []
    layer = model.base_model.model.model.layers[0]
    layer.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    model(input_ids=IDS, **inputs)
    with model.disable_adapter():
        model(input_ids=IDS, **inputs)
    return [row.nonzero().flatten().tolist() for row in (seen[0] != seen[1]).any(-1)]


LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8])


@pytest.mark.parametrize(
    ("positions", "mask", "want"),
    [
        ("all", None, [list(range(8)), list(range(8))]),
        ("f3", None, [[0, 1, 2], [0, 1, 2]]),
        ("f2", LEFT, [[3, 4], [0, 1]]),
        ("f2", RIGHT, [[0, 1], [0, 1]]),
        ("l2", LEFT, [[6, 7], [6, 7]]),
        ("l2", RIGHT, [[3, 4], [6, 7]]),
        ("f3+l3", RIGHT, [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7]]),
    ],
)
def test_padding_on_either_side_is_not_counted(positions, mask, want):
    assert touched(positions, attention_mask=mask) == want


def test_last_positions_are_the_prompts_when_labels_tell_its_end():
    labels = IDS.clone()
    labels[0, :4] = -100  # the prompt is 4 tokens, in the second row 6
    labels[1, :6] = -100
    assert touched("l2", labels=labels) == [[2, 3], [4, 5]]
    assert touched("f1+l1", labels=labels) == [[0, 3], [0, 5]]
    assert touched("l2", labels=labels, attention_mask=LEFT) == [[3], [4, 5]]


def _tokens(model, use_cache: bool, **inputs) -> torch.Tensor:
    out = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("mask", [None, LEFT])
def test_generation_with_and_without_cache_agree_on_first_positions(mask):
    model = adapted("loreft", positions="f3")
    shake(model)
    inputs = {"input_ids": IDS} | ({"attention_mask": mask} if mask is not None else {})
    cached = _tokens(model, True, **inputs)
    assert torch.allclose(cached, _tokens(model, False, **inputs), atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(cached, _tokens(model, True, **inputs), atol=1e-2)


def test_short_prompt_is_continued_alike_with_and_without_cache():
    model = adapted("loreft", positions="f3")
    shake(model)
    inputs = {"input_ids": IDS[:, :2]}
    assert torch.allclose(_tokens(model, True, **inputs), _tokens(model, False, **inputs), atol=1e-4)


def test_decoding_touches_no_position_after_the_prompt():
    model = adapted("noreft", positions="l2", layers_to_transform=[0])
    shake(model)
    lengths: list[int] = []
    adapter = model.base_model.model.model.layers[0].adapters["default"]
    adapter.register_forward_hook(lambda _, __, out: lengths.append(int((out != 0).any(-1).sum())))
    _tokens(model, True, input_ids=IDS)
    assert lengths == [4, 0, 0, 0, 0, 0]


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = adapted("loreft", positions="f2+l1")
        shake(model)
        if checkpointing:
            model.enable_input_require_grads()
            checkpoint_activations(model.base_model.model)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


def test_models_without_tokens_refuse_positions_before_they_are_changed():
    model = nn.Sequential(nn.Linear(4, 4))
    for bad in (model, make("ViT"), make("T5")):
        with pytest.raises(AdapterError, match="positions other than all"):
            adapted("loreft", bad, positions="f1")
    assert type(model[0]) is nn.Linear
    blocks = adapted("loreft", make("T5")).peft_config["default"].adapted_modules
    assert blocks == ["encoder.block.0", "decoder.block.0"]


def test_part_of_a_model_run_alone_says_that_positions_are_unknown():
    model = adapted("loreft", positions="f1")
    with pytest.raises(AdapterError, match="forward of the whole model"):
        model.base_model.model.model(input_ids=IDS)


@pytest.mark.parametrize("bad", ["", "first", "f0", "3", "l3+f3", "f3l3", "f3+"])
def test_misspelt_positions_are_refused(bad):
    with pytest.raises(AdapterError, match="f3\\+l3"):
        build_config("loreft", {"positions": bad})


def test_unloaded_model_keeps_no_hooks(tmp_path):
    model = adapted("loreft", positions="f1")
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base(), tmp_path).unload()
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
