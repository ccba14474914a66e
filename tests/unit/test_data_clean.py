"""The cleaning report names what is wrong, and deduplication drops no more than it says."""

import json

import numpy as np
import pytest

from lora_ft.data import clean
from lora_ft.errors import DataError
from lora_ft.records import Example


def labelled(*pairs, source="s", start=1):
    return [Example({"text": t, "label": label}, f"{source}:{n}", source) for n, (t, label) in enumerate(pairs, start)]


def test_duplicates_conflicts_and_leaks_are_named_and_nothing_is_dropped_unasked():
    train = labelled(("a b", "x"), ("a b", "x"), ("a b", "y"), ("c", "x"), ("d", "y"))
    held = labelled(("c", "y"), ("e", "x"), source="h")
    kept, still, report = clean(train, held, False)
    assert (kept, still) == (train, held)
    assert report.duplicates == ("s:2",)
    assert report.conflicts == (("s:1", "s:3"),)
    assert (report.overlap, report.leaked) == (("s:4",), ("h:1",))
    assert report.dropped == 0
    said = report.lines()
    assert ("note", "1 of 5 training rows repeat an earlier one (s:2): data.deduplicate=true drops them") in said
    assert ("warn", "1 training rows have the input of 1 held-out rows (s:4): data.deduplicate=true drops them") in said
    assert (
        "warn", "1 training rows have the input of an earlier row and another label (s:1 and s:3)"
    ) in said  # fmt: skip


def test_deduplication_drops_later_copies_and_rows_that_are_held_out():
    train = labelled(("a", "x"), ("a", "x"), ("a", "y"), ("c", "x"), ("d", "y"))
    held = labelled(("c", "y"), source="h")
    kept, still, report = clean(train, held, True)
    assert [e.where for e in kept] == ["s:1", "s:3", "s:5"]
    assert still == held
    assert (report.rows, report.dropped, report.labels) == (5, 2, {"x": 1, "y": 2})
    assert ("note", "1 of 5 training rows repeat an earlier one (s:2): dropped") in report.lines()
    assert ("note", "1 training rows have the input of 1 held-out rows (s:4): dropped") in report.lines()
    with pytest.raises(DataError, match="every training row is also held out"):
        clean(labelled(("c", "x")), held, True)


@pytest.mark.parametrize(
    ("first", "second", "duplicate", "conflict", "leak"),
    [
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "b"}, False, False, True),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}, True, False, True),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
         {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}, False, False, True),
        ({"text": "q"}, {"text": "q "}, False, False, False),
        ({"tokens": ["a"], "tags": ["X"]}, {"tokens": ["a"], "tags": ["Y"]}, False, True, True),
        ({"text": "a", "labels": ["x"]}, {"text": "a", "labels": []}, False, True, True),
        ({"question": "q", "context": "c", "answers": [], "id": "1"},
         {"question": "q", "context": "c", "answers": [], "id": "2"}, True, False, True),
        ({"anchor": "a", "positive": "p"}, {"anchor": "a", "positive": "q"}, False, False, False),
        ({"anchor": "a", "positive": "p", "negative": "n"}, {"anchor": "a", "positive": "p", "negative": "m"}, False,
         False, True),
        ({"question": "q", "choices": ["a", "b"], "label": 0}, {"question": "q", "choices": ["a", "b"], "label": 1},
         False, True, True),
        ({"inputs": np.ones(3), "target": 1}, {"inputs": np.ones(3), "target": 0}, False, True, True),
        ({"inputs": np.ones(3), "target": 1}, {"inputs": np.ones((3, 1)), "target": 1}, False, False, False),
        ({"inputs": {"a": np.ones(3)}, "target": 1}, {"inputs": {"a": np.ones(3)}, "target": 1}, True, False, True),
    ],
)  # fmt: skip
def test_what_counts_as_the_same_input_in_each_kind(first, second, duplicate, conflict, leak):
    one, two = Example(first, "1"), Example(second, "2")
    report = clean([one, two], [], False)[2]
    assert (bool(report.duplicates), bool(report.conflicts)) == (duplicate, conflict)
    assert bool(clean([one], [two], False)[2].overlap) == leak


def test_labels_are_counted_and_those_that_are_on_one_side_only_are_told():
    train = labelled(*[(f"t{i}", "often") for i in range(30)], ("a", "twice"), ("b", "twice"), ("c", "rare"))
    held = labelled(*[(f"h{i}", "often") for i in range(4)], ("k", "new"), source="h")
    report = clean(train, held, False)[2]
    assert report.labels == {"often": 30, "twice": 2, "rare": 1}
    said = report.lines()
    assert ("note", "3 labels: fewest rare (1), most often (30); data.sampling=balanced evens them out") in said
    assert ("note", "2 labels are in no held-out row: twice, rare") in said
    assert ("warn", "1 labels of held-out rows are in no training row: new") in said
    numbers = [Example({"text": str(i), "label": i / 3}, str(i)) for i in range(9)]
    assert clean(numbers, [], False)[2].labels == {}
    few = clean(
        labelled(*[(str(i), "abc"[i % 3]) for i in range(9)]), labelled(("x", "a"), ("y", "b"), ("z", "c")), False
    )
    assert [text for _, text in few[2].lines()][1:] == ["3 labels: 3 of each"]
    tags = [Example({"tokens": ["a", "b"], "tags": ["O", "X"]}, "1"), Example({"tokens": ["a"], "tags": ["O"]}, "2")]
    assert clean(tags, [], False)[2].labels == {"O": 2, "X": 1}


def test_empty_rows_lengths_and_sources_are_told():
    train = [*labelled(("abc", 0), ("... !", 0), source="one"), *labelled(("abcdefg", 1), source="two")]
    report = clean(train, labelled(("-", 1), source="h"), False)[2]
    assert report.empty == ("one:2", "h:1")
    assert (report.median_length, report.longest_length, report.longest) == (5, 7, "two:1")
    said = report.lines()
    assert ("note", "length: median 5 characters, longest 7 (two:1)") in said
    assert ("note", "rows by set: one 2, two 1") in said
    assert ("warn", "2 rows have no letter or digit (one:2, h:1)") in said
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    assert clean([Example({"messages": chat}, "1")], [], False)[2].longest_length == 5
    arrays = clean([Example({"inputs": np.ones(2), "target": 0.5}, "1")], [], False)[2]
    assert (arrays.longest_length, arrays.empty, arrays.lines()) == (None, (), [])


def test_the_facts_are_json_with_a_limit_on_places():
    train = labelled(*[("a", "x")] * 200)
    facts = json.loads(json.dumps(clean(train, [], True)[2].facts()))
    assert facts["duplicates"]["count"] == 199
    assert len(facts["duplicates"]["where"]) == 100
    assert facts["dropped"] == 199
    assert facts["labels"] == {"x": 1}
    assert facts["characters"] == {"median": 1, "longest": 1, "where": "s:1"}
