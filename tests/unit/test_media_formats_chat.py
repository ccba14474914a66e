"""Conversations with images: every layout gives the same parts, and no image gets lost."""

import json

import pytest

from lora_ft.data import load_examples
from lora_ft.errors import DataError


def put(folder, row):
    path = folder / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def chat(folder, row, name="auto"):
    examples, found = load_examples(put(folder, row), name, {}, kinds=("image_conversation",))
    return [e.fields["messages"] for e in examples], found


def image(value):
    return {"type": "image", "image": value}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


def said(role, content):
    return {"role": role, "content": content}


ONE = [user(image("x.png"), text("What?")), assistant("A cat.")]
SLOT = {"type": "image"}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"image": "x.png", "question": "What?", "answer": "A cat."}, "image_question"),
        ({"images": ["x.png"], "prompt": "What?", "completion": "A cat."}, "image_question"),
        ({"images": '["x.png"]', "prompt": "<image>What?", "completion": "A cat."}, "image_question"),
        ({"images": ["x.png"], "prompt": [said("user", "What?")], "completion": [said("assistant", "A cat.")]},
         "image_question"),
        ({"messages": [said("user", "What?"), said("assistant", "A cat.")], "image": "x.png"}, "vision_messages"),
        ({"messages": [said("user", "<image>\nWhat?"), said("assistant", "A cat.")], "images": ["x.png"]},
         "vision_messages"),
        ({"messages": [said("user", [SLOT, text("What?")]), said("assistant", [text("A cat.")])],
          "images": ["x.png"]}, "vision_messages"),
        # Arrow gives every part every key.
        ({"messages": [said("user", [{"type": "image", "text": None, "image": None},
                                     {"type": "text", "text": "What?", "image": None}]),
                       said("assistant", [{"type": "text", "text": "A cat.", "image": None}])],
          "images": ["x.png"], "tools": None}, "vision_messages"),
        ({"messages": [said("user", [{"type": "image", "path": "x.png"}, "What?"]), said("assistant", "A cat.")]},
         "vision_messages"),
        ({"image": "x.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                              {"from": "gpt", "value": "A cat."}]}, "llava"),
    ],
)  # fmt: skip
def test_every_layout_of_one_question_gives_the_same_conversation(tmp_path, row, name):
    assert chat(tmp_path, row) == ([ONE], name)


def test_a_caption_answers_a_request_and_several_captions_are_several_examples(tmp_path):
    asked = user(image("x.png"), text("Describe the image."))
    for column in ("caption", "text"):
        row = {"image": "x.png", column: "A cat."}
        assert chat(tmp_path, row) == ([[asked, assistant("A cat.")]], "image_caption")
    both = chat(tmp_path, {"image": "x.png", "caption": ["A cat.", "A tom."]})[0]
    assert both == [[asked, assistant("A cat.")], [asked, assistant("A tom.")]]


def test_images_fill_their_places_in_order_over_turns_and_keep_named_ones(tmp_path):
    turns = [
        said("system", "Look."),
        said("user", [text("First"), SLOT, {"type": "image", "image": "own.png"}, text("then"), SLOT]),
        said("assistant", "Yes."),
        said("user", [SLOT, text("and <image>?")]),
        said("assistant", "No."),
    ]
    (messages,), _ = chat(tmp_path, {"messages": turns, "images": ["1.png", "2.png", "3.png"]})
    assert messages == [
        {"role": "system", "content": [text("Look.")]},
        user(text("First"), image("1.png"), image("own.png"), text("then"), image("2.png")),
        assistant("Yes."),
        user(image("3.png"), text("and <image>?")),
        assistant("No."),
    ]
    marked = [said("user", "<image> left, right <image>\n"), said("assistant", "a"), said("user", "And?"),
              said("assistant", "<b>")]  # fmt: skip
    (messages,), _ = chat(tmp_path, {"messages": marked, "images": ["1.png", "2.png"]})
    assert messages[0] == user(image("1.png"), text(" left, right "), image("2.png"))
    assert messages[2:] == [user(text("And?")), assistant("<b>")]


def test_rows_without_an_image_are_conversations_too_and_keep_their_text(tmp_path):
    turns = [said("user", "What does <image> mean?"), said("assistant", "A tag.")]
    expected = [user(text("What does <image> mean?")), assistant("A tag.")]
    for row in ({"messages": turns}, {"messages": turns, "images": []}, {"messages": turns, "image": None}):
        assert chat(tmp_path, row) == ([expected], "vision_messages")


@pytest.mark.parametrize(
    ("name", "row", "what"),
    [
        ("vision_messages", {"messages": [said("user", [SLOT, SLOT, text("a")])], "images": ["x.png"]},
         "2 places for images, but the row has 1 images"),
        ("vision_messages", {"messages": [said("user", [SLOT, text("a")])], "images": ["x.png", "y.png"]},
         "1 places for images, but the row has 2 images"),
        ("vision_messages", {"messages": [said("user", [SLOT, text("a")])]}, "1 places for images, .* 0 images"),
        ("vision_messages", {"messages": [said("user", "a"), said("assistant", [SLOT, text("b")])], "image": "x.png"},
         "turn 2: an assistant's answer can hold text only"),
        ("vision_messages", {"messages": [said("system", "a")], "image": "x.png"}, "no turn of the user"),
        ("vision_messages", {"messages": [said("user", " "), said("assistant", "b")]}, "turn 1 is empty"),
        ("vision_messages", {"messages": [said("user", [text(" ")]), said("assistant", "b")]}, "turn 1 is empty"),
        ("vision_messages", {"messages": [said("user", "a"), said("assistant", [text("")])]}, "answer is empty"),
        ("vision_messages", {"messages": [said("user", [{"type": "video"}])]},
         "turn 1: a part of type 'video'; allowed: .*text.*image"),
        ("vision_messages", {"messages": [said("user", [{"type": "text", "text": 3}])]}, "whose text is none"),
        ("vision_messages", {"messages": [said("user", [4])]}, "a part of type 'int'"),
        ("vision_messages", {"messages": [said("user", 4)]}, "content must be text or a list of parts, got int"),
        ("vision_messages", {"messages": [said("narrator", "a")]}, "unknown role 'narrator'"),
        ("vision_messages", {"messages": ["a"]}, "turn 1 must be an object, got str"),
        ("vision_messages", {"messages": {}}, "at least one message"),
        ("vision_messages", {"messages": [said("user", "a")], "tools": [{}]}, "take no tools"),
        ("vision_messages", {"messages": [said("user", "a")], "images": ["x.png", None]}, "image 2 of column 'images'"),
        ("image_question", {"image": None, "question": "q", "answer": "a"}, "no image; found: question, answer"),
        ("image_question", {"image": "x.png", "question": "q", "answer": " "}, "'answer' is empty"),
        ("image_question", {"image": "x.png", "question": "", "answer": "a"}, "'question' is empty"),
        ("image_caption", {"image": "x.png", "caption": []}, "'caption' is an empty list"),
        ("image_caption", {"image": "x.png", "caption": ["a", ""]}, "'caption' is empty"),
        ("image_caption", {"image": None, "caption": "a"}, "'image' is empty"),
        ("llava", {"image": "x.png", "conversations": [{"from": "human", "value": "<image> <image>"}]},
         "2 places for images, but the row has 1 images"),
    ],
)  # fmt: skip
def test_a_wrong_conversation_is_named_with_what_was_got(tmp_path, name, row, what):
    with pytest.raises(DataError, match=what) as caught:
        chat(tmp_path, row, name)
    assert caught.value.where.endswith("x.jsonl:1")
