"""Random weights that are the same bits on every machine, and how a model of them is written."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

SEED = 20240229
Spread = Callable[[str, nn.Parameter], float]


def fan_in(name: str, weight: nn.Parameter) -> float:
    """The standard deviation that keeps a signal's size through a ReLU: sqrt(2 / inputs of an output)."""
    return math.sqrt(2.0 / max(1, weight[0].numel()))


def draw(model: nn.Module, spread: Spread = fan_in) -> None:
    """Draw every weight of two dimensions or more, in the order of their names; gains and biases stay as they are.

    Uniform draws, whose arithmetic is exact; a normal draw goes through a logarithm and a cosine that differ between
    processors.

    Args:
        model: gets the weights.
        spread: name, parameter -> standard deviation.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() >= 2:
                half_width = spread(name, weight) * math.sqrt(3)  # of a uniform draw with that standard deviation
            elif weight.min() < weight.max():  # a vector that the architecture draws, such as wav2vec2's for masks
                half_width = 1.0
            else:
                continue
            weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * half_width)


def write(model: Any, folder: Path, processor: Any, spread: Spread = fan_in) -> None:
    """Draw the weights and write model and processor in Transformers' layout."""
    draw(model, spread)
    save(model, folder, processor)


def save(model: Any, folder: Path, processor: Any) -> None:
    """Write model and processor in Transformers' layout."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
