"""image-text-to-text with the processors and chat templates of other families than the tiny model's."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import processors

from lora_ft.errors import UsageError
from lora_ft.models.random_models import tiny_vlm
from lora_ft.records import EncodeOptions, Example, PredictOptions
from lora_ft.registry import TASKS
from lora_ft.tasks._image_text import image_ids
from lora_ft.tasks._image_text_batch import Row, model_inputs

TASK = TASKS.get("image-text-to-text")
IGNORE = -100
# Qwen's and Gemma's way: a header line for each turn; an end token only where {END} says so.
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}MARK{% else %}{{ p['text'] }}{% endif %}{% endfor %}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("END", tiny_vlm.END)


SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}END\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
).replace("END", tiny_vlm.END)


def tokenizer(*more):
    made = tiny_vlm.tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(more)})
    return made


def tiles():
    """SmolVLM's own way: an image is cut into tiles, with a token for each row and column."""
    try:
        images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    except ImportError:
        pytest.skip("this version of Transformers wants torchvision for Idefics3")
    marks = ["<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))]
    return hf.Idefics3Processor(images, tokenizer(*marks), image_seq_len=4, chat_template=SMOLVLM)


LLAVA = TURNS.replace("MARK", "<image>")


def llava(template=LLAVA):
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return hf.LlavaProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip


def llava_next():
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 64], [64, 32]]
    )
    return hf.LlavaNextProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA,
    )  # fmt: skip


