"""Rows from anywhere, in one canonical form, encoded by the task."""

from .encode import encode_all
from .examples import load_examples, split
from .read import read_rows

__all__ = ["encode_all", "load_examples", "read_rows", "split"]
