"""A split without leakage: near duplicates of a text, and all snippets of a document, are on one side of it."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

SEED = 4
HELD_OUT = 0.2
NEAR = 0.7  # Jaccard similarity of word bigrams from which two texts count as the same


def same_text_groups(texts: Sequence[str], documents: Sequence[str] | None = None) -> list[int]:
    """A number for each text; equal where texts are near duplicates of each other or of one document.

    Near: the Jaccard similarity of the sets of word bigrams is at least NEAR. Pairs are found exactly by prefix
    filtering (Chaudhuri et al. 2006): two such sets share one of their rarest elements.

    Args:
        texts: the texts.
        documents: the document each belongs to.
    """
    parent = list(range(len(texts)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((top(i), top(j)))
        parent[high] = low

    first_of: dict[str, int] = {}
    for i, document in enumerate(documents or ()):
        join(first_of.setdefault(document, i), i)
    sets = [_bigrams(text) for text in texts]
    common = Counter(gram for grams in sets for gram in grams)
    holders: dict[tuple[str, ...], list[int]] = {}
    for i, grams in enumerate(sets):
        rarest = sorted(grams, key=lambda gram: (common[gram], gram))
        for gram in rarest[: len(rarest) - int(NEAR * len(rarest)) + 1]:
            for j in holders.setdefault(gram, []):
                both = len(grams & sets[j])
                if top(i) != top(j) and both >= NEAR * (len(grams) + len(sets[j]) - both):
                    join(i, j)
            holders[gram].append(i)
    return [top(i) for i in range(len(texts))]


def _bigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower()) or [text]
    return set(zip(["", *words], words, strict=False))


def split(rows: Sequence[Row], groups: Sequence[int], keys: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows: whole groups, in the order of a seeded hash of a group's first key.

    Args:
        rows: all rows.
        groups: a number for each row, as from `same_text_groups`.
        keys: a text for each row that the order is drawn from.
    """
    drawn: dict[int, str] = {}
    for group, key in zip(groups, keys, strict=True):
        drawn.setdefault(group, hashlib.sha256(f"{SEED}:{key}".encode()).hexdigest())
    order = sorted(range(len(rows)), key=lambda i: (drawn[groups[i]], i))
    cut = int(len(rows) * HELD_OUT)
    while 0 < cut < len(rows) and groups[order[cut]] == groups[order[cut - 1]]:
        cut += 1
    held_out, train = order[:cut], order[cut:]
    train.sort(key=lambda i: hashlib.sha256(f"{SEED}:{i}:{keys[i]}".encode()).digest())
    return [rows[i] for i in train], [rows[i] for i in held_out]
