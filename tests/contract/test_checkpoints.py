"""A checkpoint of any method gives back every trained number, so that a resumed run goes on from where it was."""

import pytest
import torch

from lora_ft.recipe import TrainSection
from lora_ft.training import checkpoint
from lora_ft.training.checkpoint import Progress, Trained
from lora_ft.training.optim import build_optimizer
from lora_ft_adapters import list_methods, trainable
from lora_ft_adapters.behaviour import driver_of
from scripts.survey_methods import ON_QUANTISED, adapted_llama, llama, text

IDENTITY = {"base": "tiny"}
TRAINED = [n for n, m in list_methods().items() if not m.refusal and n not in ON_QUANTISED]


def _adapted(name: str) -> Trained:
    adapted = adapted_llama(name)
    named = list(trainable(adapted))
    return Trained(adapted, named, build_optimizer(named, TrainSection(), {}), driver_of(adapted))


def _step(trained: Trained, step: int) -> None:
    subject = text(llama)
    subject.loss(trained.model.train(), subject.batches[0]).backward()
    trained.driver.before_step()
    trained.optimizer.step()
    trained.driver.after_step(step)
    trained.optimizer.zero_grad()


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.filterwarnings("ignore")
def test_a_restored_method_goes_on_bit_for_bit(name, tmp_path):
    whole = _adapted(name)
    for step in (1, 2):
        _step(whole, step)
    path = checkpoint.save(tmp_path, whole, Progress(step=2), IDENTITY)
    again = _adapted(name)
    with torch.no_grad():
        for _, p in again.named:
            p.add_(1.0)
    torch.manual_seed(99)
    checkpoint.restore(path, again, IDENTITY)
    draw = torch.get_rng_state()
    _step(again, 3)
    torch.set_rng_state(draw)
    _step(whole, 3)
    for (n, a), (_, b) in zip(whole.named, again.named, strict=True):
        assert torch.equal(a, b), n
