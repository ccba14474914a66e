"""The command line: parse, call the pipeline, print. Nothing here imports torch before a verb runs."""

from .main import main

__all__ = ["main"]
