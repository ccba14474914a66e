"""Signs of a run that learned nothing, which end neither in an error nor in silence."""

import pytest

from lora_ft.pipeline.doubts import doubts


def table(*rows):
    return {"confusion_matrix": {"labels": ["cat", "dog", "owl"], "rows": [list(r) for r in rows]}}


def test_a_model_that_gives_every_row_the_same_class_is_named():
    (found,) = doubts({"loss": 5.0}, {"loss": 1.1}, table((0, 4, 0), (0, 4, 0), (0, 4, 0)))
    assert "every held-out row gets 'dog'" in found


@pytest.mark.parametrize("rows", [((0, 0, 0), (0, 9, 0), (0, 0, 0)), ((1, 3, 0), (0, 4, 0), (0, 4, 0))])
def test_one_answer_is_no_sign_where_one_is_asked_for_and_two_answers_are_none(rows):
    assert doubts({"loss": 5.0}, {"loss": 1.1}, table(*rows)) == []


@pytest.mark.parametrize(("after", "said"), [(1.9, False), (2.0, True), (2.5, True), (float("nan"), True)])
def test_a_loss_that_did_not_fall_is_named(after, said):
    found = doubts({"loss": 2.0, "accuracy": 0.1}, {"loss": after, "accuracy": 0.9}, {})
    assert bool(found) == said
    assert all("2.0000 before" in f for f in found)


def test_a_run_without_held_out_rows_gives_no_reason_to_doubt():
    assert doubts({}, {}, {}) == []
