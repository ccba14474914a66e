"""Randomness of one sample: a function of the draw and the sample, and of nothing else about a run."""

import hashlib

import numpy as np

from lora_ft.records import Sample


def sample_rng(sample: Sample, draw: int, purpose: str = "") -> np.random.Generator:
    """A generator for one sample in one epoch.

    Args:
        sample: known by its place in the data, not by its path: data that moved gives the same run.
        draw: see `training.batching.draw_of`.
        purpose: another one gives a stream of its own.
    """
    digest = hashlib.blake2b(f"{draw}|{purpose}|{sample.place}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
