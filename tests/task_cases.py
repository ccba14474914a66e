"""For each task rows that a tiny model can learn, a row that is wrong, and what a run of it must report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLOURS = ("red", "green", "blue")
BIO = {"anna": "B-PER", "paris": "B-LOC", "bob": "B-PER", "rome": "B-LOC"}


@dataclass(frozen=True)
class Case:
    """What the contract needs to know of one task.

    Attributes:
        row: number -> a labelled row.
        unlabelled: a labelled row -> what `predict` may be given.
        bad: a row that this task must refuse.
        metrics: that a run must report before and after.
        model: base of the recipe; "llama" for the tests' own.
        options: of the task.
        methods: name -> options, of the methods that must train.
        own_loss: whether the Transformers model computes this loss itself.
        files: writes the images or sounds of rows 0 to 35 into the folder of the rows' files.
    """

    row: Callable[[int], dict[str, Any]]
    unlabelled: Callable[[dict[str, Any]], dict[str, Any]]
    bad: dict[str, Any]
    metrics: frozenset[str]
    model: str = "builtin:tiny-bert"
    options: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"lora": {"r": 4}, "houlsby": {"r": 4}, "head": {}, "full": {}}
    )
    own_loss: bool = True
    files: Callable[[Path], None] = lambda folder: None


def without(*columns: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {k: v for k, v in row.items() if k not in columns}


def _question(i: int) -> dict[str, Any]:
    colour = COLOURS[i % 3]
    context = f"{'so ' * (i % 4)}the ball of number {i} is {colour} today"
    return {
        "question": "which colour is the ball", "context": context,
        "answers": {"text": [colour], "answer_start": [context.index(colour)]},
    }  # fmt: skip


def _tokens(i: int) -> dict[str, Any]:
    words = [list(BIO)[i % 4], "went", *["on"] * (i % 3), "to", list(BIO)[(i + 1) % 4]]
    return {"tokens": words, "tags": [BIO.get(w, "O") for w in words]}


FEATURES = [0.5, -0.25, 1.0, 0.0]
MLP = {"sizes": [4, 8, 8, 1], "activation": "relu", "output": "sigmoid"}
CASES = {
    "causal-lm": Case(
        row=lambda i: {"prompt": f"say {i % 3}", "completion": str(i % 3)}, unlabelled=without("completion"),
        bad={"prompt": "say", "completion": ""}, metrics=frozenset({"loss", "token_accuracy", "perplexity"}),
        model="llama",
    ),
    "masked-lm": Case(
        row=lambda i: {"text": f"the ball number {i} is {COLOURS[i % 3]} today"},
        unlabelled=lambda row: {"text": row["text"].replace("ball", "[MASK]")},
        bad={"text": "  "}, metrics=frozenset({"loss", "token_accuracy", "perplexity"}),
    ),
    "seq2seq-lm": Case(
        row=lambda i: {"source": f"number {i}", "target": COLOURS[i % 3]}, unlabelled=without("target"),
        bad={"source": "number", "target": ""}, metrics=frozenset({"loss", "token_accuracy", "exact_match"}),
        model="builtin:tiny-t5",
    ),
    "text-classification": Case(
        row=lambda i: {"text": f"the ball {'really ' * (i % 4)}is {COLOURS[i % 3]}", "label": COLOURS[i % 3]},
        unlabelled=without("label"), bad={"text": "the ball", "label": None},
        metrics=frozenset({"loss", "accuracy", "f1_macro", "f1_micro", "precision_macro", "recall_macro"}),
    ),
    "regression": Case(
        row=lambda i: {"text": f"{'good ' * (i % 5 + 1)}ball", "label": float(i % 5)}, unlabelled=without("label"),
        bad={"text": "good", "label": "much"}, metrics=frozenset({"loss", "mse", "mae", "r2", "pearson"}),
    ),
    "token-classification": Case(
        row=_tokens, unlabelled=without("tags"), bad={"tokens": ["anna", "went"], "tags": ["O"]},
        metrics=frozenset({"loss", "accuracy", "span_f1"}),
    ),
    "question-answering": Case(
        row=_question, unlabelled=without("answers"),
        bad={"question": "which", "context": "the ball is red", "answers": {"text": ["blue"], "answer_start": [12]}},
        metrics=frozenset({"loss", "exact_match", "f1"}),
    ),
    "multiple-choice": Case(
        row=lambda i: {"question": f"{COLOURS[i % 3]} is", "choices": [*COLOURS], "label": i % 3},
        unlabelled=without("label"), bad={"question": "is", "choices": ["red", "green"], "label": 5},
        metrics=frozenset({"loss", "accuracy"}),
    ),
    "sentence-embedding": Case(
        row=lambda i: {"anchor": f"the ball number {i}", "positive": f"{i} is the number of the ball"},
        unlabelled=without("positive"), bad={"anchor": "ball", "positive": ""},
        metrics=frozenset({"loss", "recall_at_1", "recall_at_5"}), own_loss=False,
        methods={"lora": {"r": 4}, "houlsby": {"r": 4}, "full": {}},
    ),
    "module": Case(
        row=lambda i: {"inputs": [x * (i % 7 - 3) for x in FEATURES], "target": int(i % 7 > 3)},
        unlabelled=without("target"), bad={"inputs": [1.0, 2.0], "target": 1},
        metrics=frozenset({"loss", "accuracy", "f1_macro"}), model="python:lora_ft.models.architectures:mlp",
        options={"arguments": MLP, "loss": "binary_cross_entropy"}, own_loss=False,
        methods={
            "lora": {"r": 2, "target_modules": "all-linear"},
            "houlsby": {"r": 2, "target_modules": ["type:Linear"]},
            "full": {},
        },
    ),
}  # fmt: skip
