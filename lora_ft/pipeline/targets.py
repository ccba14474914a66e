"""`target`: whether the trained adapter will be able to go where it is meant to, found out before it is trained."""

from typing import Any

from lora_ft.artifact import Subject
from lora_ft.errors import UsageError, did_you_mean
from lora_ft.recipe import Recipe
from lora_ft.registry import EXPORTS, ExportFormat

from .prepare import Prepared
from .rows import Given
from .subjects import subject


def formats_of(target: str) -> list[ExportFormat]:
    """The export formats that a target's name stands for: its own, or those that the program of this name reads.

    Raises:
        UsageError: there is none.
    """
    known = EXPORTS.discover()
    found = [f for n, f in known.items() if n == target] or [f for f in known.values() if target in f.targets]
    if not found:
        names = {*known, *(t for f in known.values() for t in f.targets)}
        raise UsageError(f"unknown target {target!r}; {did_you_mean(target, names)}", fix=", ".join(sorted(names)))
    return found


def check_target(recipe: Recipe, prepared: Prepared, config: Any) -> None:
    """Refuse a recipe whose adapter no format of its target can take.

    Args:
        recipe: with a target, or without one.
        prepared: the data.
        config: of PEFT, its targets checked.
    """
    if recipe.target is None:
        return
    formats = formats_of(recipe.target)
    given = Given(model=prepared.model, trust_code=prepared.base.trust_code)
    about: Subject = subject(recipe, prepared.task, prepared.processor, config, given, prepared.base.source)
    refused: list[UsageError] = []
    for form in formats:
        try:
            form.check(about)
            return
        except UsageError as error:
            refused.append(error)
    reasons = "; ".join(f"{f.name}: {e.what}" for f, e in zip(formats, refused, strict=True))
    why = "; ".join(dict.fromkeys(e.why for e in refused if e.why))
    raise UsageError(
        f"this adapter cannot go to {recipe.target}: {reasons}", where="target", why=why, fix=refused[0].fix
    )
