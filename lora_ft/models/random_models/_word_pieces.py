"""A small WordPiece tokenizer that needs no download."""

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Frequent English words and endings, so that text is not only single letters and pairs.
WORDS = """a about after all also an and any are as at back be because been but by can come could day did do even
first for from get give go good had has have he her him his how i if in into is it its just know like look made make
many me more most my new no not now of on one only or other our out over people said see she so some take than that
the their them then there these they think this time to two up us use very was way we well were what when which who
will with work would year you your"""
ENDINGS = """able al ally ance ant ate ed en ence ent er es est ful ing ion ish ism ist ity ive ize less ly ment ness
ous s tion"""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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
