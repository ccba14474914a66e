"""Held-out rows: a share, or one of several folds; classes in proportion, groups never parted."""

import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lora_ft.errors import DataError, UsageError
from lora_ft.records import Example

from ._labels import classes

FINEST = 20  # a share of grouped, labelled rows is a number of at most so many folds


@dataclass(frozen=True)
class _Wish:
    share: Fraction | None = None
    fold: int = 0
    folds: int = 0


def is_split(eval: str) -> bool:
    """Whether this asks for a share or a fold of the training rows, rather than naming held-out rows."""
    return eval.strip().endswith("%") or re.match(r"fold\s", eval.strip()) is not None


def split(examples: Sequence[Example], eval: str, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) rows in their order; the same rows are held out for the same seed.

    Where the rows have classes, each class is held out in proportion as far as whole rows allow, and a class of one row
    stays in training. Rows of one group are on one side. A share of rows without classes and groups is a plain sample.

    Args:
        examples: all rows.
        eval: a share such as "10%", or "fold 1/5".
        seed: of the draw.

    Raises:
        UsageError: a share not between 0 and 100 %, or a fold that does not exist.
        DataError: too few rows or groups.
    """
    wish = _parsed(eval)
    of_groups = [e.group for e in examples]
    of_classes = classes(examples) or classes(examples, "target")
    if any(of_groups):
        held = _grouped(of_groups, of_classes, wish, seed)
    elif of_classes is not None:
        held = _stratified(of_classes, wish, seed)
    else:
        held = _plain(len(examples), wish, seed)
    if not held or len(held) >= len(examples):
        unit = f"{len(set(of_groups))} groups" if any(of_groups) else f"{len(examples)} rows"
        raise DataError(f"{unit} are too few to hold out {eval}", fix="--set data.eval=null")
    chosen = set(held)
    return (
        [e for i, e in enumerate(examples) if i not in chosen],
        [e for i, e in enumerate(examples) if i in chosen],
    )


def _parsed(eval: str) -> _Wish:
    text = eval.strip()
    if text.endswith("%"):
        try:
            share = Fraction(text[:-1].strip()) / 100
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not 0 < share < 1:
            raise UsageError(f"data.eval: {eval!r} is not a share between 0% and 100%", fix="--set data.eval=10%")
        return _Wish(share)
    match = re.fullmatch(r"fold\s+(\d+)\s*/\s*(\d+)", text)
    fold, folds = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= fold <= folds or folds < 2:
        raise UsageError(
            f"data.eval: {eval!r} is not one of at least two folds, counted from 1", fix="--set 'data.eval=fold 1/5'"
        )
    return _Wish(fold=fold, folds=folds)


def _plain(rows: int, wish: _Wish, seed: int) -> list[int]:
    if wish.share is not None:
        held = max(1, round(rows * float(wish.share)))
        return [] if held >= rows else random.Random(seed).sample(range(rows), held)
    if wish.folds > rows:
        return []
    from sklearn.model_selection import KFold

    return _fold(KFold(wish.folds, shuffle=True, random_state=seed), wish.fold, range(rows))


def _stratified(of_classes: Sequence[str], wish: _Wish, seed: int) -> list[int]:
    """Where there are fewer held-out rows, or rows of a class, than proportions need, a plain draw among them."""
    from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

    counts = Counter(of_classes)
    several = [i for i, c in enumerate(of_classes) if counts[c] > 1]
    names = [of_classes[i] for i in several]
    kinds = len(set(names))
    if wish.share is None:
        if max(counts.values()) < wish.folds:
            # Rows of a class stand beside each other, so that they go to different folds.
            dealt = sorted(random.Random(seed).sample(several, len(several)), key=lambda i: of_classes[i])
            return sorted(dealt[wish.fold - 1 :: wish.folds])
        folds = StratifiedKFold(wish.folds, shuffle=True, random_state=seed)
        return [several[i] for i in _fold(folds, wish.fold, names, names)]
    held = max(1, round(len(of_classes) * float(wish.share)))
    if held >= len(several):
        return []
    if min(held, len(several) - held) < kinds:
        spare = _spare(of_classes, several, seed)
        return random.Random(seed).sample(spare, min(held, len(spare)))
    draw = StratifiedShuffleSplit(1, test_size=held, random_state=seed)
    return [several[i] for i in next(iter(draw.split(names, names)))[1]]


def _spare(of_classes: Sequence[str], rows: Sequence[int], seed: int) -> list[int]:
    """The rows but one of each class, which stays in training whatever is drawn of the others."""
    kept: set[str] = set()
    spare = []
    for i in random.Random(seed).sample(rows, len(rows)):
        if of_classes[i] in kept:
            spare.append(i)
        kept.add(of_classes[i])
    return sorted(spare)


def _grouped(of_groups: Sequence[str], of_classes: Sequence[str] | None, wish: _Wish, seed: int) -> list[int]:
    """A share is of the groups; with classes it is of the rows, as near as whole groups allow."""
    from sklearn.model_selection import GroupKFold, GroupShuffleSplit

    number = len(set(of_groups))
    if number < max(2, wish.folds):
        return []
    most = max(Counter(of_classes).values()) if of_classes else 0
    if wish.share is None:
        if most >= wish.folds:
            return _stratified_folds(of_groups, of_classes, wish.folds, [wish.fold], seed)
        return _fold(GroupKFold(wish.folds, shuffle=True, random_state=seed), wish.fold, of_groups, None, of_groups)
    finest = min(FINEST, number, most)
    if finest < 2:
        draw = GroupShuffleSplit(1, test_size=float(wish.share), random_state=seed)
        return [int(i) for i in next(iter(draw.split(of_groups, groups=of_groups)))[1]]
    near = wish.share.limit_denominator(finest)
    near = min(max(near, Fraction(1, finest)), Fraction(finest - 1, finest))
    return _stratified_folds(of_groups, of_classes, near.denominator, range(1, near.numerator + 1), seed)


def _stratified_folds(
    of_groups: Sequence[str], of_classes: Any, folds: int, wanted: Sequence[int], seed: int
) -> list[int]:
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer rows than folds cannot be in each; the report on the data tells which are missing.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = [part for _, part in splitter.split(of_groups, of_classes, of_groups)]
    return sorted(int(i) for n in wanted for i in parts[n - 1])


def _fold(splitter: Any, fold: int, rows: Sequence[Any], of_classes: Any = None, of_groups: Any = None) -> list[int]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = list(splitter.split(rows, of_classes, of_groups))
    return [int(i) for i in parts[fold - 1][1]]
