"""Whether an adapter can become part of its base's weights, found out before it is trained."""

import copy
from typing import Any

from lora_ft.artifact import Subject
from lora_ft.errors import UsageError
from lora_ft_adapters import AdapterError, UnmergeableError, add_adapter
from lora_ft_adapters.behaviour import behaviour_of
from lora_ft_adapters.merging import check_mergeable as check_model

KEPT_APART = "lora-ft export --format peft keeps it beside its base"


class NotSketchedError(UsageError):
    """Some methods look at weights when they are put on a model, so there is nothing to see without them."""


def sketch(subject: Subject) -> Any:
    """The adapter on its base, without weights.

    Raises:
        UsageError: the adapter does not fit the model.
        NotSketchedError: that shows only on real weights.
    """
    config = copy.deepcopy(subject.adapter)
    config.inference_mode = False
    if getattr(config, "modules_to_save", None):  # PEFT also saves names that match nothing
        names = [n for n, _ in subject.model.named_modules()]
        config.modules_to_save = [m for m in config.modules_to_save if any(f".{n}".endswith(f".{m}") for n in names)]
    try:
        return add_adapter(copy.deepcopy(subject.model), behaviour_of(config).sketch(config))
    except AdapterError as error:
        if isinstance(error.__cause__, RuntimeError):  # torch's for what has no numbers
            raise NotSketchedError(f"method {subject.method!r} needs weights to be put on a model") from error
        raise UsageError(f"method {subject.method!r}: {error}") from error


def check_mergeable(subject: Subject) -> None:
    """Raise UsageError with the reason where the method cannot be merged into this base."""
    if subject.model is None:
        return
    try:
        check_model(sketch(subject))
    except NotSketchedError:
        return  # merging tells
    except UnmergeableError as error:
        raise UsageError(f"method {subject.method!r}: {error}", fix=KEPT_APART) from error
