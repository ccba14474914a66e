"""builtin:tiny-vlm."""

import math
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from ._word_pieces import WORDS
from ._write import write

VERSION = "1"
DESCRIPTION = "An image-text model like LLaVA with 0.4 M RANDOM weights, to try recipes; knows nothing."
WIDTH = 96
VISION_WIDTH = 64
SIDE, PATCH = 32, 8  # pixels of an image, and of the part of it that becomes a token
IMAGE_TOKENS = (SIDE // PATCH) ** 2
MORE_WORDS = """system user assistant Describe image picture colour shape red green blue yellow white black circle
square triangle left right yes No Yes is"""
START, END, PAD, IMAGE = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>"
# ChatML, as the LLaVA models on Qwen have it: no {% generation %} marks.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each frequent word, with and without a space before it, and for each byte."""
    words = [*WORDS.split(), *MORE_WORDS.split()]
    space = "\u0120"  # how byte-level tokenizers write a space
    tokens = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *(space + w for w in words)])
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, eos_token=END, pad_token=PAD, additional_special_tokens=[START, IMAGE],
        model_max_length=512,
    )  # fmt: skip


def processor() -> LlavaProcessor:
    """Images of any shape as 32 x 32 pixels."""
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        images, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )


def build(folder: Path) -> None:
    """Two layers of width 64 that see, and two of width 96 that write."""
    made = processor()
    words = made.tokenizer
    end, pad, image = words.convert_tokens_to_ids([END, PAD, IMAGE])
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    # CLIP and SigLIP have a norm behind the layer that LLaVA reads, and no gradient ever reaches it.
    vision = PixtralVisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=2 * VISION_WIDTH, num_hidden_layers=2, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip

    def spread(name: str, weight: nn.Parameter) -> float:
        """Linear layers keep a signal's size; what is added to it, or looked up, is smaller."""
        return 0.3 if "embed" in name and "patch" not in name else math.sqrt(1.0 / weight[0].numel())

    write(LlavaForConditionalGeneration(config), folder, made, spread)
