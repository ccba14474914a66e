"""Language codes of multilingual tokenizers (NLLB, mBART, M2M100): checked, set, and as token ids."""

from collections.abc import Iterable
from typing import Any

from lora_ft.errors import UsageError, did_you_mean

NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def check_languages(processor: Any, source: str | None, target: str | None) -> None:
    """Raise a UsageError when a tokenizer needs languages and has none, has them and needs none, or knows no such one.

    Args:
        processor: tokenizer.
        source: code of the sources' language.
        target: code of the targets' language.
    """
    given = {"src_lang": source, "tgt_lang": target}
    missing = [name for name, code in given.items() if code is None]
    if not isinstance(getattr(type(processor), "src_lang", None), property):  # FSMT has it, but can only read it
        if len(missing) < len(given):
            raise UsageError(
                f"task.src_lang and tgt_lang: {type(processor).__name__} knows no languages",
                fix="leave them out; task.source_prefix may say the language, if the model was trained so",
            )
        return
    if missing:
        raise UsageError(
            f"task.{missing[0]} is missing: {type(processor).__name__} marks the language of each text",
            fix=f"set task.src_lang and task.tgt_lang, for example {_some(_codes(processor))}",
        )
    for name, code in given.items():
        language_id(processor, str(code), name)


def set_languages(processor: Any, source: str | None, target: str | None) -> None:
    """Make the tokenizer mark sources and targets with these languages; nothing where none are given."""
    if source is not None:
        processor.src_lang = source
    if target is not None:
        processor.tgt_lang = target


def language_id(processor: Any, code: str, option: str = "tgt_lang") -> int:
    """The id of the token that stands for a language.

    Args:
        processor: tokenizer.
        code: as the tokenizer writes it.
        option: named in the error.

    Raises:
        UsageError: there is no such language.
    """
    codes = _codes(processor)
    if code not in codes:
        raise UsageError(f"task.{option}: {code!r} is no language of this tokenizer; {did_you_mean(code, codes)}")
    return int(codes[code])


def _codes(processor: Any) -> dict[str, int]:
    """Code -> token id. M2M100 writes its tokens otherwise than its codes; NLLB's are its further special tokens."""
    if hasattr(processor, "lang_code_to_token"):
        return {code: processor.get_lang_id(code) for code in processor.lang_code_to_token}
    listed = getattr(processor, "lang_code_to_id", None)
    if listed:
        return dict(listed)
    named = {getattr(processor, f"{part}_token_id", None) for part in NAMED}
    return {t.content: i for i, t in processor.added_tokens_decoder.items() if t.special and i not in named}


def _some(codes: Iterable[str]) -> str:
    return ", ".join(sorted(codes)[:3])
