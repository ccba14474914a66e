"""Tiny models with random weights: presets and recipes can be tried with them in seconds, offline.

Weights are uniform draws, whose arithmetic is exact, so that they are the same bits on every machine; a normal draw
goes through a logarithm and a cosine that differ between processors.
"""

import math
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SEED = 20240229
WIDTH = 128
# Frequent English words and endings, so that text is not only single letters and pairs.
WORDS = """a about after all also an and any are as at back be because been but by can come could day did do even
first for from get give go good had has have he her him his how i if in into is it its just know like look made make
many me more most my new no not now of on one only or other our out over people said see she so some take than that
the their them then there these they think this time to two up us use very was way we well were what when which who
will with work would year you your"""
ENDINGS = """able al ally ance ant ate ed en ence ent er es est ful ing ion ish ism ist ity ive ize less ly ment ness
ous s tion"""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build(name: str, folder: Path) -> None:
    """Write the model called `name` and its tokenizer into the folder, in Transformers' layout."""
    BUILDERS[name](folder)


def _tiny_t5(folder: Path) -> None:
    tokenizer = ByT5Tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=512, num_layers=3, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.decoder_start_token_id = tokenizer.pad_token_id

    def spread(name: str, weight: nn.Parameter) -> float:
        """T5's own: its attention does not divide by the root of the head's width, its queries do."""
        if name == "shared.weight":
            return 1.0
        if name.endswith(".q.weight"):
            return float((config.d_model * config.d_kv) ** -0.5)
        return float((config.d_model if "relative_attention_bias" in name else weight.shape[1]) ** -0.5)

    _write(T5ForConditionalGeneration(config), spread, tokenizer, folder)


def _tiny_bert(folder: Path) -> None:
    tokenizer = word_pieces()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=4 * WIDTH, pad_token_id=tokenizer.pad_token_id, initializer_range=0.08,
    )  # fmt: skip
    _write(BertForPreTraining(config), lambda *_: config.initializer_range, tokenizer, folder)


def word_pieces() -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer like BERT's: letters, pairs of letters, and the most frequent words."""
    letters = string.ascii_lowercase
    pairs = [a + b for a in letters for b in letters]
    starts = [*letters, *string.digits, *string.punctuation, *pairs, *WORDS.split()]
    inside = [f"##{p}" for p in [*letters, *string.digits, *pairs, *ENDINGS.split()]]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*SPECIAL, *starts, *inside]))}
    core = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    core.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=512, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _write(model: Any, spread: Callable[[str, nn.Parameter], float], tokenizer: Any, folder: Path) -> None:
    """Draw every matrix, in the order of their names; gains are 1 and biases 0 as the model makes them."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                half_width = spread(name, weight) * math.sqrt(3)  # of a uniform draw with that standard deviation
                weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * half_width)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


BUILDERS: Mapping[str, Callable[[Path], None]] = {"tiny-bert": _tiny_bert, "tiny-t5": _tiny_t5}
