"""One function per verb, and the only place that knows the order of the stages."""

from .algebra import combine, compress, convert, extract
from .algebra_publish import NewAdapter
from .artifacts import export, merge, unmerge
from .chat import Chat
from .dry_run import dry_run
from .inspecting import inspect
from .loading import Loaded, load
from .rows import Given
from .sweep import SweepResult, sweep
from .train_verb import train
from .use import evaluate_run, predict

__all__ = [
    "Chat", "Given", "Loaded", "NewAdapter", "SweepResult", "combine", "compress", "convert", "dry_run",
    "evaluate_run", "export", "extract", "inspect", "load", "merge", "predict", "sweep", "train", "unmerge",
]  # fmt: skip
