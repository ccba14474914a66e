"""One function per verb, and the only place that knows the order of the stages."""

from .algebra import combine, compress, convert, extract
from .algebra_publish import NewAdapter
from .chat import Chat
from .train_verb import dry_run, train
from .use import Loaded, evaluate_run, export, load, merge, predict

__all__ = [
    "Chat", "Loaded", "NewAdapter", "combine", "compress", "convert", "dry_run", "evaluate_run", "export", "extract",
    "load", "merge", "predict", "train",
]  # fmt: skip
