"""The peer of `tasks`: Hugging Face's Trainer with plain PEFT LoRA, written as their documentation does.

The model is an auto class with a new head, the rows are tokenised before training, batches are padded to their longest
row (`DataCollatorWithPadding`, `DataCollatorForTokenClassification`). For sentence pairs, which Trainer does not know,
`compute_loss` finds each anchor's passage among those of the batch.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks._task_scores import cosines, ranks
from lora_ft.training.memory import peak_memory_bytes

Row = dict[str, Any]
TEMPERATURE = 0.05
JUDGED_TOGETHER = 64


class Clock(TrainerCallback):
    """Seconds from the first batch to the end of the last step, and what Trainer logged."""

    began = ended = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop, for now."""
        self.ended = time.perf_counter()


class Pairs(Trainer):
    """Trainer for pairs that belong together."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """Cross entropy of each anchor's own passage among those of the batch."""
        anchors, positives = (embed(model, inputs[side]) for side in ("anchor", "positive"))
        scores = anchors @ positives.T / TEMPERATURE
        return functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def embed(model: Any, texts: Any) -> Any:
    """(B, D) means of the token vectors, of length 1."""
    hidden = model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"])[0]
    weights = texts["attention_mask"][..., None].float()
    return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


class Peer:
    """One set's model, rows and way to answer.

    Args:
        kind: of the set.
        source: folder of the encoder with its tokenizer.
        setting: max_length, and what `arguments` and `adapted` take.
        train: training rows; labels, and the unit of values, are learnt from them.
    """

    def __init__(self, kind: str, source: str, setting: Mapping[str, Any], train: Sequence[Row]) -> None:
        self.kind, self.source, self.setting, self.rows = kind, source, setting, train
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.labels: list[str] = []
        self.mean, self.std = 0.0, 1.0
        if kind == "text-classification":
            self.labels = sorted({row["label"] for row in train})
        elif kind == "token-classification":
            self.labels = sorted({tag for row in train for tag in row["tags"]})
        elif kind == "regression":  # learnt in standard deviations, as lora-ft does
            values = torch.tensor([row["label"] for row in train], dtype=torch.float64)
            self.mean, self.std = float(values.mean()), float(values.std(correction=0))

    def encode(self, row: Row) -> dict[str, Any]:
        """The features of a row, with its answer."""
        cut = {"truncation": True, "max_length": self.setting["max_length"]}
        if self.kind == "sentence-pairs":
            return {side: dict(self.tokenizer(row[side], **cut)) for side in ("anchor", "positive")}
        if self.kind == "token-classification":
            found = self.tokenizer(row["tokens"], is_split_into_words=True, **cut)
            words = found.word_ids()
            first = [w is not None and w != before for before, w in zip([None, *words], words, strict=False)]
            ids = [
                self.labels.index(row["tags"][w]) if is_first else -100
                for w, is_first in zip(words, first, strict=True)
            ]
            return {**found, "labels": ids}
        found = self.tokenizer(row["text"], **cut)
        if self.kind == "regression":
            return {**found, "labels": (row["label"] - self.mean) / self.std}
        return {**found, "labels": self.labels.index(row["label"])}

    def collator(self) -> Callable[[Any], Any]:
        """Features -> a padded batch."""
        if self.kind == "token-classification":
            return DataCollatorForTokenClassification(self.tokenizer)
        pad = DataCollatorWithPadding(self.tokenizer)
        if self.kind != "sentence-pairs":
            return pad
        return lambda features: {side: pad([f[side] for f in features]) for side in ("anchor", "positive")}

    def model(self) -> Any:
        """The encoder with a new head in float32."""
        if self.kind == "sentence-pairs":
            return AutoModel.from_pretrained(self.source, dtype=torch.float32, add_pooling_layer=False)
        auto = (
            AutoModelForTokenClassification
            if self.kind == "token-classification"
            else AutoModelForSequenceClassification
        )
        names = dict(enumerate(self.labels)) or {0: "LABEL_0"}
        problem = {"problem_type": "regression"} if self.kind == "regression" else {}
        return auto.from_pretrained(
            self.source, dtype=torch.float32, id2label=names, label2id={n: i for i, n in names.items()}, **problem
        )

    def adapted(self, seed: int) -> Any:
        """The model with LoRA on it; the head trains too."""
        set_seed(seed)
        tasks = {"sentence-pairs": "FEATURE_EXTRACTION", "token-classification": "TOKEN_CLS"}
        saved = {} if self.kind == "sentence-pairs" else {"modules_to_save": self.setting["modules_to_save"]}
        config = LoraConfig(task_type=tasks.get(self.kind, "SEQ_CLS"), **self.setting["lora"], **saved)
        return get_peft_model(self.model(), config)

    def train(self, seed: int, *, grouped: bool, folder: str) -> dict[str, Any]:
        """Train and say what it took.

        Args:
            seed: of the head's and the adapter's start, the order and dropout.
            grouped: whether rows of one length share a batch.
            folder: for what Trainer writes.
        """
        model = self.adapted(seed)
        features = [self.encode(row) for row in self.rows]
        setting, clock = self.setting, Clock()
        steps = math.ceil(setting["epochs"] * math.ceil(len(features) / setting["batch_size"]))
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=setting["epochs"], per_device_train_batch_size=setting["batch_size"],
            learning_rate=setting["learning_rate"], lr_scheduler_type="cosine",
            warmup_steps=math.ceil(setting["warmup_ratio"] * steps), weight_decay=0.0, max_grad_norm=1.0,
            seed=seed, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            train_sampling_strategy="group_by_length" if grouped else "random", dataloader_pin_memory=False,
        )  # fmt: skip
        if grouped and self.kind == "sentence-pairs":  # Trainer sorts by input_ids
            features = [{**f, "input_ids": f["positive"]["input_ids"]} for f in features]
        kind = Pairs if self.kind == "sentence-pairs" else Trainer
        trainer = kind(
            model=model, args=arguments, train_dataset=features, data_collator=self.collator(),
            processing_class=self.tokenizer, callbacks=[clock],
        )  # fmt: skip
        trainer.train()
        self.trained = model
        return {
            "tokens": sum(map(self.length, features)) * setting["epochs"],
            "seconds": clock.ended - clock.began,
            "steps": trainer.state.global_step,
            "peak_memory": peak_memory_bytes(),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }

    def length(self, feature: Mapping[str, Any]) -> int:
        """Tokens of a row, without padding."""
        parts = [feature[s] for s in ("anchor", "positive")] if self.kind == "sentence-pairs" else [feature]
        return sum(len(part["input_ids"]) for part in parts)

    @torch.no_grad()
    def answers(self, rows: Sequence[Row], model: Any = None) -> list[Any]:
        """One answer a held-out row, of `model` or of what `train` trained."""
        model = (model or self.trained).eval()
        if self.kind == "sentence-pairs":
            sides = [self._vectors(model, [row[side] for row in rows]) for side in ("anchor", "positive")]
            return ranks(rows, cosines(*sides))
        pad = DataCollatorWithPadding(self.tokenizer)
        found: list[Any] = []
        for start in range(0, len(rows), JUDGED_TOGETHER):
            features = [self.encode(row) for row in rows[start : start + JUDGED_TOGETHER]]
            logits = model(**pad([{k: v for k, v in f.items() if k != "labels"} for f in features])).logits
            found += [self._answer(z, row, f) for z, row, f in zip(logits, rows[start:], features, strict=False)]
        return found

    def _vectors(self, model: Any, texts: Sequence[str]) -> list[list[float]]:
        pad = DataCollatorWithPadding(self.tokenizer)
        features = [self.tokenizer(t, truncation=True, max_length=self.setting["max_length"]) for t in texts]
        parts = [features[i : i + JUDGED_TOGETHER] for i in range(0, len(features), JUDGED_TOGETHER)]
        return [v for part in parts for v in embed(model, pad(part)).tolist()]

    def _answer(self, logits: Any, row: Row, feature: Mapping[str, Any]) -> Any:
        if self.kind == "regression":
            return float(logits[0]) * self.std + self.mean
        if self.kind == "text-classification":
            return self.labels[int(logits.argmax())]
        tags = ["O"] * len(row["tokens"])  # of words that give no token
        first: dict[int, int] = {}
        words = self.tokenizer(
            row["tokens"], is_split_into_words=True, truncation=True, max_length=self.setting["max_length"]
        ).word_ids()
        for position, word in enumerate(words):
            if word is not None:
                first.setdefault(word, position)
        for word, position in first.items():
            tags[word] = self.labels[int(logits[position].argmax())]
        return tags
