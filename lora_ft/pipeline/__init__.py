"""One function per verb, and the only place that knows the order of the stages."""

from .chat import Chat
from .train_verb import dry_run, train
from .use import Loaded, evaluate_run, export, load, merge, predict

__all__ = ["Chat", "Loaded", "dry_run", "evaluate_run", "export", "load", "merge", "predict", "train"]
