"""Extractive question answering: where in a context the answer to a question stands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.errors import UsageError
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Judgement, LossSum, Prediction, Sample
from lora_ft.registry import TASKS

from ._base import IGNORE, Options, Outputs, TaskBase, text_batch
from ._generation_metrics import require_package
from ._windows import Span, Window, spans_in, windows_of

LABELS = ("start_positions", "end_positions")
UNKNOWN: Span = (IGNORE, IGNORE)


class QuestionOptions(Options):
    """Options of question-answering."""

    doc_stride: int = Field(
        128, ge=0, description="Tokens that two neighbouring windows of a long context share; at most half a window."
    )
    max_answer_length: int = Field(30, ge=1, description="Most tokens in an answer that is given.")
    n_best_size: int = Field(20, ge=1, description="Starts and ends of each window that are paired to find the answer.")
    null_score_diff_threshold: float = Field(
        0.0,
        description="Where some rows have no answer: 'none' must score higher than the best span by more than this.",
    )


@dataclass(frozen=True)
class _Found:
    """An answer, its probability among all that were compared, and its first character; None: no answer."""

    text: str
    score: float
    start: int | None


@dataclass(frozen=True)
class QuestionAnswering(TaskBase):
    """Start and end of the answer in the context; a long context is read in windows that overlap.

    Attributes:
        has_no_answers: whether some rows have no answer, so that "none" is one.
        taught: places of the training rows; all others are only judged.
    """

    options: QuestionOptions = field(default_factory=QuestionOptions)
    has_no_answers: bool = False
    taught: frozenset[str] = frozenset()

    name = "question-answering"
    hub_task = "question-answering"
    description = "Find the words of a context that answer a question (extractive, SQuAD 1 and 2)."
    auto_class = "AutoModelForQuestionAnswering"
    peft_task_type = None  # the class that PEFT has for it drops token_type_ids (0.21)
    kinds = ("question",)

    def configure(self, options: Mapping[str, Any]) -> Self:
        """Needs the package that has SQuAD's metrics."""
        require_package("torchmetrics", f"the task {self.name}")
        return super().configure(options)

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example]) -> Self:
        """Whether some rows have no answer, and which rows are there to learn from."""
        unanswerable = any(_unanswerable(e) for e in [*examples, *held_out])
        return replace(self, has_no_answers=unanswerable, taught=frozenset(e.where for e in examples))

    def facts(self) -> dict[str, Any]:
        """Whether some rows have no answer; a finished run only judges and predicts."""
        return {"has_no_answers": self.has_no_answers}

    def check_processor(self, processor: Any) -> list[str]:
        """Refuse a tokenizer that does not know which characters its tokens are."""
        if not processor.is_fast:
            raise UsageError(
                f"{self.name} needs a fast tokenizer, got {type(processor).__name__}",
                why="only fast tokenizers know which characters of the context each token is",
                fix="use a model with a tokenizer.json",
            )
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample for each window of the context; a window without the answer points at its null position.

        Where no window holds the whole answer, a training row is dropped: told that there is no answer, the model would
        learn wrong. A held-out row is judged, as SQuAD does, but has no loss.
        """

        def encode(example: Example) -> Encoded:
            fields = example.fields
            windows = windows_of(processor, fields, options.max_length, self.options.doc_stride)
            if len(windows) > 1 and options.overlong == "error":
                return Encoded((), "over max_length")
            if len(windows) > 1 and options.overlong == "drop":
                return Encoded((), "dropped: longer than max_length")
            outcome = "context read in several windows" if len(windows) > 1 else ""
            spans: Sequence[Span | None] = [None] * len(windows)
            if fields.get("answers"):
                spans = spans_in(windows, fields["answers"][0])
                if not any(spans) and example.where in self.taught:
                    outcome = "dropped: no window holds the whole answer"
                elif not any(spans):
                    outcome, spans = "judged without a loss: no window holds the whole answer", [UNKNOWN] * len(windows)
            elif "answers" in fields:
                spans = [(w.null, w.null) for w in windows]
            if any(spans):
                spans = [s or (w.null, w.null) for s, w in zip(spans, windows, strict=True)]
            made = [_sample(w, s, example) for w, s in zip(windows, spans, strict=True)]
            return Encoded(tuple(made), outcome)

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The window's text, the answer in [[ ]]."""
        ids = sample.inputs["input_ids"]
        text = processor.decode(ids, clean_up_tokenization_spaces=False)
        if LABELS[0] not in sample.inputs:
            return str(text)
        start, end = (sample.inputs[name] for name in LABELS)
        if start == IGNORE:
            return f"{text} [[no whole answer here]]"
        if start == sample.inputs["null"]:
            return f"{text} [[no answer here]]"
        parts = (ids[:start], ids[start : end + 1], ids[end + 1 :])
        before, answer, after = (processor.decode(p, clean_up_tokenization_spaces=False) for p in parts)
        return f"{before} [[{answer.strip()}]] {after}"

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """input_ids, attention_mask, maybe token_type_ids (B, T); start_positions, end_positions (B)."""
        batch = text_batch(samples, processor)
        if all(LABELS[0] in s.inputs for s in samples):
            batch |= {name: torch.tensor([s.inputs[name] for s in samples]) for name in LABELS}
        return batch

    def answer(self, model: nn.Module, batch: Batch) -> Any:
        """The model's answer to everything of the batch but the positions."""
        return model(**_unlabelled(batch))

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Mean cross entropy of start and end, summed over windows; padding is no place for an answer."""
        answer = self.answer(model, batch)
        logits = _logits(answer, batch)
        terms = [nn.functional.cross_entropy(g, batch[n], reduction="sum") for n, g in zip(LABELS, logits, strict=True)]
        count = int((batch[LABELS[0]] != IGNORE).sum())
        return LossSum((terms[0] + terms[1]) / 2, count, outputs=self.keep(answer, batch))

    def keep(self, answer: Any, batch: Batch) -> dict[str, Tensor]:
        """Logits of start and end (B, T), -inf at padding."""
        start, end = _logits(answer, batch)
        return {"start_logits": start.detach(), "end_logits": end.detach()}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Start and end logits side by side (B, T, 2)."""
        answer = self.answer(model, batch)
        return torch.stack([answer.start_logits, answer.end_logits], -1)

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """Each window as a batch of one without positions."""
        return [_unlabelled(self.collate([s], processor)) for s in samples]

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """SQuAD's exact match and F1 over rows, each answered from all of its windows."""
        from torchmetrics.functional.text import squad

        rows: dict[str, list[int]] = {}
        for i, sample in enumerate(samples):
            rows.setdefault(sample.where, []).append(i)
        scores = []
        for where, indices in rows.items():
            found = self._find([samples[i] for i in indices], [outputs[i] for i in indices])
            wanted = list(samples[indices[0]].inputs["answers"]) or [""]
            scores.append(
                squad(
                    {"prediction_text": found.text, "id": where},
                    {"answers": {"text": wanted, "answer_start": [0] * len(wanted)}, "id": where},
                )
            )
        means = {name: sum(float(s[name]) for s in scores) / (100 * len(scores)) for name in ("exact_match", "f1")}
        return Judgement(means, [bool(s["exact_match"]) for s in scores])

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The best span of all windows; "" where the best answer is none."""
        for example, windows, given in zip(examples, samples, outputs, strict=True):
            found = self._find(windows, given)
            answers = example.fields.get("answers")
            reference = None if answers is None else answers[0]["text"] if answers else ""
            details = {"score": round(found.score, 6), "start": found.start}
            yield Prediction(example.where, example.fields["question"], found.text, reference, details=details)

    def _find(self, windows: Sequence[Sample], outputs: Sequence[Outputs]) -> _Found:
        """The best answer of one row; scores are start logit + end logit, over all windows."""
        pairs = list(zip(windows, outputs, strict=True))
        best: dict[Span, float] = {}  # windows overlap, so two may hold the same span
        for score, span in (c for w, o in pairs for c in self._candidates(w, o)):
            best[span] = max(score, best.get(span, score))
        spans = sorted(best, key=lambda s: -best[s])[: self.options.n_best_size]
        scores = [best[s] for s in spans]
        if self.has_no_answers:  # the window that doubts it most: the others may only lack the answer
            nulls = [float(o["start_logits"][w.inputs["null"]] + o["end_logits"][w.inputs["null"]]) for w, o in pairs]
            scores.append(min(nulls))
        shares = torch.tensor(scores).softmax(-1).tolist()
        if not spans:
            return _Found("", shares[0] if shares else 0.0, None)
        if self.has_no_answers and scores[-1] - scores[0] > self.options.null_score_diff_threshold:
            return _Found("", shares[-1], None)
        start, end = spans[0]
        text = windows[0].inputs["context"][start:end]
        return _Found(text.strip(), shares[0], start + len(text) - len(text.lstrip()))

    def _candidates(self, window: Sample, output: Outputs) -> list[tuple[float, Span]]:
        """Score and characters [start, end) of the best spans of one window."""
        offsets = torch.from_numpy(window.inputs["offsets"])
        places = (offsets[:, 0] >= 0).nonzero()[:, 0]
        size = min(self.options.n_best_size, len(places))
        if not size:
            return []
        start, first = output["start_logits"][places].topk(size)
        end, last = output["end_logits"][places].topk(size)
        first, last = places[first], places[last]
        length = last[None, :] - first[:, None] + 1
        scores = start[:, None] + end[None, :]
        i, j = ((length >= 1) & (length <= self.options.max_answer_length)).nonzero(as_tuple=True)
        begins, stops = offsets[first[i], 0].tolist(), offsets[last[j], 1].tolist()
        return list(zip(scores[i, j].tolist(), zip(begins, stops, strict=True), strict=True))


def _unanswerable(example: Example) -> bool:
    return "answers" in example.fields and not example.fields["answers"]


def _sample(window: Window, span: Span | None, example: Example) -> Sample:
    inputs: dict[str, Any] = {**window.inputs, "offsets": window.offsets, "null": window.null}
    inputs["context"] = example.fields["context"]
    if "answers" in example.fields:
        inputs["answers"] = [a["text"] for a in example.fields["answers"]]
    if span is not None:
        inputs |= dict(zip(LABELS, span, strict=True))
    return Sample(inputs, len(window.inputs["input_ids"]), int(span is not None), example.where)


def _logits(answer: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Start and end logits (B, T) in at least float32, -inf at padding, without virtual tokens before the input."""
    away = batch["attention_mask"] == 0
    both = (g[:, -away.shape[1] :] for g in (answer.start_logits, answer.end_logits))
    start, end = (g.to(torch.promote_types(g.dtype, torch.float32)).masked_fill(away, float("-inf")) for g in both)
    return start, end


def _unlabelled(batch: Batch) -> Batch:
    return {k: v for k, v in batch.items() if k not in LABELS}


TASKS.register(QuestionAnswering())
