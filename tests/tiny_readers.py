"""Models that read, small enough to build in a test, and a WordPiece tokenizer for them."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'"
WORDS = ["good", "bad", "film", "the", "was", "paris", "anna", "lives", "in", "new", "york", "##ly", "##s"]


def word_piece() -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer: known words whole, others letter by letter; control characters give no token."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS]
    vocab = {t: i for i, t in enumerate(tokens)}
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def tiny_model(kind: str, head: str, **arguments):
    """A seeded model in evaluation mode.

    Args:
        kind: bert (for `word_piece`), gpt2 or llama (for `tests.tiny.tiny_tokenizer`).
        head: sequence or token.
        arguments: of its config, as a task's `model_arguments` gives them.
    """
    if "id2label" in arguments:
        arguments = {k: v for k, v in arguments.items() if k != "num_labels"}
    wide = {"initializer_range": 0.4}  # so that answers differ from row to row
    small = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **wide}
    config = {
        "bert": lambda: BertConfig(**small, intermediate_size=32, max_position_embeddings=64, **arguments),
        "llama": lambda: LlamaConfig(**small, intermediate_size=32, pad_token_id=259, **arguments),
        "gpt2": lambda: GPT2Config(
            vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=259, **wide, **arguments
        ),
    }[kind]()
    torch.manual_seed(0)
    auto = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}[head]
    return auto.from_config(config).eval()


def loss_and_gradient(task, model, samples, processor, size):
    """Mean loss and its gradient from micro-batches of `size` samples."""
    model.zero_grad()
    parts = [task.loss(model, task.collate(samples[i : i + size], processor)) for i in range(0, len(samples), size)]
    count = sum(p.count for p in parts)
    loss = sum(p.total for p in parts) / count
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(loss.detach()), gradient
