"""Scores against hand-counted cases."""

import pytest

from lora_ft.evaluate import compare
from lora_ft.records import Prediction
from lora_ft.tasks._text_metrics import judge_text


def predictions(*pairs):
    return [Prediction("r", "q", output, reference) for output, reference in pairs]


def test_exact_match_compares_json_by_value_and_text_without_outer_space():
    judged = judge_text(predictions(('{"b": 2, "a": 1}', '{"a":1,"b":2}'), (" yes\n", "yes"), ("no", "yes")))
    assert judged.right == [True, True, False]
    assert judged.metrics == {"exact_match": pytest.approx(2 / 3)}  # one reference is no JSON: no field F1


def test_field_f1_counts_pairs_over_all_rows():
    judged = judge_text(predictions(('{"a": 1, "b": 2}', '{"a": 1, "b": 3}'), ("not json", '{"a": 1, "b": 3}')))
    # 1 right of 2 given and 4 wanted: precision 1/2, recall 1/4
    assert judged.metrics["field_f1"] == pytest.approx(2 * 0.5 * 0.25 / 0.75)
    assert judged.metrics["exact_match"] == 0


def test_true_is_not_one_and_a_list_is_no_record():
    judged = judge_text(predictions(('{"a": 1}', '{"a": true}'), ("[1]", '{"a": true}')))
    assert judged.metrics == {"exact_match": 0, "field_f1": 0}


def test_rows_without_reference_are_not_judged():
    assert judge_text([Prediction("r", "q", "a", None)]).metrics == {}


def test_flips_and_their_interval():
    result = compare([True, False, False, False] * 10, [True, True, False, True] * 10)
    assert (len(result.gained), len(result.lost), result.both, result.neither) == (20, 0, 10, 10)
    assert result.difference == 0.5
    assert 0.3 < result.low < 0.5 < result.high < 0.7
    same = compare([True, False], [True, False])
    assert (same.difference, same.low, same.high) == (0, 0, 0)
