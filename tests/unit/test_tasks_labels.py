"""Names of classes and tags that mark spans."""

import pytest

from lora_ft.errors import DataError, UsageError
from lora_ft.tasks._labels import class_weights, label_name, learn_labels
from lora_ft.tasks._spans import look_like_spans, spans_of
from lora_ft.tasks.text_classification import TextClassification


@pytest.mark.parametrize(
    ("value", "name"),
    [("spam", "spam"), (" spam\n", "spam"), (3, "3"), (-1, "-1"), (2.0, "2"), (True, "true"), ("07", "07")],
)
def test_a_label_is_called_what_the_row_says(value, name):
    assert label_name(value) == name


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "no label"), ("  ", "no label"), (float("nan"), "no label"), (0.5, "task: regression"), (["a"], "got")],
)
def test_what_is_no_name_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        label_name(value)


def test_labels_that_are_numbers_stand_in_the_order_of_numbers():
    assert learn_labels([(["10", "9", "-1"], "r:1")], [], None) == ("-1", "9", "10")
    assert learn_labels([(["10", "9", "x"], "r:1")], [], None) == ("10", "9", "x")


def test_labels_given_by_hand_keep_their_order_and_are_all():
    train = [(["b"], "r:1"), (["a"], "r:2")]
    assert learn_labels(train, [(["z"], "h:1")], ["z", "b", "a"]) == ("z", "b", "a")
    with pytest.raises(DataError, match=r"the label 'b' \(2 rows\) is not one of task.labels") as e:
        learn_labels([*train, (["b"], "r:3")], [], ["a", "z"])
    assert e.value.where == "r:1"
    with pytest.raises(UsageError, match=r"task.labels: the label 'a' is listed twice"):
        TextClassification().configure({"labels": ["a", "b", "a"]})
    assert TextClassification().configure({"labels": [0, 1]}).options.labels == ("0", "1")


def test_balance_needs_a_row_of_every_label():
    with pytest.raises(DataError, match="none has 'z'"):
        class_weights("balanced", ["a", "z"], {"a": 3})
    assert class_weights("balanced", ["a"], {"a": 3}, rows=3) == (1.0,)  # on every row: nothing to balance
    assert class_weights(None, ["a"], {"a": 3}) == ()


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-PER I-PER O B-LOC", [(1, 3, "PER"), (4, 5, "LOC")]),
        ("B-PER B-PER I-PER", [(0, 1, "PER"), (1, 3, "PER")]),
        ("I-PER I-PER O I-LOC I-PER", [(0, 2, "PER"), (3, 4, "LOC"), (4, 5, "PER")]),  # IOB1, and sequences gone wrong
        ("S-PER B-LOC I-LOC E-LOC E-LOC", [(0, 1, "PER"), (1, 4, "LOC"), (4, 5, "LOC")]),
        ("U-PER B-LOC L-LOC", [(0, 1, "PER"), (1, 3, "LOC")]),
        ("B-PER M-PER E-PER S-PER", [(0, 3, "PER"), (3, 4, "PER")]),
        ("O O", []),
    ],
)
def test_spans_are_read_from_every_common_scheme(tags, spans):
    assert spans_of(tags.split()) == spans


def test_parts_of_speech_are_no_spans():
    assert look_like_spans(["O", "B-PER", "I-PER"])
    assert not look_like_spans(["NN", "VB", "O"])
    assert not look_like_spans(["O"])
