"""image-text-to-text on a tiny model like SmolVLM: what is learnt from, what the model gets, what it answers."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lora_ft.errors import DataError, UsageError
from lora_ft.models.random_models import tiny_vlm
from lora_ft.records import EncodeOptions, Example, PredictOptions, moved
from lora_ft.registry import TASKS
from lora_ft_adapters import add_adapter, build_config, trainable

TASK = TASKS.get("image-text-to-text")
OPTIONS = EncodeOptions(max_length=512)
IGNORE = -100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("vlm")
    tiny_vlm.build(made)
    return made


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def picture(number, height=40, width=30):
    return np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)


def turns(*pairs):
    """(role, [text or array]) -> an example's messages."""

    def part(p):
        return {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}

    return Example({"messages": [{"role": r, "content": [part(p) for p in parts]} for r, parts in pairs]}, "row 1")


ONE = turns(("user", [picture(1), "Describe the image."]), ("assistant", ["a red circle"]))
NONE = turns(("user", ["is it red"]), ("assistant", ["yes"]))
LATER = turns(
    ("user", ["first", picture(2), "and", picture(3, 24, 60), "what"]), ("assistant", ["a blue square"]),
    ("user", ["and now", picture(4)]), ("assistant", ["no"]), ("user", ["is it"]), ("assistant", ["left"]),
)  # fmt: skip


def encoded(example, processor, **options):
    return TASK.encoder(processor, EncodeOptions(**{"max_length": 512, **options}))(example)


def sample(example, processor):
    (found,) = encoded(example, processor).samples
    return found


def learnt(found, processor):
    """The labelled tokens in pieces of neighbours."""
    pieces, before = [], IGNORE
    for x in found.inputs["labels"]:
        if x != IGNORE:
            pieces[len(pieces) - (before != IGNORE) :] = [[*(pieces[-1] if before != IGNORE else []), x]]
        before = x
    return [processor.tokenizer.decode(p) for p in pieces]


def test_an_answer_before_a_later_image_is_learnt_too_and_no_image_is(processor):
    found = sample(LATER, processor)
    end = tiny_vlm.END
    assert learnt(found, processor) == [f"a blue square{end}", f"no{end}", f"left{end}"]
    labelled = {x for x in found.inputs["labels"] if x != IGNORE}
    assert processor.image_token_id not in labelled
    assert found.inputs["input_ids"].count(processor.image_token_id) == 3 * tiny_vlm.IMAGE_TOKENS
    assert found.labelled == len([x for x in found.inputs["labels"] if x != IGNORE])
    assert all(x in (IGNORE, i) for x, i in zip(found.inputs["labels"], found.inputs["input_ids"], strict=True))


def test_the_loss_is_transformers_own_with_labels_made_by_hand(processor, model):
    shown = [Image.fromarray(picture(1))]
    asked = "<|im_start|>user\n<image>Describe the image.<|im_end|>\n<|im_start|>assistant\n"
    given = processor(text=[f"{asked}a red circle<|im_end|>\n"], images=[shown], return_tensors="pt")
    start = processor(text=[asked], images=[shown], return_tensors="pt")["input_ids"].shape[1]
    labels = given["input_ids"].clone()
    labels[:, :start] = IGNORE
    labels[:, -1] = IGNORE  # the line break behind the end token
    own = float(model(**given, labels=labels).loss)
    batch = TASK.collate([sample(ONE, processor)], processor)
    assert torch.equal(batch["labels"], labels)
    assert torch.equal(batch["pixel_values"], given["pixel_values"])
    for loss in (TASK.loss, TASK.fast_loss):
        found = loss(model, batch)
        assert found.count == 4
        assert float(found.total) / found.count == pytest.approx(own, rel=1e-5)


