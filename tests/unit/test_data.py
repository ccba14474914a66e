"""Rows from files: what is wrong is named by file and line, what is right arrives unchanged."""

import json
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_ft.data import encode_all, load_examples, read_rows
from lora_ft.errors import DataError
from lora_ft.records import Encoded, Example, Sample


def put(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{bad", "JSON"),
        (b"[1, 2]", "one JSON object"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'{"a": "\xe9"}', "not UTF-8"),
        (b'{"a": "\x00"}', "NUL"),
    ],
    ids=["syntax", "array", "duplicate", "nan", "surrogate", "latin1", "nul"],
)
def test_a_bad_jsonl_line_is_named_by_file_and_line(tmp_path, line, said):
    path = put(tmp_path, "x.jsonl", b'{"text": "ok"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=said) as caught:
        read_rows(path)
    assert f"{path}:3" in caught.value.where


def test_bom_crlf_and_emoji_are_read_as_they_are(tmp_path):
    path = put(
        tmp_path, "x.jsonl", b"\xef\xbb\xbf" + '{"text": "caf\u00e9 \U0001f600"}\r\n{"text": "b\u2028c"}\r\n'.encode()
    )
    assert [r.values["text"] for r in read_rows(path)] == ["café \U0001f600", "b\u2028c"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_give_rows_or_our_error(tmp_path, raw):
    for name in ("f.jsonl", "f.json", "f.csv", "f.txt"):
        path = put(tmp_path, name, raw)
        with suppress(DataError):  # anything else fails the test
            assert read_rows(path)


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the data extra")
    import pyarrow.parquet as pq

    rows = [{"prompt": "a", "completion": 'b,\n"c"'}, {"prompt": "d", "completion": "e"}]
    put(tmp_path, "1.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    put(tmp_path, "2.json", json.dumps({"data": rows}))
    put(tmp_path, "3.csv", 'prompt,completion\na,"b,\n""c"""\nd,e\n')
    put(tmp_path, "4.tsv", 'prompt\tcompletion\na\t"b,\n""c"""\nd\te\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "5.parquet")
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "6.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert [dict(r.values) for r in read_rows(str(tmp_path))] == rows * 6


@pytest.mark.parametrize(
    ("rows", "name", "fields"),
    [
        ([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}], "openai_messages",
         {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        ([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}], "sharegpt",
         {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        ([{"instruction": "q", "input": "i", "output": "a"}], "alpaca",
         {"messages": [{"role": "user", "content": "q\n\ni"}, {"role": "assistant", "content": "a"}]}),
        ([{"prompt": "q", "completion": "a"}], "prompt_completion", {"prompt": "q", "completion": "a"}),
        ([{"text": "q"}], "text", {"text": "q"}),
    ],
)  # fmt: skip
def test_each_format_is_detected_and_becomes_canonical(tmp_path, rows, name, fields):
    path = put(tmp_path, "x.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    (example,), detected = load_examples(path, "auto", {})
    assert detected == name
    assert example.fields == fields


def test_rows_to_answer_may_lack_the_answer_but_training_rows_may_not(tmp_path):
    path = put(tmp_path, "x.jsonl", '{"prompt": "q"}\n')
    (example,), name = load_examples(path, "auto", {}, answered=False)
    assert (name, example.fields) == ("prompt_completion", {"prompt": "q"})
    with pytest.raises(DataError, match="completion"):
        load_examples(path, "prompt_completion", {})


def test_columns_of_another_name_are_mapped_and_a_wrong_one_names_the_nearest(tmp_path):
    path = put(tmp_path, "x.csv", "question,answer\nq,a\n")
    (example,), _ = load_examples(path, "auto", {"prompt": "question", "completion": "answer"})
    assert example.fields == {"prompt": "q", "completion": "a"}
    with pytest.raises(DataError, match="'answer'"):
        load_examples(path, "auto", {"prompt": "question", "completion": "anser"})
    with pytest.raises(DataError, match="answer, question"):
        load_examples(path, "auto", {}, kinds=("conversation", "prompt", "text"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "answer is empty"),
        ({"messages": []}, "at least one"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text"),
        ({"messages": "not json"}, "not JSON"),
    ],
)
def test_a_wrong_conversation_is_named_by_row(tmp_path, row, said):
    path = put(tmp_path, "x.jsonl", json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said) as caught:
        load_examples(path, "auto", {})
    assert caught.value.where == f"{path}:1"


def test_a_missing_file_names_the_nearest_and_an_empty_one_is_refused(tmp_path):
    put(tmp_path, "train.jsonl", "")
    with pytest.raises(DataError, match=r"train\.jsonl"):
        read_rows(str(tmp_path / "tran.jsonl"))
    with pytest.raises(DataError, match="no rows"):
        read_rows(str(tmp_path / "train.jsonl"))


def encode(outcomes):
    def encoder(example):
        outcome = outcomes[int(example.where)]
        if outcome == "raise":
            raise ValueError("cannot")
        labelled = 0 if outcome == "masked" else 3
        kept = () if outcome.startswith(("dropped", "over")) else (Sample({"input_ids": [1, 2]}, 2, labelled, "x"),)
        return Encoded(kept, "" if outcome == "masked" else outcome)

    examples = [Example({}, str(i)) for i in range(len(outcomes))]
    return encode_all(examples, encoder, source="s", format_name="f", max_length=10)


def test_rows_without_a_label_are_counted_and_many_of_them_are_refused():
    samples, report = encode([""] * 30 + ["masked"])
    assert (len(samples), report.outcomes) == (30, {"no trainable token": 1})
    with pytest.raises(DataError, match="3 of 20 rows have no trainable token"):
        encode([""] * 17 + ["masked"] * 3)


def test_overlong_rows_are_counted_refused_or_leave_nothing():
    assert encode(["", "dropped: longer than max_length"])[1].outcomes == {"dropped: longer than max_length": 1}
    with pytest.raises(DataError, match="longer than max_length 10"):
        encode(["", "over max_length"])
    with pytest.raises(DataError, match="no row is left"):
        encode(["dropped: longer than max_length"])
    with pytest.raises(DataError, match="cannot"):
        encode(["", "raise"])


def test_questions_on_one_context_are_never_parted_by_a_share(tmp_path):
    from lora_ft.data import split

    qas = lambda n: [  # noqa: E731
        {"question": f"q{n}{i}", "id": f"{n}-{i}", "answers": [{"text": "text", "answer_start": 0}]} for i in range(5)
    ]
    paragraphs = [{"context": f"text number {n}", "qas": qas(n)} for n in range(12)]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    examples, _ = load_examples(str(tmp_path / "squad.json"), "auto", {})
    training, held = split(examples, "25%", 0)
    assert held
    assert not {e.fields["context"] for e in training} & {e.fields["context"] for e in held}


def test_pairs_of_one_row_are_never_parted_and_images_of_a_document_may_be(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"anchor": "a", "positive": ["b", "c"]}\n{"anchor": "d", "positive": "e"}\n')
    examples, _ = load_examples(str(tmp_path / "pairs.jsonl"), "auto", {})
    assert examples[0].group == examples[1].group != ""
    assert examples[2].group == ""
