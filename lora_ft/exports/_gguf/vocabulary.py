"""A tokenizer's vocabulary, rules and templates as GGUF keys."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from lora_ft.errors import UsageError

UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0  # as llama.cpp's own converter writes them
SPACE = "\u2581"
# Patterns of tokenizer.json and llama.cpp's names for them (its src/llama-vocab.cpp has both).
_WORDS, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
SPLITS = {
    f"{_WORDS}|{_START}\\p{{L}}+|\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORDS}|{_START}\\p{{L}}+|\\p{{N}}{_REST}": "qwen2",
    f"{_START}{_UPPER}*{_LOWER}+{_WORDS}?|{_START}{_UPPER}+{_LOWER}*{_WORDS}?|\\p{{N}}{{1,3}}"
    + _REST.replace(r"[\r\n]*", r"[\r\n/]*"): "gpt-4o",
}


def write_vocabulary(writer: Any, tokenizer: Any, folder: Path, size: int, stops: list[int]) -> None:
    """Tokens, their kinds, merges, special ids and the chat template.

    Args:
        writer: of the gguf package.
        tokenizer: of Transformers.
        folder: where its files are.
        size: rows of the embedding.
        stops: ids of the tokens that end an answer.

    Raises:
        UsageError: a kind of tokenizer that llama.cpp does not have, or that has no name here.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = rules["model"]["type"]
    if kind == "WordPiece":
        model, pre, scores = "bert", "default", None
    elif kind == "BPE" and rules["model"].get("byte_fallback"):
        model, pre, scores = "llama", "default", _scores(rules["model"], size)
    elif kind == "BPE":
        model, pre, scores = "gpt2", split_name(rules), None
    else:
        raise UsageError(f"a tokenizer of kind {kind} cannot be written as GGUF here", fix="--format merged")
    tokens, types = _tokens(tokenizer, size, model, scores)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if scores is not None:
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(_adds_space(rules, bool(tokenizer.chat_template)))
    writer.add_token_types(types)
    _special(writer, tokenizer, rules, model, stops)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: Any, size: int, model: str, scores: list[float] | None) -> tuple[list[str], list[int]]:
    """Text and kind of each id."""
    texts = {i: t for t, i in tokenizer.get_vocab().items()}
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(size):
        text = texts.get(i, f"[PAD{i}]")
        kind = gguf.TokenType.NORMAL
        if i not in texts:
            kind = gguf.TokenType.UNUSED
        elif i in added:
            kind = gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED
            if scores is not None:
                scores[i] = ADDED_SCORE
        elif model == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = gguf.TokenType.BYTE
        if model == "bert" and kind == gguf.TokenType.NORMAL:
            text = text[2:] if text.startswith("##") else SPACE + text
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _scores(model: Mapping[str, Any], size: int) -> list[float]:
    """SentencePiece's BPE takes the piece of the highest score first; here, as there, minus the rank of its merge."""
    scores = [UNUSED_SCORE] * size
    vocabulary = model["vocab"]
    for i in vocabulary.values():
        if i < size:
            scores[i] = 0.0
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        piece = vocabulary.get(left + right)
        if piece is not None and piece < size and scores[piece] == 0.0:
            scores[piece] = -float(rank + 1)
    return scores


def _adds_space(rules: Mapping[str, Any], chats: bool) -> bool:
    """Whether llama.cpp is to put a space before each text between special tokens.

    "first" means before a text that nothing precedes, and a prompt of a chat starts with a special token.
    """
    text = json.dumps([rules.get("normalizer"), rules.get("pre_tokenizer")])
    first = '"prepend_scheme": "first"' in text
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or (first and not chats)


def _check_pieces(rules: Mapping[str, Any]) -> None:
    """Refuse a SentencePiece-like tokenizer that changes texts in more ways than by marking spaces."""
    steps = [rules.get("normalizer"), rules.get("pre_tokenizer")]
    flat = [s for step in steps if step for s in step.get("normalizers") or step.get("pretokenizers") or [step]]
    for step in flat:
        marks = step["type"] == "Replace" and step.get("content") == SPACE
        whole = step["type"] == "Metaspace" and not step.get("split", True)
        if not (marks or whole or (step["type"] == "Prepend" and step.get("prepend") == SPACE)):
            raise UsageError(
                f"the tokenizer has a step that llama.cpp has not ({step['type']}), so it would read texts differently",
                fix="lora-ft export --format merged, then llama.cpp's own converter",
            )


def split_name(rules: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits text before it merges.

    Raises:
        UsageError: a way that has no name here.
    """
    pre = rules.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers") or [pre]
    kinds = [s.get("type") for s in steps]
    patterns = [s["pattern"].get("Regex", "") for s in steps if s.get("type") == "Split"]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and patterns[0] in SPLITS:
        return SPLITS[patterns[0]]
    raise UsageError(
        "the tokenizer splits text in a way that has no name here, so llama.cpp would split it differently",
        why=f"pre-tokenizer steps {kinds}, patterns {patterns}",
        fix="lora-ft export --format merged, then llama.cpp's own converter",
    )


def _special(writer: Any, tokenizer: Any, rules: Mapping[str, Any], model: str, stops: list[int]) -> None:
    if model == "gpt2":
        merges = [p if isinstance(p, str) else " ".join(p) for p in rules["model"]["merges"]]
        writer.add_token_merges(merges)
    ids = {n: getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    first = ids.pop("cls")
    if model == "bert":
        ids["bos"], ids["eos"] = first, None  # llama.cpp puts bos before a text and sep after it
    for name, found in ids.items():
        if found is not None:
            getattr(writer, f"add_{name}_token_id")(found)
    others = [i for i in stops if i != tokenizer.eos_token_id]
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(i)
    probe = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(probe) and probe[0] == ids["bos"])
    if model == "bert":
        writer.add_add_sep_token(bool(probe) and probe[-1] == ids["sep"])
        lower, strip = ((rules.get("normalizer") or {}).get(k) for k in ("lowercase", "strip_accents"))
        writer.add_bool("tokenizer.ggml.normalizer.lowercase", bool(lower))
        writer.add_bool("tokenizer.ggml.normalizer.strip_accents", bool(lower if strip is None else strip))
    writer.add_add_eos_token(bool(probe) and probe[-1] == ids["eos"])


def check_vocabulary(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot be written, before a weight is read."""
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError("the tokenizer has no tokenizer.json", fix="save it with Transformers' fast tokenizer first")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] != "BPE":
        return
    if rules["model"].get("byte_fallback"):
        _check_pieces(rules)
    else:
        split_name(rules)
