"""Files of words and arrays, names of classes, and the places that errors name."""

import json
import os
import zipfile

import numpy as np
import pytest

from lora_ft.data import load_examples, read_rows
from lora_ft.data.read import builtin_path
from lora_ft.data.readers import readers
from lora_ft.errors import DataError


def put(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def rows_of(path):
    return [(r.values["tokens"], r.values.get("tags"), r.where.removeprefix(path)) for r in read_rows(path)]


CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

# sent_id = 2
Peter NNP B-NP B-PER
# # B-NP O
"""


@pytest.mark.parametrize("suffix", [".conll", ".bio", ".iob", ".iob2"])
def test_conll_files_give_sentences_by_the_line_of_their_first_word(tmp_path, suffix):
    path = put(tmp_path, f"x{suffix}", CONLL_2003.replace("\n", "\r\n"))
    assert rows_of(path) == [
        (["EU", "rejects"], ["B-ORG", "O"], ":3"),
        (["Peter", "#"], ["B-PER", "O"], ":7"),
    ]
    examples, name = load_examples(path, "auto", {})
    assert (name, examples[1].where) == ("token_tags", f"{path}:7")


def test_a_tab_keeps_spaces_inside_a_word_and_a_comment_with_a_tab_is_one(tmp_path):
    path = put(tmp_path, "x.conll", "# text =\tNew York\nNew\u00a0York 2\tB-LOC\n#\tO\nis\tO\n")
    assert rows_of(path) == [(["New\u00a0York 2", "#", "is"], ["B-LOC", "O", "O"], ":2")]


def test_words_alone_are_rows_to_predict(tmp_path):
    path = put(tmp_path, "x.conll", "# a comment\na\n#\n\nb\n")
    assert rows_of(path) == [(["a", "#"], None, ":2"), (["b"], None, ":5")]
    examples, _ = load_examples(path, "auto", {}, kinds=("tokens",), answered=False)
    assert examples[0].fields == {"tokens": ["a", "#"]}
    with pytest.raises(DataError, match="'tags'"):
        load_examples(path, "token_tags", {})


def test_a_conll_line_with_other_columns_is_named(tmp_path):
    path = put(tmp_path, "x.bio", "a O\nb\nc X O\n")
    with pytest.raises(DataError, match="2 lines are wrong") as caught:
        read_rows(path)
    assert f"{path}:2: 1 columns, the file's first word has 2: 'b'" in caught.value.where
    assert f"{path}:3: 3 columns" in caught.value.where


CONLLU = """# sent_id = 1
# text = Vámonos al mar
1-2	Vámonos	_	_	_	_	_	_	_	_
1	Vamos	ir	VERB	_	_	0	root	_	_
2	nos	nosotros	PRON	_	_	1	obj	_	_
2.1	x	x	X	_	_	_	_	_	_
3-4	al	_	_	_	_	_	_	_	_
3	a	a	ADP	_	_	5	case	_	_
"""


def test_conllu_has_forms_and_universal_tags_without_ranges_and_empty_nodes(tmp_path):
    path = put(tmp_path, "x.conllu", CONLLU + "\n# sent_id = 2\n1\t#\t#\tSYM\t_\t_\t0\troot\t_\t_\n")
    assert rows_of(path) == [
        (["Vamos", "nos", "a"], ["VERB", "PRON", "ADP"], ":4"),
        (["#"], ["SYM"], ":11"),
    ]
    path = put(tmp_path, "y.conllu", CONLLU + "4 el DET\n")
    with pytest.raises(DataError, match="CoNLL-U has 10") as caught:
        read_rows(path)
    assert caught.value.where == f"{path}:9"


def test_an_archive_of_arrays_gives_rows_in_the_numbers_own_precision(tmp_path):
    path = str(tmp_path / "a.npz")
    x, y = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 1, 1])
    np.savez_compressed(path, X=x, y=y)
    examples, name = load_examples(path, "auto", {}, kinds=("arrays",))
    assert name == "arrays"
    assert [e.where for e in examples] == [f"{path} row {n}" for n in (1, 2, 3)]
    assert np.array_equal(np.stack([e.fields["inputs"] for e in examples]), x)
    assert examples[0].fields["inputs"].dtype == np.float32
    assert [e.fields["target"] for e in examples] == [0, 1, 1]
    assert type(examples[0].fields["target"]) is int


def test_every_other_array_of_an_archive_is_a_named_input_but_the_group(tmp_path):
    path = str(tmp_path / "a.npz")
    np.savez(path, image=np.ones((2, 3, 3)), age=np.array([30, 40]), target=np.zeros((2, 4)), who=np.array(["a", "b"]))
    examples, _ = load_examples(path, "auto", {}, group_column="who")
    assert {k: v.shape for k, v in examples[1].fields["inputs"].items()} == {"image": (3, 3), "age": ()}
    assert examples[1].fields["target"].shape == (4,)
    assert examples[1].group == "b"
    with pytest.raises(DataError, match="'who' must hold numbers") as caught:
        load_examples(path, "auto", {})
    assert f"{path} row 1" in caught.value.where
    examples, _ = load_examples(path, "auto", {"target": "age"}, group_column="who")
    assert examples[0].fields["target"] == 30


def test_rows_to_predict_from_an_archive_need_no_target_and_nan_is_refused(tmp_path):
    path = str(tmp_path / "a.npz")
    np.savez(path, x=np.array([[1.0], [np.nan]]))
    with pytest.raises(DataError, match="'x' holds NaN or infinity") as caught:
        load_examples(path, "auto", {}, answered=False)
    assert caught.value.where == f"{path} row 2"
    np.savez(path, x=np.array([[1.0], [2.0]]))
    examples, _ = load_examples(path, "auto", {}, answered=False)
    assert [e.fields["inputs"].tolist() for e in examples] == [[1.0], [2.0]]


def test_archives_that_are_pickled_damaged_or_uneven_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.array([{}, []], dtype=object), y=np.zeros(2))
    with pytest.raises(DataError, match="Python objects, which are never loaded"):
        read_rows(str(path))
    np.savez(path, x=np.zeros((3, 2)), y=np.zeros(2))
    with pytest.raises(DataError, match="different numbers of rows: x 3, y 2"):
        read_rows(str(path))
    np.savez(path, x=np.zeros((3, 2)), y=np.float64(1))
    with pytest.raises(DataError, match="'y' is a single number"):
        read_rows(str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="not a NumPy archive"):
        read_rows(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00garbage")
    with pytest.raises(DataError, match="damaged NumPy archive"):
        read_rows(str(path))


def test_class_names_that_datasets_wrote_take_the_place_of_numbers(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the data extra")
    datasets.disable_progress_bars()
    named = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": named, "tags": datasets.List(named)})
    rows = [{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": -1, "tags": []}]
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(str(tmp_path / "x.parquet"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    wanted = [
        {"text": "a", "label": "pos", "tags": ["neg", "pos"]},
        {"text": "b", "label": None, "tags": []},
    ]
    assert [dict(r.values) for r in read_rows(str(tmp_path / "x.parquet"))] == wanted
    assert [dict(r.values) for r in read_rows("org/name:test")] == wanted
    with pytest.raises(DataError, match="the label is missing") as caught:
        load_examples("org/name", "auto", {}, kinds=("labelled",))
    assert caught.value.where == "org/name row 2"


def test_a_missing_file_never_lists_files_of_other_names(tmp_path):
    put(tmp_path, "constraints.txt", "x")
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / "sales.jsonl"))
    assert caught.value.what == f"data file not found; no file in {tmp_path} has a name like it"
    put(tmp_path, "sales-2.jsonl", "x")
    with pytest.raises(DataError, match=r"did you mean 'sales-2\.jsonl'\?"):
        read_rows(str(tmp_path / "sales.jsonl"))


def test_a_suffix_has_one_reader():
    suffixes = [".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".npz", ".conll", ".conllu", ".bio"]
    assert set(suffixes) <= set(readers())


def test_builtin_data_are_small_read_by_one_format_and_hold_out_what_was_not_trained_on():
    folder = builtin_path("support-train").parent
    formats = {}
    for path in sorted(folder.glob("*.jsonl")):
        assert os.path.getsize(path) < 150_000
        formats[path.stem] = load_examples(f"builtin:{path.stem}", "auto", {})[1]
    assert set(formats) == {
        f"{name}-{part}"
        for name in ("support", "intents", "entities", "questions", "support-pairs", "numbers", "ten-features")
        for part in ("train", "heldout")
    } | {"domain-text", "domain-heldout"}
    assert {formats[n] for n in formats if n.startswith("ten-")} == {"arrays"}

    def entities(name, kind):
        rows = [json.loads(line) for line in builtin_path(name).read_text().splitlines()]
        return {
            word for r in rows for word, tag in zip(r["tokens"], r["tags"], strict=True) if tag == f"B-{kind}"
        }  # fmt: skip

    for kind in ("ORDER", "PERSON"):
        assert len(entities("entities-train", kind)) > 10
        assert not entities("entities-train", kind) & entities("entities-heldout", kind)
    for name, field in (
        ("numbers", "prompt"),
        ("intents", "text"),
        ("questions", "context"),
        ("support-pairs", "anchor"),
    ):
        train, held = ({e.fields[field] for e in load_examples(f"builtin:{name}-{p}", "auto", {})[0]} for p in
                       ("train", "heldout"))  # fmt: skip
        assert not train & held
