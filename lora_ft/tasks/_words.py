"""Rows that are lists of words -> pieces of tokens, cut between words so that nothing is lost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_ft.errors import UsageError

NO_TOKEN = -1


@dataclass
class Piece:
    """Consecutive words as token ids, special tokens included.

    Attributes:
        ids: token ids.
        first: for each word the position of its first token, NO_TOKEN for a word that gives none.
        counts: for each word its number of tokens.
        types: token type ids; empty where the tokenizer makes none.
        cut: whether a word was too long for a whole piece and lost its end.
    """

    ids: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    cut: bool = False


class WordTokenizer:
    """Tokenises word by word, which every tokenizer can, with offsets or without.

    A byte-level tokenizer writes the space before a word into its first token: there words get that space, as with
    Transformers' `add_prefix_space`.

    Attributes:
        after: special tokens that end a piece.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._known: dict[str, list[int]] = {}
        plain, spaced, other = (self._ids(text) for text in ("a", " a", "x"))
        self._space = " " if self._ids("x a") == other + spaced != other + plain else ""
        out = processor("a")
        whole = out["input_ids"]
        starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        if not plain or not starts:
            raise UsageError(
                "this tokenizer cannot be used word by word", why=f"of 'a' it makes {whole}, alone {plain}"
            )
        start, end = starts[0], starts[0] + len(plain)
        self._before, self.after = whole[:start], whole[end:]
        types = out.get("token_type_ids", [])
        self._types = (types[:start], types[start : start + 1], types[end:])

    def tokens(self, word: str) -> list[int]:
        """Of one word; none for white space and what the tokenizer drops."""
        if word not in self._known:
            self._known[word] = self._ids(self._space + word) if word.strip() else []
        return self._known[word]

    def pieces(self, words: Sequence[str], max_length: int) -> list[Piece]:
        """The fewest pieces of at most `max_length` tokens, of about equal length.

        Raises:
            ValueError: no token of a word fits beside the special tokens.
        """
        room = max_length - len(self._before) - len(self.after)
        if room < 1:
            raise ValueError(f"max_length {max_length} has no room for a word")
        tokens = [self.tokens(w) for w in words]
        whole = sum(len(t[:room]) for t in tokens)
        wanted = -(-whole // max(1, -(-whole // room)))  # tokens in each of the fewest pieces
        groups: list[list[list[int]]] = [[]]
        size = 0
        for word in tokens:
            length = len(word[:room])
            if length and size and (size >= wanted or size + length > room):
                groups.append([])
                size = 0
            groups[-1].append(word)
            size += length
        return [self._piece(group, room) for group in groups]

    def _piece(self, words: Sequence[list[int]], room: int) -> Piece:
        piece = Piece(list(self._before))
        for word in words:
            kept = word[:room]
            piece.first.append(len(piece.ids) if kept else NO_TOKEN)
            piece.counts.append(len(kept))
            piece.ids += kept
            piece.cut = piece.cut or len(kept) < len(word)
        before, own, after = self._types
        piece.types = before + own * sum(piece.counts) + after
        piece.ids += self.after
        return piece

    def _ids(self, text: str) -> list[int]:
        return list(self._processor(text, add_special_tokens=False, verbose=False)["input_ids"])