def test_rows_with_any_number_of_images_share_a_batch(processor, model):
    samples = [sample(e, processor) for e in (LATER, NONE, ONE)]
    batch = TASK.collate(samples, processor)
    assert batch["pixel_values"].shape == (3 + 0 + 1, 3, tiny_vlm.SIDE, tiny_vlm.SIDE)
    together = TASK.loss(model, batch)
    apart = [TASK.loss(model, TASK.collate([s], processor)) for s in samples]
    assert float(together.total) == pytest.approx(sum(float(a.total) for a in apart), rel=1e-5)
    assert together.count == sum(a.count for a in apart) == 8 + 2 + 4
    assert int(together.hits["token_accuracy"]) == sum(int(a.hits["token_accuracy"]) for a in apart)
    assert float(TASK.fast_loss(model, batch).total) == pytest.approx(float(together.total), rel=1e-5)


def test_the_fast_path_gives_the_plain_gradients(processor, model):
    config = build_config("lora", {"r": 2, "target_modules": ["q_proj", "linear_1"], "init_lora_weights": False},
                          TASK.peft_task_type, model)  # fmt: skip
    adapted = add_adapter(model, config)
    batch = TASK.collate([sample(e, processor) for e in (LATER, ONE)], processor)
    found = []
    for loss in (TASK.loss, TASK.fast_loss):
        adapted.zero_grad()
        loss(adapted, batch).total.backward()
        found.append({n: p.grad.clone() for n, p in trainable(adapted)})
    assert any("vision" in n for n in found[0])
    assert all(bool(g.abs().sum() > 0) for g in found[0].values())
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5 * float(gradient.abs().max())), name


def test_an_image_is_never_cut(processor):
    length = sample(ONE, processor).length
    assert length == 17 + tiny_vlm.IMAGE_TOKENS
    assert encoded(ONE, processor, max_length=length).samples
    short = encoded(ONE, processor, max_length=length - 1)
    assert short.samples == ()
    assert short.outcome == "dropped: longer than max_length"
    assert encoded(ONE, processor, max_length=length - 1, overlong="error").outcome == "over max_length"
    for policy in ("truncate", "truncate_prompt"):
        with pytest.raises(UsageError, match="cut images in two"):
            TASK.encoder(processor, EncodeOptions(overlong=policy))
    with pytest.raises(UsageError, match="where images stand"):
        TASK.encoder(processor, EncodeOptions(template="none"))


def test_an_image_in_the_text_is_refused(processor):
    with pytest.raises(ValueError, match="'<image>', which stands for an image"):
        encoded(turns(("user", [picture(1), "what is <image> for"]), ("assistant", ["no"])), processor)


@pytest.mark.parametrize(
    ("value", "words"),
    [("none.png", "no such file"), ("../a.png", "outside"), (b"no image", "no image"), (b"", "0 bytes")],
)
def test_a_bad_image_is_named(processor, tmp_path, value, words):
    bad = turns(("user", [value if isinstance(value, bytes) else picture(1), "what"]), ("assistant", ["no"]))
    bad.fields["messages"][0]["content"][0] = {"type": "image", "image": value}
    bad = Example(bad.fields, "rows.jsonl:7", root=str(tmp_path))
    with pytest.raises(ValueError, match=words):
        encoded(bad, processor)
    with pytest.raises(DataError, match=words) as caught:
        list(TASK.predict(torch.nn.Linear(1, 1), processor, [bad], PredictOptions(4, 2, OPTIONS)))
    assert "rows.jsonl:7" in str(caught.value)


def test_a_giant_image_is_refused_before_it_is_decoded(processor):
    with pytest.raises(ValueError, match=r"max_pixels"):
        encoded(turns(("user", [_png(400, 300), "what"]), ("assistant", ["no"])), processor, max_pixels=100_000)


def _png(width, height):
    import io

    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_a_conversation_that_ends_with_the_user_has_nothing_to_learn(processor):
    (found,) = encoded(turns(("user", [picture(1), "what"])), processor).samples
    assert found.labelled == 0


