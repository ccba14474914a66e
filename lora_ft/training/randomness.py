"""Random numbers that models draw themselves: of torch, and of numpy and Python, as BigBird and modules of users do.

Each step starts from a seed of its own, so that resuming, evaluating or saving changes nothing of what follows.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batching import mixed_seed


@dataclass(frozen=True)
class RandomState:
    """Where the generators of a process stand; `on_device` is empty on a CPU."""

    torch: Tensor
    on_device: Sequence[Tensor]
    numpy: Any
    python: Any


def seed_all(seed: int) -> None:
    """Every generator of the process, and of its devices, from one number."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_step(seed: int, step: int) -> None:
    """Before an optimizer step: what it draws is a function of the run's seed and its number."""
    seed_all(mixed_seed("step", seed, step))


def random_state(device: torch.device) -> RandomState:
    """To come back to with `set_random_state`."""
    on_device = [] if device.type == "cpu" else [getattr(torch, device.type).get_rng_state()]
    return RandomState(torch.get_rng_state(), on_device, np.random.get_state(), random.getstate())


def set_random_state(device: torch.device, state: RandomState) -> None:
    """Draw again what was drawn since `random_state`."""
    torch.set_rng_state(state.torch)
    for on_device in state.on_device:
        getattr(torch, device.type).set_rng_state(on_device)
    np.random.set_state(state.numpy)
    random.setstate(state.python)
