"""Each layout of rows becomes its canonical form, and a row that is wrong is named with what is wrong."""

import json

import numpy as np
import pytest

from lora_ft.data import load_examples, load_sources
from lora_ft.errors import DataError, UsageError
from lora_ft.recipe import Source
from lora_ft.registry import FORMATS


def put(folder, rows, name="x.jsonl"):
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def one(folder, row, **options):
    examples, name = load_examples(put(folder, [row]), "auto", {}, **options)
    return examples[0].fields, name


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"text": "a", "label": " good "}, {"text": "a", "label": "good"}),
        ({"sentence": "a", "idx": 1, "label": 0}, {"text": "a", "label": 0}),
        ({"title": "t", "content": "a", "category": True}, {"text": "a", "label": "true"}),
        ({"text": "a", "intent": "ask"}, {"text": "a", "label": "ask"}),
        ({"text": "a", "label": 2.5}, {"text": "a", "label": 2.5}),
        ({"text": "a", "rating": "4"}, {"text": "a", "label": 4.0}),
        ({"sentence1": "a", "sentence2": "b", "score": 3}, {"text": "a", "text_pair": "b", "label": 3.0}),
        ({"premise": "a", "hypothesis": "b", "label": 1}, {"text": "a", "text_pair": "b", "label": 1}),
        ({"question": "a", "sentence": "b", "label": 1}, {"text": "a", "text_pair": "b", "label": 1}),
        ({"text": "a", "text_pair": "", "label": 1}, {"text": "a", "label": 1}),
        ({"text": "a", "labels": ["x", "y"]}, {"text": "a", "labels": ["x", "y"]}),
        ({"text": "a", "labels": "x | y"}, {"text": "a", "labels": ["x", "y"]}),
        ({"text": "a", "labels": '["x|y", 3]'}, {"text": "a", "labels": ["x|y", "3"]}),
        ({"text": "a", "labels": ""}, {"text": "a", "labels": []}),
        ({"text": "a", "labels": 3}, {"text": "a", "label": 3}),
        ({"text": "a", "label": "x|y"}, {"text": "a", "label": "x|y"}),
    ],
)
def test_labelled_text_takes_classes_numbers_pairs_and_several_labels(tmp_path, row, fields):
    assert one(tmp_path, row) == (fields, "labelled_text")


def test_labelled_rows_are_plain_text_for_a_task_that_wants_text(tmp_path):
    for column in ("text", "sentence", "content"):
        assert one(tmp_path, {column: "a", "label": 1}, kinds=("text",)) == ({"text": "a"}, "text")


