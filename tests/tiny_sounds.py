"""Sounds of formulas as rows, and models that hear, small enough to build in a test."""

import wave
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoProcessor

from lora_ft.models.random_models import builders
from lora_ft.records import EncodeOptions, Example

RATE = 16_000
OPTIONS = EncodeOptions(overlong="drop")


def write_tone(path: Path, hertz: float, seconds: float, rate: int = RATE) -> None:
    """A sine in a 16-bit WAV file."""
    frames = np.sin(2 * np.pi * hertz / rate * np.arange(round(seconds * rate)))
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((frames * 20000).astype("<i2").tobytes())


def tone_row(folder: Path, number: int, seconds: float = 0.4, rate: int = RATE, **fields) -> Example:
    """A row with a tone of its own height."""
    name = f"{number}.wav"
    write_tone(folder / name, 200 + 150 * number, seconds, rate)
    return Example({"audio": name, **fields}, f"r.jsonl:{number}", root=str(folder))


@cache
def _built(name: str, folder: Path) -> Path:
    made = folder / name
    made.mkdir(exist_ok=True)
    builders()[name].build(made)
    return made


def hearing(task, name: str, folder: Path, **changes):
    """(model in evaluation mode, processor) of a built-in random model under a task; `changes` are of its config."""
    import transformers

    source = _built(name, folder)
    arguments = {**task.model_arguments(), **changes}
    config, _ = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **arguments)
    torch.manual_seed(0)
    auto = getattr(transformers, task.auto_class)
    model = auto.from_config(config) if changes else auto.from_pretrained(source, config=config)
    return model.eval(), AutoProcessor.from_pretrained(source)
