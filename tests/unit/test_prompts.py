"""Prefix tuning starts from what the base knows, and virtual tokens leave batches, losses and judging right."""

import pytest
import torch

from lora_ft.tasks._generate import batches
from lora_ft_adapters import Calibration, add_adapter, build_config, load_adapter, save_adapter
from lora_ft_adapters.fast.causal import plain_loss
from tests.conftest import tiny_llama

IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["prefix_tuning", "cartridge"])
def test_a_fresh_prefix_is_the_beginning_of_a_row_to_the_base(name, tmp_path):
    row = torch.randint(3, 50, (1, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    data = Calibration([{"input_ids": row, "attention_mask": mask}], lambda model, batch: model(**batch).logits.sum())
    config = build_config(name, {"num_virtual_tokens": 5}, "CAUSAL_LM", tiny_llama(50))
    model = add_adapter(tiny_llama(50), config, data=data).eval()
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        want = tiny_llama(50)(torch.cat([row[:, 2:7].expand(3, -1), IDS], 1)).logits[:, 5:]
        assert torch.allclose(got, want, atol=1e-5)
        save_adapter(model, tmp_path)
        again = load_adapter(tiny_llama(50), tmp_path, "other")
        assert torch.allclose(again(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits, want, atol=1e-5)


def test_rows_that_are_too_short_leave_pefts_own_start():
    data = Calibration([{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], lambda model, batch: None)
    starts = []
    for given in (data, None):
        torch.manual_seed(0)
        config = build_config("prefix_tuning", {"num_virtual_tokens": 20}, "CAUSAL_LM", tiny_llama(50))
        model = add_adapter(tiny_llama(50), config, data=given)
        starts.append(model.prompt_encoder["default"].embedding.weight.detach())
    assert starts[0].shape[0] == 20
    assert torch.equal(*starts)


def test_the_loss_of_a_prompted_model_counts_the_first_real_token_too():
    model = add_adapter(
        tiny_llama(50), build_config("prompt_tuning", {"num_virtual_tokens": 4}, "CAUSAL_LM", tiny_llama(50))
    )
    model.eval()
    with torch.no_grad():
        result = plain_loss(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, IDS)
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, 3:-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), IDS.flatten(), reduction="sum")
    assert result.count == IDS.numel()
    assert float(result.loss_sum) == pytest.approx(float(want), rel=1e-5)


def test_prompts_of_different_length_never_share_a_batch_where_virtual_tokens_stand_before_them():
    prompts = [[1] * n for n in (3, 2, 3, 5, 2, 2)]
    assert list(batches(prompts, 2, even=True)) == [[1, 4], [5], [0, 2], [3]]
    assert list(batches(prompts, 4, even=False)) == [[1, 4, 5, 0], [2, 3]]
