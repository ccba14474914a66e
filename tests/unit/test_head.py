"""The labelled-only head against the model's own loss, and batches against their parts."""

import pytest
import torch

from lora_ft_adapters import AdapterError, add_adapter, build_config, trainable
from lora_ft_adapters.fast import head as head_module
from lora_ft_adapters.fast.causal import labelled_loss, plain_loss
from lora_ft_adapters.fast.head import labelled_head
from lora_ft_adapters.fast.lora import Lean
from lora_ft_adapters.fast.verify import verify
from tests.conftest import tiny_llama


@pytest.fixture
def adapted():
    torch.manual_seed(1)
    model = add_adapter(tiny_llama(120), build_config("lora", {"r": 4}, "CAUSAL_LM"))
    for name, p in trainable(model):
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)  # a zero B would hide errors in the gradient of A
    return model.train()


def batch(rows=4, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 120, (rows, width), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, width, generator=generator) < 0.6, -100)
    return ids, labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for _, p in trainable(model)])


def fast_against_plain(model, ids, labels):
    return verify(
        lambda: labelled_loss(model, {"input_ids": ids}, labels).loss_sum,
        lambda: plain_loss(model, {"input_ids": ids}, labels).loss_sum,
        [p for _, p in trainable(model)],
        torch.float32,
    )


def test_head_at_labels_equals_cross_entropy_in_float64():
    torch.manual_seed(0)
    h = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    weight, bias, y = torch.randn(90, 16, dtype=torch.float64), torch.randn(90, dtype=torch.float64), torch.arange(50)
    wanted = torch.nn.functional.cross_entropy(h @ weight.T + bias, y, reduction="sum")
    (wanted_grad,) = torch.autograd.grad(wanted, h)
    result = labelled_head(h, weight, bias, y)
    (grad,) = torch.autograd.grad(result.loss_sum, h)
    assert result.loss_sum.detach().item() == pytest.approx(
        wanted.detach().item(), rel=1e-6
    )  # the logits are taken in float32
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)


def test_chunks_of_the_head_change_nothing(monkeypatch):
    torch.manual_seed(0)
    h, weight, y = torch.randn(50, 16), torch.randn(90, 16), torch.arange(50)
    whole = labelled_head(h.requires_grad_(), weight, None, y).loss_sum
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * 90 * 7)  # seven rows at a time
    parts = labelled_head(h, weight, None, y).loss_sum
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, h)[0], torch.autograd.grad(whole, h)[0])


def test_fast_loss_and_gradient_equal_the_models_own(adapted):
    ids, labels = batch()
    plain = plain_loss(adapted, {"input_ids": ids}, labels)
    wanted = gradients(adapted, plain.loss_sum)
    fast = labelled_loss(adapted, {"input_ids": ids}, labels)
    got = gradients(adapted, fast.loss_sum)
    assert fast.count == plain.count
    assert fast.loss_sum.detach().item() == pytest.approx(plain.loss_sum.detach().item(), rel=1e-6)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_eight_times_one_equals_one_times_eight(adapted):
    ids, labels = batch(rows=8)
    whole = labelled_loss(adapted, {"input_ids": ids}, labels)
    wanted = gradients(adapted, whole.loss_sum / whole.count)
    adapted.zero_grad()
    total, count = 0.0, 0
    for row in range(8):
        one = labelled_loss(adapted, {"input_ids": ids[row : row + 1]}, labels[row : row + 1])
        one.loss_sum.backward()
        total, count = total + one.loss_sum.detach().item(), count + one.count
    got = torch.cat([p.grad.flatten() for _, p in trainable(adapted)]) / count
    assert total / count == pytest.approx(whole.loss_sum.detach().item() / whole.count, abs=1e-6)
    assert float((got - wanted).abs().max()) < 1e-6


def test_right_padding_without_a_mask_changes_nothing(adapted):
    ids, labels = batch(rows=2, width=16)
    labels[1, 10:] = -100
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    masked = gradients(adapted, plain_loss(adapted, {"input_ids": ids, "attention_mask": mask}, labels).loss_sum)
    bare = gradients(adapted, labelled_loss(adapted, {"input_ids": ids}, labels).loss_sum)
    assert float((bare - masked).norm() / masked.norm()) < 1e-5


def test_a_model_that_scales_its_logits_switches_the_fast_path_off(adapted):
    ids, labels = batch()
    base = adapted.get_base_model()
    inner = base.forward

    def soft_capped(*args, labels=None, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = torch.tanh(out.logits / 5) * 5
        if labels is not None:
            out.loss = base.loss_function(out.logits, labels, vocab_size=120)
        return out

    base.forward = soft_capped
    verdict = fast_against_plain(adapted, ids, labels)
    assert not verdict.exact
    assert "differs" in verdict.reason


def test_verification_restores_zero_weights_and_random_state():
    model = add_adapter(tiny_llama(120), build_config("lora", {"r": 4, "lora_dropout": 0.5}, "CAUSAL_LM")).train()
    ids, labels = batch()
    before = {n: p.clone() for n, p in trainable(model)}
    state = torch.get_rng_state()
    verdict = fast_against_plain(model, ids, labels)
    assert verdict.exact, verdict.reason
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in trainable(model))


def test_a_trained_or_adapted_head_is_not_bypassed():
    model = tiny_llama(120)
    model.config.tie_word_embeddings = False
    adapted = add_adapter(model, build_config("lora", {"r": 2, "target_modules": ["lm_head", "q_proj"]}, "CAUSAL_LM"))
    ids, labels = batch()
    verdict = fast_against_plain(adapted, ids, labels)
    assert not verdict.exact
    assert "output head" in verdict.reason


def test_a_parameter_that_no_gradient_reaches_is_named():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    verdict = verify(lambda: used.sum(), lambda: used.sum(), [used, unused], torch.float32)
    assert verdict.unreached == (1,)


def test_lean_lora_equals_peft_and_leaves_the_layers_as_they_were(adapted):
    ids, labels = batch()
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    wanted = gradients(adapted, labelled_loss(adapted, {"input_ids": ids}, labels).loss_sum)
    lean = Lean(adapted)
    assert len(lean.layers) == 14
    with lean:
        assert "forward" in vars(layer)
        result = labelled_loss(adapted, {"input_ids": ids}, labels)
        plain = labelled_loss(adapted.get_base_model(), {"input_ids": ids}, labels)
        with adapted.disable_adapter():
            base = labelled_loss(adapted, {"input_ids": ids}, labels)
    got = gradients(adapted, result.loss_sum)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    assert result.loss_sum.detach().item() == pytest.approx(plain.loss_sum.detach().item(), rel=1e-6)
    assert base.loss_sum.detach().item() != pytest.approx(plain.loss_sum.detach().item(), rel=1e-6)
    assert "forward" not in vars(layer)


def test_lean_lora_takes_only_layers_it_computes_exactly():
    model = add_adapter(tiny_llama(60), build_config("lora", {"r": 2, "use_dora": True}, "CAUSAL_LM"))
    with pytest.raises(AdapterError, match="no plain LoRA layer"):
        Lean(model)
    dropping = add_adapter(tiny_llama(60), build_config("lora", {"r": 2, "lora_dropout": 0.9}, "CAUSAL_LM")).train()
    for name, p in trainable(dropping):
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    ids = torch.arange(12)[None]
    with Lean(dropping):  # dropout is PEFT's own, so two passes differ
        assert not torch.equal(dropping(ids).logits, dropping(ids).logits)
