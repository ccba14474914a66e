"""A tokenizer of whole words, with or without BERT's pairs, and gradients of tasks; made in a test, no network."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BERT = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
T5 = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
BART = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
SINGLE = {"[CLS]": ("[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"), "<s>": ("<s> $A </s>", None)}


def word_tokenizer(words: str, special: dict[str, str], dropped: str = "") -> PreTrainedTokenizerFast:
    """One token for each word of `words`; the characters in `dropped` vanish before that."""
    names = list(special.values())
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*names, *words.split()])}, unk_token=names[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if dropped:
        core.normalizer = normalizers.Replace(dropped, "")
    first = special.get("cls_token") or special.get("bos_token")
    single, pair = SINGLE.get(first, ("$A </s>", None))
    core.post_processor = processors.TemplateProcessing(
        single=single, pair=pair or "$A:0 $B:1", special_tokens=[(n, i) for i, n in enumerate(names)]
    )
    reads = ["input_ids", "attention_mask", *(["token_type_ids"] if pair else [])]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=reads, **special)


def summed(task, model, samples, processor, size):
    """Total, count and all gradients of `samples` in micro-batches of `size`."""
    model.zero_grad()
    total, count = 0.0, 0.0
    for i in range(0, len(samples), size):
        found = task.loss(model, task.collate(samples[i : i + size], processor))
        found.total.backward()
        total, count = total + found.total.item(), count + found.count
    return total, count, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
