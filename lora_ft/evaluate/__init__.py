"""Judge a model on held-out rows: streaming metrics, written answers, and two models on the same rows."""

from .compare import compare
from .stream import Evaluation, evaluate

__all__ = ["Evaluation", "compare", "evaluate"]
