"""What people see: the live display, tables, the model card."""

from .card import model_card, public_name
from .display import clean, make_listener
from .known import known_methods, merges
from .tables import before_after, compared, flips, listing

__all__ = [
    "before_after", "clean", "compared", "flips", "known_methods", "listing", "make_listener", "merges", "model_card",
    "public_name",
]  # fmt: skip
