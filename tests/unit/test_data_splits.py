"""Held-out rows: in proportion, whole groups, the same for the same seed."""

import random
from collections import Counter

import pytest

from lora_ft.data import is_split, split
from lora_ft.errors import DataError, UsageError
from lora_ft.records import Example


def rows(labels, groups=None, field="label"):
    return [
        Example({"text": str(i), field: label}, str(i), group=groups[i] if groups else "")
        for i, label in enumerate(labels)
    ]


def counts(examples):
    return Counter(e.fields["label"] for e in examples)


def check(examples, train, held):
    """Every row once, in order."""
    assert train
    assert held
    for part in (train, held):
        assert [int(e.where) for e in part] == sorted(int(e.where) for e in part)
    assert sorted(int(e.where) for e in train + held) == list(range(len(examples)))


@pytest.mark.parametrize("text", ["10%", " 12.5 %", "fold 1/5", "fold 6/5", "0%", "x%"])
def test_a_share_or_fold_is_no_file(text):
    assert is_split(text)
    for name in ("folds.jsonl", "fold/x.csv", "builtin:a", "org/name", "fold"):
        assert not is_split(name)


@pytest.mark.parametrize(
    "text", ["0%", "100%", "-5%", "x%", "%", "1/0%", "fold 6/5", "fold 0/5", "fold 1/1", "fold 1", "fold a/b"]
)
def test_a_share_or_fold_that_cannot_be_says_what_can(text):
    with pytest.raises(UsageError, match=r"data\.eval") as caught:
        split(rows("ab" * 20), text, 0)
    assert caught.value.fix in ("--set data.eval=10%", "--set 'data.eval=fold 1/5'")


@pytest.mark.parametrize(("share", "seed"), [("10%", 0), ("25%", 1), ("33%", 7)])
def test_rows_without_classes_are_held_out_as_in_the_first_release(share, seed):
    examples = [Example({"prompt": str(i), "completion": "x"}, str(i)) for i in range(47)]
    train, held = split(examples, share, seed)
    check(examples, train, held)
    wanted = random.Random(seed).sample(range(47), max(1, round(47 * float(share[:-1]) / 100)))
    assert [int(e.where) for e in held] == sorted(wanted)


def test_each_class_is_held_out_in_proportion_and_by_seed():
    examples = rows(["a"] * 60 + ["b"] * 30 + ["c"] * 10)
    train, held = split(examples, "20%", 3)
    check(examples, train, held)
    assert counts(held) == {"a": 12, "b": 6, "c": 2}
    assert split(examples, "20%", 3) == (train, held)
    assert split(examples, "20%", 4)[1] != held


def test_numbers_are_no_classes():
    plain = sorted(random.Random(0).sample(range(40), 8))
    for labels in ([i / 7 for i in range(40)], [str(i % 5 + 0.5) for i in range(40)], range(40), [["a"]] * 40):
        assert [int(e.where) for e in split(rows(labels), "20%", 0)[1]] == plain
    choices = [Example({"choices": ["a", "b"], "label": i % 2}, str(i)) for i in range(40)]
    assert [int(e.where) for e in split(choices, "20%", 0)[1]] == plain
    assert counts(split(rows([str(i % 5) for i in range(40)]), "25%", 0)[1]) == dict.fromkeys("01234", 2)


def test_a_class_of_one_row_stays_in_training_and_too_many_classes_do_not_crash():
    examples = rows(["a"] * 20 + ["b"] * 20 + ["rare"])
    for wish in ("10%", "50%", *(f"fold {i}/5" for i in range(1, 6))):
        train, held = split(examples, wish, 0)
        check(examples, train, held)
        assert "rare" in counts(train)
    many = rows([str(i // 4) for i in range(80)])  # 20 classes, 8 held-out rows
    train, held = split(many, "10%", 0)
    check(many, train, held)
    assert len(held) == 8


@pytest.mark.parametrize("labels", [["a"] * 30 + ["b"] * 20, [0.5] * 50, ["a", "b", "c", "d", "e"] * 2 + [0.1] * 40])
def test_folds_hold_every_row_out_once(labels):
    examples = rows(labels)
    parts = [split(examples, f"fold {i}/5", 2) for i in range(1, 6)]
    for train, held in parts:
        check(examples, train, held)
        assert len(held) == 10
    assert sorted(int(e.where) for _, held in parts for e in held) == list(range(50))
    if labels[0] == "a" and labels[1] == "a":
        assert all(counts(held) == {"a": 6, "b": 4} for _, held in parts)


def test_few_rows_of_a_class_still_fall_into_more_folds():
    examples = rows("aabbccdd")
    held = [e.where for i in range(1, 5) for e in split(examples, f"fold {i}/4", 0)[1]]
    assert sorted(held, key=int) == [e.where for e in examples]


@pytest.mark.parametrize("labels", ["ab" * 60, [0.5] * 120], ids=["classes", "numbers"])
@pytest.mark.parametrize("wish", ["10%", "25%", "60%", "fold 2/4"])
def test_a_group_is_never_on_both_sides(labels, wish):
    groups = [f"g{i % 24}" for i in range(120)]
    examples = rows(labels, groups)
    train, held = split(examples, wish, 5)
    check(examples, train, held)
    assert not {e.group for e in train} & {e.group for e in held}
    share = 0.25 if wish.startswith("fold") else float(wish[:-1]) / 100
    assert len(held) == pytest.approx(120 * share, abs=12)
    assert split(examples, wish, 5) == (train, held)


def test_folds_of_groups_hold_every_row_out_once():
    for labels in ("aab" * 20, [0.5] * 60):
        examples = rows(labels, [f"g{i // 4}" for i in range(60)])
        held = [e.where for i in range(1, 4) for e in split(examples, f"fold {i}/3", 1)[1]]
        assert sorted(held, key=int) == [e.where for e in examples]


def test_groups_with_classes_keep_the_classes_in_proportion():
    examples = rows("aaab" * 60, [f"g{i // 8}" for i in range(240)])
    _, held = split(examples, "20%", 0)
    assert counts(held)["a"] == pytest.approx(3 * counts(held)["b"], rel=0.2)


def test_too_few_rows_or_groups_are_refused():
    for examples, wish in (
        (rows("ab"), "90%"),
        (rows([0.5, 1.5]), "80%"),
        (rows([0.5, 1.5]), "fold 1/3"),
        (rows("abcd"[:1]), "10%"),
        (rows("ab" * 5, ["same"] * 10), "10%"),
        (rows("ab" * 5, ["x", "y"] * 5), "fold 1/3"),
    ):
        with pytest.raises(DataError, match="too few to hold out"):
            split(examples, wish, 0)


@pytest.mark.parametrize("eval", ["10%", "fold 1/5", "fold 3/5", "40%"])
@pytest.mark.parametrize("seed", range(6))
def test_no_class_of_few_rows_is_held_out_whole(eval, seed):
    examples = rows("aabbccddeeffgghhiijjkkllmm")
    training, held = split(examples, eval, seed)
    assert held
    assert {e.fields["label"] for e in training} == set("abcdefghijklm")


def test_classes_in_a_target_are_held_out_in_proportion():
    examples = [Example({"inputs": [1.0], "target": int(i % 25 == 0)}, str(i)) for i in range(200)]
    for seed in range(8):
        assert sum(e.fields["target"] for e in split(examples, "10%", seed)[1]) == 1
