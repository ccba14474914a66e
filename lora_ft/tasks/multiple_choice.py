"""Multiple choice: which of several answers belongs to a question."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.errors import UsageError
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, Judgement, LossSum, Prediction, Sample
from lora_ft.registry import TASKS

from ._base import Outputs, TaskBase


@dataclass(frozen=True)
class MultipleChoice(TaskBase):
    """Each choice is read together with the question; the one with the highest score is the answer."""

    name = "multiple-choice"
    hub_task = "multiple-choice"
    description = "Which of several answers belongs to a question (a score for each, rows may differ in number)."
    auto_class = "AutoModelForMultipleChoice"
    kinds = ("choices",)

    def check_processor(self, processor: Any) -> list[str]:
        """Refuse a tokenizer that cannot fill up shorter choices."""
        if processor.pad_token_id is None:
            raise UsageError("the tokenizer has no padding token, and choices differ in length")
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """One sample of all pairs (question, choice); only the question is ever cut."""
        special = processor.num_special_tokens_to_add(pair=True)

        def encode(example: Example) -> Encoded:
            fields = example.fields
            pairs = [processor(fields["question"], c) for c in fields["choices"]]
            outcome = ""
            if max(len(p["input_ids"]) for p in pairs) > options.max_length:
                longest = max(len(processor(c, add_special_tokens=False)["input_ids"]) for c in fields["choices"])
                if options.overlong == "error":
                    return Encoded((), "over max_length")
                if options.overlong == "drop" or longest + special >= options.max_length:
                    return Encoded((), "dropped: longer than max_length")
                pairs = [
                    processor(fields["question"], c, truncation="only_first", max_length=options.max_length)
                    for c in fields["choices"]
                ]
                outcome = "truncated"
            return Encoded((_sample(pairs, fields, example.where),), outcome)

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """Every choice with its question on a line, the right one in [[ ]]."""
        texts = [processor.decode(ids, clean_up_tokenization_spaces=False) for ids in sample.inputs["input_ids"]]
        right = sample.inputs.get("labels")
        return "\n".join(f"[[{t}]]" if i == right else t for i, t in enumerate(texts))

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """input_ids, attention_mask and maybe token_type_ids (B, C, T), labels (B); mask 0 where no choice is."""
        batch: Batch = {
            "input_ids": _cube([s.inputs["input_ids"] for s in samples], processor.pad_token_id),
            "attention_mask": _cube([[[1] * len(c) for c in s.inputs["input_ids"]] for s in samples], 0),
        }
        if "token_type_ids" in samples[0].inputs:
            batch["token_type_ids"] = _cube([s.inputs["token_type_ids"] for s in samples], 0)
        if all("labels" in s.inputs for s in samples):
            batch["labels"] = torch.tensor([s.inputs["labels"] for s in samples])
        return batch

    def answer(self, model: nn.Module, batch: Batch) -> Any:
        """The model's scores; where a row has fewer choices it reads one token, whose score `keep` takes away.

        Without it attention over nothing could give NaN, and NaN times a gradient of zero is NaN.
        """
        absent = ~batch["attention_mask"].any(-1)
        mask = batch["attention_mask"].clone()
        mask[..., 0] += absent
        return super().answer(model, {**batch, "attention_mask": mask})

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross entropy over the choices that a row has."""
        answer = self.answer(model, batch)
        scores = _present(answer.logits, batch)
        total = nn.functional.cross_entropy(scores, batch["labels"], reduction="sum")
        return LossSum(total, len(scores), outputs=self.keep(answer, batch))

    def keep(self, answer: Any, batch: Batch) -> dict[str, Tensor]:
        """Scores (B, C), -inf where there is no choice."""
        return {"logits": _present(answer.logits.detach(), batch)}

    def measure(self, samples: Sequence[Sample], outputs: Sequence[Outputs]) -> Judgement:
        """Share of the rows whose right choice has the highest score."""
        from sklearn.metrics import accuracy_score

        chosen = [int(o["logits"].argmax()) for o in outputs]
        wanted = [int(s.inputs["labels"]) for s in samples]
        accuracy = float(accuracy_score(wanted, chosen))
        return Judgement({"accuracy": accuracy}, [a == b for a, b in zip(wanted, chosen, strict=True)])

    def decode(
        self, examples: Sequence[Example], samples: Sequence[Sequence[Sample]], outputs: Sequence[Sequence[Outputs]],
        processor: Any,
    ) -> Iterator[Prediction]:  # fmt: skip
        """The chosen text, its number, and the probability of each choice in order."""
        for example, (sample,), (output,) in zip(examples, samples, outputs, strict=True):
            choices = example.fields["choices"]
            scores = output["logits"][: len(sample.inputs["input_ids"])].softmax(-1)
            best, label = int(scores.argmax()), example.fields.get("label")
            reference = None if label is None else choices[label]
            details = {"choice": best, "scores": [round(s, 6) for s in scores.tolist()]}
            yield Prediction(example.where, example.fields["question"], choices[best], reference, details=details)


def _sample(pairs: Sequence[Mapping[str, Any]], fields: Mapping[str, Any], where: str) -> Sample:
    names = ("input_ids", "token_type_ids") if "token_type_ids" in pairs[0] else ("input_ids",)
    inputs: dict[str, Any] = {name: [list(p[name]) for p in pairs] for name in names}
    label = fields.get("label")
    if label is not None:
        if not 0 <= label < len(pairs):
            raise ValueError(f"the label {label} is no choice: there are {len(pairs)}, counted from 0")
        inputs["labels"] = label
    longest = max(len(ids) for ids in inputs["input_ids"])
    return Sample(inputs, len(pairs) * longest, int(label is not None), where)


def _cube(rows: Sequence[Sequence[Sequence[int]]], fill: int) -> Tensor:
    """(B, C, T) of the rows' choices, filled up on the right and below."""
    out = torch.full((len(rows), max(len(r) for r in rows), max(len(c) for r in rows for c in r)), fill)
    for i, row in enumerate(rows):
        for j, choice in enumerate(row):
            out[i, j, : len(choice)] = torch.tensor(choice)
    return out


def _present(scores: Tensor, batch: Batch) -> Tensor:
    """Scores (B, C) in at least float32, -inf where the row has no such choice."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(~batch["attention_mask"].any(-1), float("-inf"))


TASKS.register(MultipleChoice())