def test_the_system_prompt_goes_first(processor):
    found = encoded(ONE, processor, system_prompt="look hard").samples[0]
    text = TASK.show(found, processor)
    assert text.startswith("<|im_start|>system\nlook hard<|im_end|>\n<|im_start|>user\n<image>Describe")
    assert text.count("<image>") == 1
    assert "[[a red circle<|im_end|>]]" in text


@torch.inference_mode()
def test_answers_are_the_models_own_whoever_stands_beside_them(processor, model):
    examples = [ONE, LATER, NONE, turns(("user", [picture(9), picture(8), "what is the colour"]))]
    batched = list(TASK.predict(model, processor, examples, PredictOptions(6, 4, OPTIONS)))
    alone = list(TASK.predict(model, processor, examples, PredictOptions(6, 1, OPTIONS)))
    assert [p.output for p in batched] == [p.output for p in alone]
    assert [p.reference for p in batched] == ["a red circle", "left", "yes", None]
    assert [len(p.details["images"]) for p in batched] == [1, 3, 0, 2]
    text = "<|im_start|>user\n<image>Describe the image.<|im_end|>\n<|im_start|>assistant\n"
    assert batched[0].input == text
    given = processor(text=[text], images=[[Image.fromarray(picture(1))]], return_tensors="pt")
    out = model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert batched[0].output == processor.tokenizer.decode(out, skip_special_tokens=True).strip()
    assert len({p.output for p in batched}) > 1


def test_threads_encode_and_collate_alike(processor):
    examples = [(ONE, LATER, NONE)[i % 3] for i in range(48)]
    encode = TASK.encoder(processor, OPTIONS)

    def work(example):
        (found,) = encode(example).samples
        return TASK.collate([found, *encode(NONE).samples], processor)

    alone = [work(e) for e in examples[:3]]
    with ThreadPoolExecutor(8) as pool:
        for i, batch in enumerate(pool.map(work, examples)):
            assert all(torch.equal(v, alone[i % 3][k]) for k, v in batch.items())


def test_probes_are_whole_samples_and_few(processor, model):
    samples = [sample(e, processor) for e in (LATER, ONE, NONE)]
    probes = TASK.probes(samples, processor)
    assert [p["input_ids"].shape[1] for p in probes] == sorted(s.length for s in samples)
    assert all("labels" not in p and all(isinstance(v, torch.Tensor) for v in p.values()) for p in probes)
    with torch.inference_mode():
        assert TASK.outputs(model, moved(probes[-1], "cpu")).shape[:2] == probes[-1]["input_ids"].shape


def test_half_precision_models_get_pixels_of_their_own_kind(processor, model, monkeypatch):
    batch = TASK.collate([sample(ONE, processor)], processor)
    half, seen = model.to(torch.bfloat16), []
    hook = half.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["pixel_values"].dtype), with_kwargs=True
    )
    plain, fast = (float(loss(half, batch).total) for loss in (TASK.loss, TASK.fast_loss))
    assert plain == pytest.approx(fast, rel=5e-2)
    hook.remove()
    write = half.generate
    monkeypatch.setattr(half, "generate", lambda **given: seen.append(given["pixel_values"].dtype) or write(**given))
    assert len(list(TASK.predict(half, processor, [ONE], PredictOptions(1, 1, OPTIONS)))) == 1
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 3


def test_the_ends_of_an_answer_and_its_length(processor, model):
    end = processor.tokenizer.convert_tokens_to_ids(tiny_vlm.END)
    assert TASK.generation_defaults(model, processor)["eos_token_id"] == [end]
    unanswered = turns(("user", [picture(1), "what"]))
    assert TASK.reference_lengths(processor, [ONE, LATER, unanswered]) == [4, 2, None]
    with pytest.raises(UsageError, match="nothing to chat with"):
        TASK.prompt(processor, ONE, OPTIONS)
