"""Search over recipes: what may vary, which values come next, what each trial gave; Optuna keeps the books."""

from .plan import SweepOptions, SweepPlan, make_plan, resume_plan
from .results import TrialRow, best_of, ranked
from .space import combinations, parse_space, with_settings
from .work import Pruned, Score, Task, open_study, work

__all__ = [
    "Pruned", "Score", "SweepOptions", "SweepPlan", "Task", "TrialRow", "best_of", "combinations", "make_plan",
    "open_study", "parse_space", "ranked", "resume_plan", "with_settings", "work",
]  # fmt: skip
