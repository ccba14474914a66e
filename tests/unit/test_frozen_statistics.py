"""Running statistics of a frozen base keep their bits in training, and rows do not see the rows beside them."""

import pytest
import torch
from torch import nn

from lora_ft_adapters import add_adapter, build_config, load_adapter, save_adapter, trainable, training_mode
from tests.tiny_vision import loss, make, scores

METHODS = ("lora", "houlsby", "head", "layers", "full", "bitfit")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(STATISTICS)}


def step(model: nn.Module, batch, micro: int) -> None:
    """One step of SGD on the sum of the rows' losses, in parts of `micro` rows."""
    rows = len(batch["labels"])
    for start in range(0, rows, micro):
        part = {k: v[start : start + micro] for k, v in batch.items()}
        (loss(model, part) * len(part["labels"])).backward()
    with torch.no_grad():
        for _, p in trainable(model):
            p -= 1e-2 * p.grad
            p.grad = None


@pytest.mark.parametrize(("kind", "method"), [
    *((k, m) for k in ("resnet", "own", "segformer") for m in METHODS),
    ("mobilenet", "lora"), ("efficientnet", "layers"),
])  # fmt: skip
def test_statistics_keep_their_bits_and_one_step_of_8_is_8_steps_of_1(kind, method):
    ends = []
    for micro in (8, 1):
        model, batch = make(kind)
        batch = {k: v.repeat(4, *[1] * (v.dim() - 1)) for k, v in batch.items()}
        batch["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(5))
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        torch.manual_seed(0)
        model = add_adapter(model.double(), build_config(method, {}, None, model))
        before = statistics(model)
        assert len(before) >= 3
        training_mode(model)
        step(model, batch, micro)
        step(model, batch, micro)
        after = statistics(model)
        assert all(torch.equal(before[n], after[n]) for n in before)
        ends.append([p.detach().clone() for _, p in trainable(model)])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*ends, strict=True))


def test_plain_train_mode_would_have_changed_them():
    model, batch = make("resnet")
    before = statistics(model)
    model.train()
    loss(model, batch)
    assert not any(torch.equal(before[n], statistics(model)[n]) for n in before)


@pytest.mark.parametrize("norm", [
    lambda: nn.BatchNorm1d(4), lambda: nn.SyncBatchNorm(4), lambda: nn.InstanceNorm1d(4, track_running_stats=True),
])  # fmt: skip
def test_every_kind_of_norm_with_statistics_stays_in_eval_mode_and_all_else_trains(norm):
    net = nn.Sequential(nn.Conv1d(2, 4, 1), norm(), nn.Dropout(0.5), nn.InstanceNorm1d(4), nn.LayerNorm(5))
    training_mode(net.eval())
    assert [m.training for m in net] == [True, False, True, True, True]
    assert net.training
    net[1](torch.randn(3, 4, 5))
    assert torch.equal(net[1].running_mean, torch.zeros(4))


def test_gains_of_norms_train_with_full_and_are_saved_with_the_bases_statistics(tmp_path):
    model, batch = make("resnet")
    wanted = statistics(model)
    model = add_adapter(model, build_config("full", {}, None, model))
    training_mode(model)
    step(model, batch, 2)
    gains = [n for n, m in make("resnet")[0].named_modules() if isinstance(m, nn.BatchNorm2d)]
    bare = dict(make("resnet")[0].named_parameters())
    copies = dict(model.named_parameters())
    mark = "base_model.model.{}.lft_unfrozen_.default.weight"
    assert not any(torch.equal(copies[mark.format(n)], bare[f"{n}.weight"]) for n in gains)
    save_adapter(model, tmp_path)
    loaded = load_adapter(make("resnet")[0], tmp_path).merge_and_unload()
    assert statistics(loaded).keys() == wanted.keys()
    assert all(torch.equal(statistics(loaded)[n], wanted[n]) for n in wanted)
    assert torch.allclose(scores(loaded, batch), scores(model.eval(), batch), atol=1e-6)


def test_dropout_of_an_adapter_on_a_norm_stays_on():
    model = make("own")[0]
    model = add_adapter(
        model, build_config("houlsby", {"target_modules": ["blocks.0.norm"], "dropout": 0.5}, None, model)
    )
    training_mode(model)
    layer = model.base_model.model.blocks[0].norm
    assert layer.adapters["default"].dropout.training
    assert not layer.base_layer.training
