"""How written answers are judged against references."""

import json
from collections import Counter
from collections.abc import Sequence

from lora_ft.records import Judgement, Prediction


def judge_text(predictions: Sequence[Prediction]) -> Judgement:
    """Exact match, and field F1 when the references are JSON objects.

    Exact match compares text without surrounding white space; JSON objects compare by value, so key order and
    spacing do not count. Field F1 is micro-averaged over (key, value) pairs of all rows.
    """
    scored = [p for p in predictions if p.reference is not None]
    if not scored:
        return Judgement({}, [])
    right, hit, given, wanted = [], 0, 0, 0
    structured = True
    for p in scored:
        want, got = _fields(p.reference or ""), _fields(p.output)
        structured = structured and want is not None
        right.append(p.output.strip() == (p.reference or "").strip() or (want is not None and want == got))
        if want is not None:
            hit += sum(((got or Counter()) & want).values())
            given += sum((got or Counter()).values())
            wanted += sum(want.values())
    metrics = {"exact_match": sum(right) / len(right)}
    if structured and wanted:
        metrics["field_f1"] = 2 * hit / (given + wanted)
    return Judgement(metrics, right)


def _fields(text: str) -> Counter[tuple[str, str]] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not value:
        return None
    return Counter((k, json.dumps(v, sort_keys=True)) for k, v in value.items())