@pytest.mark.parametrize(
    ("row", "fields", "name"),
    [
        ({"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}, {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
         "token_tags"),
        ({"tokens": ["a"], "pos_tags": [4], "ner_tags": [2]}, {"tokens": ["a"], "tags": ["2"]}, "token_tags"),
        ({"words": "[1] is", "labels": "O O"}, {"tokens": ["[1]", "is"], "tags": ["O", "O"]}, "token_tags"),
        ({"tokens": '["a b", "c"]', "tags": '["X", "Y"]'}, {"tokens": ["a b", "c"], "tags": ["X", "Y"]}, "token_tags"),
        ({"question": "q", "context": "a b a", "answers": {"text": ["a", "a"], "answer_start": [0, 4]}, "id": 7},
         {"question": "q", "context": "a b a", "id": "7",
          "answers": [{"text": "a", "start": 0}, {"text": "a", "start": 4}]},
         "squad"),
        ({"question": " q", "context": "c", "answers": []}, {"question": "q", "context": "c", "answers": []}, "squad"),
        ({"question": "q", "context": "c", "answers": '{"text": ["c"], "answer_start": [0]}'},
         {"question": "q", "context": "c", "answers": [{"text": "c", "start": 0}]}, "squad"),
        ({"question": "q", "choices": ["a", "b"], "answer": "B"}, {"question": "q", "choices": ["a", "b"], "label": 1},
         "multiple_choice"),
        ({"ctx": "q", "endings": ["a", "b"], "label": "1"}, {"question": "q", "choices": ["a", "b"], "label": 1},
         "multiple_choice"),
        ({"sent1": "q", "sent2": "s", "ending0": "a", "ending1": "b", "label": 0},
         {"question": "q", "choices": ["s a", "s b"], "label": 0}, "multiple_choice"),
        ({"question": "q", "A": "x", "B": "y", "C": "", "answer": "y"},
         {"question": "q", "choices": ["x", "y"], "label": 1}, "multiple_choice"),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
         {"question": "q", "choices": ["x", "y"], "label": 0}, "multiple_choice"),
        ({"anchor": "a", "positive": "p", "negative": "n"}, {"anchor": "a", "positive": "p", "negative": "n"}, "pairs"),
        ({"query": "a", "pos": ["p"], "neg": ["n"]}, {"anchor": "a", "positive": "p", "negative": "n"}, "pairs"),
        ({"sentence1": "a", "sentence2": "p"}, {"anchor": "a", "positive": "p"}, "pairs"),
        ({"question": "a", "answer": "p"}, {"anchor": "a", "positive": "p"}, "pairs"),
        ({"article": "a", "highlights": "b", "id": "x"}, {"prompt": "a", "completion": "b"}, "source_target"),
        ({"source": "a", "target": "b"}, {"prompt": "a", "completion": "b"}, "source_target"),
        ({"translation": {"en": "a", "de": "b"}}, {"prompt": "a", "completion": "b"}, "translation"),
    ],
)  # fmt: skip
def test_layouts_of_well_known_sets_are_detected(tmp_path, row, fields, name):
    assert one(tmp_path, row) == (fields, name)


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("labelled_text", {"text": "a", "label": None}, "'label' is empty"),
        ("labelled_text", {"text": " ", "label": 1}, "'text' is empty"),
        ("labelled_text", {"text": "a", "score": "much"}, "'score' must be a number, got 'much'"),
        ("labelled_text", {"text": "a", "label": {"x": 1}}, "must hold a class or a number, got dict"),
        ("labelled_text", {"text": "a", "labels": ["x", ""]}, "empty class name"),
        ("token_tags", {"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags"),
        ("token_tags", {"tokens": ["a", " "], "tags": ["O", "O"]}, "number 2 of 'tokens' is empty"),
        ("token_tags", {"tokens": [], "tags": []}, "no words"),
        ("token_tags", {"tokens": ["a"], "tags": [1.5]}, "number 1 of 'tags' must be text, got float"),
        ("squad", {"question": "q", "context": "a b cd", "answers": {"text": ["cd"], "answer_start": [1]}},
         "'cd' is not at character 1 of its context; the nearest place is 4"),
        ("squad", {"question": "q", "context": "a", "answers": {"text": ["z"], "answer_start": [0]}}, "nowhere in it"),
        ("squad", {"question": "q", "context": "a", "answers": {"text": ["a"], "answer_start": [-1]}},
         "not at character -1 of its context; the nearest place is 0"),
        ("squad", {"question": "q", "context": "a", "answers": {"text": ["a"]}}, "lists of the same length"),
        ("squad", {"question": "q", "context": "a", "answers": [{"text": "a"}]}, "no answer_start"),
        ("squad", {"question": "q", "context": "a", "is_impossible": True, "answers": [{"text": "a", "start": 0}]},
         "is_impossible is true, but"),
        ("multiple_choice", {"question": "q", "choices": ["a", "b"], "label": 2}, "label 2 is none of the choices"),
        ("multiple_choice", {"question": "q", "choices": ["a", "b"], "label": -1}, "label -1 is none of the choices"),
        ("multiple_choice", {"question": "q", "choices": ["1", "0"], "label": "0"}, "may mean more than one"),
        ("multiple_choice", {"question": "q", "choices": ["a"], "label": 0}, "at least two choices"),
        ("multiple_choice", {"question": "q", "choices": ["a", ""], "label": 0}, "choice 2 is empty"),
        ("pairs", {"anchor": "a", "positive": ""}, "'positive' is missing or empty"),
        ("pairs", {"query": "a", "pos": []}, "'pos' is an empty list"),
        ("source_target", {"source": "a", "target": 3}, "'target' must be text, got int"),
        ("translation", {"translation": {"en": "a", "de": "b", "fr": "c"}}, "3 languages"),
        ("arrays", {"inputs": [[1, 2], [3]], "target": 0}, "lists of different lengths"),
        ("arrays", {"inputs": ["a"], "target": 0}, "must hold numbers"),
        ("arrays", {"inputs": [], "target": 0}, "'inputs' is empty"),
        ("numeric_table", {"x": 1, "target": ""}, "'target' is missing or empty"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, name, row, said):
    path = put(tmp_path, "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said) as caught:
        load_examples(path, name, {})
    assert caught.value.where == f"{path}:2"


@pytest.mark.parametrize(
    ("kind", "row", "fields"),
    [
        ("labelled", {"text": "a"}, {"text": "a"}),
        ("labelled", {"sentence1": "a", "sentence2": "b"}, {"text": "a", "text_pair": "b"}),
        ("tokens", {"tokens": ["a"]}, {"tokens": ["a"]}),
        ("question", {"question": "q", "context": "c"}, {"question": "q", "context": "c"}),
        ("choices", {"question": "q", "choices": ["a", "b"]}, {"question": "q", "choices": ["a", "b"]}),
        ("choices", {"question": "q", "choices": ["a", "b"], "label": -1}, {"question": "q", "choices": ["a", "b"]}),
        ("pairs", {"text": "a"}, {"anchor": "a"}),
        ("prompt", {"article": "a"}, {"prompt": "a"}),
        ("prompt", {"translation": {"en": "a"}}, {"prompt": "a"}),
    ],
)
def test_rows_to_predict_may_lack_the_answer(tmp_path, kind, row, fields):
    assert one(tmp_path, row, kinds=(kind,), answered=False)[0] == fields


def test_every_question_of_a_nested_squad_file_is_an_example_with_a_place_of_its_own(tmp_path):
    def article(start):
        answered = {"id": "i1", "question": "q1", "answers": [{"text": "two", "answer_start": start}]}
        none = {"id": "i2", "question": "q2", "answers": [], "is_impossible": True}
        return {"title": "t", "paragraphs": [{"context": "one two", "qas": [answered, none]}]}

    path = put(tmp_path, json.dumps({"version": "v2.0", "data": [article(4), article(4)]}), "squad.json")
    examples, name = load_examples(path, "auto", {}, group_column="title")
    assert name == "squad"
    assert [e.where for e in examples] == [f"{path} row {r} [{n}]" for r in (1, 2) for n in (1, 2)]
    assert [e.fields["answers"] for e in examples[:2]] == [[{"text": "two", "start": 4}], []]
    assert {e.group for e in examples} == {"t"}
    path = put(tmp_path, json.dumps({"data": [article(4), article(3)]}), "bad.json")
    with pytest.raises(DataError, match=r"paragraph 1 question 1 \(i1\).* nearest place is 4") as caught:
        load_examples(path, "auto", {})
    assert caught.value.where == f"{path} row 2"


def test_lists_of_positives_and_negatives_are_all_used(tmp_path):
    path = put(tmp_path, [{"query": "q", "pos": ["p1", "p2"], "neg": ["n1", "n2", "n3"]}])
    examples, _ = load_examples(path, "auto", {})
    assert [(e.fields["positive"], e.fields["negative"]) for e in examples] == [
        ("p1", "n1"),
        ("p2", "n2"),
        ("p1", "n3"),
    ]


def test_pairs_that_a_label_says_something_about_are_no_positives(tmp_path):
    path = put(tmp_path, [{"sentence1": "a", "sentence2": "b", "label": 0}])
    with pytest.raises(DataError, match="look like labelled_text, which this task does not take"):
        load_examples(path, "auto", {}, kinds=("pairs",))


def test_rows_of_lists_and_named_lists_become_arrays(tmp_path):
    fields, _ = one(tmp_path, {"x": [[1, 2], [3, 4]], "y": 1})
    assert fields["inputs"].tolist() == [[1, 2], [3, 4]]
    assert (fields["inputs"].dtype, fields["target"]) == (np.int64, 1)
    fields, _ = one(tmp_path, {"inputs": {"a": [1.5], "b": 2}, "target": [0.5, 1.0]})
    assert {k: v.tolist() for k, v in fields["inputs"].items()} == {"a": [1.5], "b": 2}
    assert fields["target"].tolist() == [0.5, 1.0]


def test_a_table_of_numbers_keeps_the_order_of_its_columns_whatever_the_order_in_a_row(tmp_path):
    path = put(tmp_path, "x2,x10,target\n1,2.5,0\n3,4,1\n", "t.csv")
    examples, name = load_examples(path, "auto", {})
    assert name == "numeric_table"
    assert [(e.fields["inputs"].tolist(), e.fields["target"]) for e in examples] == [([1, 2.5], 0), ([3, 4], 1)]
    assert [type(e.fields["target"]) for e in examples] == [int, int]
    path = put(tmp_path, [{"a": 1, "b": 2, "target": 0.5}, {"target": 1.5, "b": 4, "a": 3}])
    examples, _ = load_examples(path, "auto", {})
    assert [e.fields["inputs"].tolist() for e in examples] == [[1, 2], [3, 4]]
    path = put(tmp_path, "x,patient,target\n1,p1,0\n2,p2,1\n", "g.csv")
    examples, _ = load_examples(path, "numeric_table", {}, group_column="patient")
    assert [(e.fields["inputs"].tolist(), e.group) for e in examples] == [([1.0], "p1"), ([2.0], "p2")]
    path = put(tmp_path, "x,target\n1,0\n,1\n", "hole.csv")
    with pytest.raises(DataError, match="column 'x' is empty") as caught:
        load_examples(path, "auto", {})
    assert caught.value.where == f"{path}:3"


def test_a_named_format_of_another_kind_says_which_ones_fit(tmp_path):
    path = put(tmp_path, [{"text": "a", "label": 1}])
    with pytest.raises(UsageError, match="'text' holds 'text' rows, which this task does not take") as caught:
        load_examples(path, "text", {}, kinds=("labelled",))
    assert "labelled_text" in caught.value.fix
    assert load_examples(path, "labelled_text", {}, kinds=("labelled",))[1] == "labelled_text"


def test_a_named_format_says_which_column_is_missing_by_any_of_its_names(tmp_path):
    path = put(tmp_path, [{"sentence": "a", "topic": 1}])
    with pytest.raises(DataError, match="needs the column 'label'; found: sentence, topic"):
        load_examples(path, "labelled_text", {})
    (example,), _ = load_examples(path, "auto", {"label": "topic"})
    assert example.fields == {"text": "a", "label": 1}
    path = put(tmp_path, "colour,target\nred,1\n", "t.csv")
    with pytest.raises(DataError, match="the rows are not in the format 'numeric_table'"):
        load_examples(path, "numeric_table", {})


def test_a_part_of_an_object_is_a_column_too(tmp_path):
    path = put(tmp_path, [{"translation": {"en": "a", "de": "b"}}])
    way = {"prompt": "translation.de", "completion": "translation.en"}
    (example,), _ = load_examples(path, "auto", way)
    assert example.fields == {"prompt": "b", "completion": "a"}
    with pytest.raises(DataError, match=r"no column 'translation\.fr'"):
        load_examples(path, "auto", {"prompt": "translation.fr", "completion": "translation.en"})


def test_the_group_of_a_row_is_kept_and_a_missing_one_is_refused(tmp_path):
    rows = [{"text": "a", "by": 3}, {"text": "b", "by": "x"}]
    path = put(tmp_path, rows)
    examples, _ = load_examples(path, "auto", {"text": "text"}, group_column="by")
    assert [(e.group, e.source) for e in examples] == [("3", path), ("x", path)]
    with pytest.raises(DataError, match="no column 'bye'; did you mean 'by'"):
        load_examples(path, "auto", {}, group_column="bye")
    path = put(tmp_path, [*rows, {"text": "c", "by": ""}])
    with pytest.raises(DataError, match="group column 'by' is empty") as caught:
        load_examples(path, "auto", {}, group_column="by")
    assert caught.value.where == f"{path}:3"


def test_several_sets_are_read_with_their_weights_and_none_twice(tmp_path):
    a = put(tmp_path, [{"text": "a", "label": 1}] * 2, "a.jsonl")
    b = put(tmp_path, [{"sentence": "b", "label": 2}], "b.jsonl")
    examples, name, weights = load_sources((Source(path=a, weight=2), Source(path=b)), "auto", {})
    assert [e.source for e in examples] == [a, a, b]
    assert (name, weights) == ("labelled_text", {a: 2.0, b: 1.0})
    assert load_sources(a, "auto", {}, kinds=("text",))[1:] == ("text", {a: 1.0})
    with pytest.raises(UsageError, match="twice"):
        load_sources((Source(path=a), Source(path=a)), "auto", {})
    with pytest.raises(UsageError, match="the same row") as caught:
        load_sources((Source(path=a), Source(path=str(tmp_path))), "auto", {})
    assert caught.value.where == f"{a}:1"


def test_every_kind_of_the_table_has_a_format():
    kinds = {f.kind for f in FORMATS.discover().values()}
    assert kinds == {
        "conversation", "prompt", "text", "labelled", "tokens", "question", "choices", "pairs", "arrays",
        "labelled_image", "labelled_audio", "audio_text", "image_mask", "boxes", "image_conversation",
    }  # fmt: skip