def gemma():
    """Line breaks around each image, which melt into those of the text beside it; kinds of tokens for the model."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer(*names.values())
    for name, token in names.items():
        setattr(words, name, token)
        setattr(words, f"{name}_id", words.convert_tokens_to_ids(token))
    images = hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    template = TURNS.replace("MARK", "<start_of_image>")
    return hf.Gemma3Processor(images, words, chat_template=template, image_seq_length=4)


def picture(number, height=40, width=30):
    return np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)


def talk(*pairs):
    def part(p):
        return {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}

    return Example({"messages": [{"role": r, "content": [part(p) for p in parts]} for r, parts in pairs]}, "row 1")


ROWS = (
    talk(("user", [picture(1), "what"]), ("assistant", ["a red circle"])),
    talk(("user", ["is it red"]), ("assistant", ["yes"])),
    talk(
        ("user", ["\nfirst\n", picture(2, 40, 80), picture(3, 90, 33), "\nand"]), ("assistant", ["a blue square"]),
        ("user", ["more", picture(4, 64, 64)]), ("assistant", ["no"]), ("user", ["is it"]), ("assistant", ["left"]),
    ),
)  # fmt: skip


def samples(processor, rows=ROWS, **options):
    encode = TASK.encoder(processor, EncodeOptions(max_length=4096, **options))
    return [s for row in rows for s in encode(row).samples]


def said(sample, processor):
    return processor.tokenizer.decode([x for x in sample.inputs["labels"] if x != IGNORE])


@pytest.mark.parametrize("make", [tiles, llava, llava_next, gemma])
def test_batches_are_what_transformers_makes_and_answers_are_found(make):
    processor = make()
    assert TASK.check_processor(processor) == []
    found = samples(processor)
    space, end = (" " if make is tiles else ""), tiny_vlm.END
    assert [said(s, processor) for s in found] == [
        f"{space}a red circle{end}", f"{space}yes{end}", f"{space}a blue square{end}{space}no{end}{space}left{end}",
    ]  # fmt: skip
    batch = TASK.collate(found, processor)
    own = processor(
        text=[s.inputs["text"] for s in found], padding=True, padding_side="right", return_tensors="pt",
        images=[[Image.fromarray(m.content) for m in s.inputs["images"].values()] for s in found],
        add_special_tokens=False,
    )  # fmt: skip
    assert set(batch) == {*own, "labels"}
    assert all(torch.equal(batch[k], v) for k, v in own.items())
    assert ("token_type_ids" in batch) == (make is gemma)
    kept = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert not set(batch["input_ids"][kept].tolist()) & image_ids(processor)
    mark = processor.tokenizer.decode(max(image_ids(processor)))
    # Tiles of each image, and the whole; LLaVA has nothing between two images side by side.
    runs = {tiles: [5, 0, 11], gemma: [1, 0, 3]}.get(make, [1, 0, 2])
    assert [TASK.show(s, processor).count(mark) for s in found] == runs


def llava_model(processor):
    torch.manual_seed(0)
    words = processor.tokenizer
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = hf.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id)
    return hf.LlavaForConditionalGeneration(config).eval().requires_grad_(False)


@torch.inference_mode()
def test_another_architecture_has_its_own_loss_and_answers():
    processor = llava()
    model = llava_model(processor)
    batch = TASK.collate(samples(processor), processor)
    own = float(model(**batch).loss)
    for loss in (TASK.loss, TASK.fast_loss):
        found = loss(model, batch)
        assert float(found.total) / found.count == pytest.approx(own, rel=1e-5)
    answers = [
        [p.output for p in TASK.predict(model, processor, ROWS, PredictOptions(5, size, EncodeOptions()))]
        for size in (1, 3)
    ]
    assert answers[0] == answers[1]


def test_a_template_that_rewrites_history_gives_each_answer_its_own_images():
    forgets = LLAVA.replace("{{ p['text'] }}", "{{ p['text'] if m['role'] == 'user' or final else '' }}")
    processor = llava(forgets.replace("{% for p in", "{% set final = loop.last %}{% for p in"))
    found = samples(processor, ROWS[2:])
    assert [said(s, processor) for s in found] == [f"{t}{tiny_vlm.END}" for t in ("a blue square", "no", "left")]
    assert [len(s.inputs["images"]) for s in found] == [2, 3, 3]
    encode = TASK.encoder(processor, EncodeOptions(max_length=4096))
    assert encode(ROWS[2]).outcome == "one sample per answer"
    assert TASK.collate(found, processor)["pixel_values"].shape[0] == 8


def test_an_answer_without_an_end_token_gets_one():
    processor = llava(LLAVA.replace(f"{tiny_vlm.END}\n", "\n", 1))
    (found,) = samples(processor, ROWS[:1])
    assert said(found, processor) == f"a red circle{tiny_vlm.END}"
    assert found.inputs["text"].endswith(tiny_vlm.END)
    assert TASK.collate([found], processor)["input_ids"].tolist() == [found.inputs["input_ids"]]


def test_a_template_without_a_system_role_has_the_system_text_in_the_first_turn():
    processor = llava("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLAVA)
    (found,) = samples(processor, ROWS[:1], system_prompt="look hard")
    assert "user\nlook hard\n\n<image>what" in found.inputs["text"]
    assert len(found.inputs["images"]) == 1
    never = llava("{{ raise_exception('closed') }}")
    with pytest.raises(ValueError, match="refuses this conversation: closed"):
        samples(never, ROWS[:1])


@pytest.mark.parametrize("writes", [True, False])
def test_a_tokenizer_that_adds_its_own_start_adds_it_where_the_template_does_not(writes):
    processor = llava(LLAVA if writes else LLAVA.replace(tiny_vlm.START, ""))
    words = processor.tokenizer
    start = words.convert_tokens_to_ids(tiny_vlm.START)
    words.bos_token = tiny_vlm.START
    words._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny_vlm.START}:0 $A:0", special_tokens=[(tiny_vlm.START, start)]
    )
    (found,) = samples(processor, ROWS[:1])
    assert found.inputs["input_ids"][:2] == [start, words.convert_tokens_to_ids("user")]
    assert found.inputs["input_ids"].count(start) == (2 if writes else 1)  # the template has it before each turn
    assert said(found, processor) == f"a red circle{tiny_vlm.END}"


def test_kinds_of_tokens_stand_beside_their_tokens_in_prompts_too():
    processor = gemma()
    found = samples(processor)
    rows = [Row(s.inputs["text"], s.inputs["input_ids"], [*s.inputs["images"].values()]) for s in found]
    batch = model_inputs(rows, processor, left=True)
    images = batch["input_ids"] == processor.tokenizer.image_token_id
    assert torch.equal(batch["token_type_ids"] == 1, images)
    assert images[2].sum() == 12
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny_vlm.tokenizer(), "does not take images and text together"),
        (lambda: llava(template=None), "has no chat template"),
        (lambda: llava(TURNS.replace("MARK", "")), "an image"),
        (lambda: llava("{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"), "an image"),
    ],
)  # fmt: skip
def test_a_processor_that_cannot_serve_is_refused_before_training(make, words):
    with pytest.raises(UsageError, match=words):
        TASK.check_processor(make())


def test_a_tokenizer_without_an_end_token_is_refused():
    processor = llava()
    processor.tokenizer.eos_token = None
    with pytest.raises(UsageError, match="never learn to stop"):
        TASK.check_processor(processor)
