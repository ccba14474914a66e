"""Images of seeded noise as rows, and models that see, small enough to build in a test."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from lora_ft.models.random_models import builders
from lora_ft.records import EncodeOptions, Example, Sample

OPTIONS = EncodeOptions(overlong="truncate")
SIZES = [(40, 30), (30, 40), (33, 33), (20, 50), (64, 48), (32, 32), (50, 20), (24, 31)]  # width, height


def write_noise(path: Path, number: int) -> Path:
    """A PNG of coarse coloured noise, in a size of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC).save(path)
    return path


def placed(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the places that `encode_all` gives them."""
    return [replace(s, place=i) for i, s in enumerate(samples)]


def image_rows(folder: Path, answers, key: str = "label") -> list[Example]:
    """A row for each answer."""
    names = [write_noise(folder / f"{i}.png", i).name for i in range(len(answers))]
    rows = zip(names, answers, strict=True)
    return [Example({"image": n, key: a}, f"r.jsonl:{i}", root=str(folder)) for i, (n, a) in enumerate(rows, 1)]


@cache
def _built(name: str, folder: Path) -> Path:
    made = folder / name
    made.mkdir()
    builders()[name].build(made)
    return made


def seeing(name: str, folder: Path, task=None):
    """(model in evaluation mode, processor) of a built-in random model, under a task where one is given."""
    source = _built(name, folder)
    processor = AutoImageProcessor.from_pretrained(source)
    if task is None:
        return AutoModelForImageClassification.from_pretrained(source).eval(), processor
    arguments = {k: v for k, v in task.model_arguments().items() if k != "num_labels"}
    config, _ = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **arguments)
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(source, config=config, ignore_mismatched_sizes=True)
    return model.eval(), processor
