"""Rows from anywhere, in one canonical form, split, cleaned and encoded by the task."""

from .clean import CleaningReport, clean
from .encode import encode_all
from .examples import load_examples, load_sources
from .read import read_rows
from .splits import is_split, split

__all__ = [
    "CleaningReport", "clean", "encode_all", "is_split", "load_examples", "load_sources", "read_rows", "split",
]  # fmt: skip
