"""Next-token prediction: chat, instructions, prompt and completion, raw text."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_ft.errors import DataError, UsageError
from lora_ft.records import (
    Batch,
    Encoded,
    EncodeOptions,
    Example,
    Judgement,
    LossSum,
    Prediction,
    PredictOptions,
    Sample,
)
from lora_ft.registry import TASKS
from lora_ft_adapters import AdapterError
from lora_ft_adapters.fast.causal import labelled_loss, plain_loss
from lora_ft_adapters.fast.head import HeadResult

from ._base import IGNORE, Options, TaskBase
from ._chat import ChatTemplate, Rendered
from ._generate import generate
from ._text_metrics import judge_text
from ._tokens import close, encode_spans, fit, pad, pieces, special_ids

PROBE_TOKENS = 64


class CausalOptions(Options):
    """Options of causal-lm."""

    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all tokens.")


@dataclass(frozen=True)
class CausalLM(TaskBase):
    """Language models that write. Loss only on what the assistant wrote, its end token included."""

    options: CausalOptions = field(default_factory=CausalOptions)

    name = "causal-lm"
    hub_task = "text-generation"
    description = "Chat, instructions, prompt/completion or raw text with a model that writes (loss on answers only)."
    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    kinds: ClassVar[tuple[str, ...]] = ("conversation", "prompt", "text")
    new_head = False
    overlong = "drop"
    perplexity = True
    chats = True
    fast_note = "head at labels only"

    def check_processor(self, processor: Any) -> list[str]:
        """Notes on a missing chat template or end token."""
        notes = []
        if not processor.chat_template:
            notes.append("the tokenizer has no chat template: conversations are written as 'User: ... Assistant: ...'")
        if processor.eos_token_id is None:
            raise UsageError("the tokenizer has no end token, so the model could never learn to stop")
        return notes

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """Conversations through the chat template; prompt and completion raw when `template: none`; text in pieces."""
        template = ChatTemplate(processor, options.system_prompt)

        def encode(example: Example) -> Encoded:
            fields = example.fields
            if "text" in fields:
                ids = [*processor(fields["text"])["input_ids"]]
                ids, _ = close(ids, ids, processor)
                return pieces(ids, options.max_length, example.where)
            raw = _is_raw(fields, processor, options)
            if raw and options.system_prompt:
                raise ValueError("data.system_prompt needs a chat template; this prompt is written raw")
            if "messages" in fields and options.template == "none":
                raise ValueError("data.template: none is for prompt and completion or text; this row has messages")
            texts = [_raw(fields)] if raw else template.conversations(_messages(fields), fields.get("tools"))
            found = []
            for text in texts:
                ids, labels = close(*encode_spans(text, processor, special=raw), processor)
                found.append(fit(ids, labels, options, example.where))
            outcome = next((f.outcome for f in found if f.outcome), "one sample per answer" if len(found) > 1 else "")
            return Encoded(tuple(s for f in found for s in f.samples), outcome)

        return encode

    def show(self, sample: Sample, processor: Any) -> str:
        """The sample's text, its supervised parts in [[ ]]."""
        parts: list[str] = []
        ids, labels = sample.inputs["input_ids"], sample.inputs["labels"]
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or (labels[end] == IGNORE) != (labels[start] == IGNORE):
                text = processor.decode(list(ids[start:end]), clean_up_tokenization_spaces=False)
                parts.append(text if labels[start] == IGNORE else f"[[{text}]]")
                start = end
        return "".join(parts)

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """input_ids, attention_mask, labels (B, T), padded on the right."""
        return pad(samples, processor.pad_token_id if processor.pad_token_id is not None else 0)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The model's own loss over full logits."""
        smoothing = self.options.label_smoothing_factor
        if smoothing:
            return _smoothed(self.outputs(model, batch), batch["labels"], smoothing)
        return _sum(plain_loss(model, {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]))

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """The first tokens of each sample."""
        return [{"input_ids": torch.tensor([s.inputs["input_ids"][:PROBE_TOKENS]])} for s in samples]

    def fast_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Head at labelled positions only, and no attention mask: real tokens never see padding on their right."""
        if self.options.label_smoothing_factor:
            raise AdapterError("label smoothing needs all logits")
        return _sum(labelled_loss(model, {"input_ids": batch["input_ids"]}, batch["labels"]))

    def predict(
        self, model: nn.Module, processor: Any, examples: Iterable[Example], options: PredictOptions
    ) -> Iterator[Prediction]:
        """Greedy answers to the last question of each example; a final assistant turn is the reference."""
        examples = list(examples)
        template = ChatTemplate(processor, options.encode.system_prompt)
        questions = [_asked(e, processor, template, options.encode) for e in examples]
        whole = [processor(text, add_special_tokens=raw)["input_ids"] for text, _, raw in questions]
        prompts = [_fitted(ids, options.encode.max_length) for ids in whole]
        ends = self.generation_defaults(model, processor)["eos_token_id"]
        done: dict[int, Prediction] = {}
        next_up = 0
        for index, new in generate(model, processor, prompts, options, ends):
            text, reference, _ = questions[index]
            answer = processor.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            cut = len(whole[index]) > len(prompts[index])
            done[index] = Prediction(examples[index].where, text, answer, reference, cut)
            while next_up in done:
                yield done.pop(next_up)
                next_up += 1

    def prompt(self, processor: Any, example: Example, options: EncodeOptions) -> list[int]:
        """Token ids of the conversation so far and the generation prompt."""
        text, _, raw = _question(example.fields, processor, ChatTemplate(processor, options.system_prompt), options)
        return _fitted(processor(text, add_special_tokens=raw)["input_ids"], options.max_length)

    def reference_lengths(self, processor: Any, examples: Sequence[Example]) -> list[int | None]:
        """Tokens of each example's final answer; raw text, and a conversation that ends with the user, have none."""
        answers = [_split_answer(e.fields)[1] for e in examples]
        return [None if a is None else len(processor(a, add_special_tokens=False)["input_ids"]) + 1 for a in answers]

    def generation_defaults(self, model: nn.Module, processor: Any) -> dict[str, Any]:
        """All tokens that end an answer: the tokenizer's, the model's and the one that ends the template's turns."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids, labels = encode_spans(ChatTemplate(processor).conversations(talk)[0], processor, special=False)
        except ValueError:  # a template that wants more than two plain turns
            ids, labels = [], []
        last = [i for i, x in zip(ids, labels, strict=True) if x != IGNORE][-1:]
        ends = {processor.eos_token_id, *(i for i in last if i in special_ids(processor))}
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends |= set(own) if isinstance(own, list) else {own}
        pad_id = processor.pad_token_id if processor.pad_token_id is not None else processor.eos_token_id
        return {"eos_token_id": sorted(i for i in ends if i is not None), "pad_token_id": pad_id}

    def judge(self, predictions: Sequence[Prediction]) -> Judgement:
        """Exact match and, for JSON answers, field F1."""
        return judge_text(predictions)


def _smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> LossSum:
    """Cross entropy with label smoothing over all labelled positions, as a sum; virtual tokens have no label."""
    wanted = labels[:, 1:].flatten()
    given = logits[:, -labels.shape[1] : -1].flatten(0, 1).float()
    total = nn.functional.cross_entropy(given, wanted, reduction="sum", label_smoothing=smoothing)
    right = (given.detach().argmax(-1) == wanted).sum()
    return LossSum(total, int((wanted != IGNORE).sum()), {"token_accuracy": right})


def _sum(result: HeadResult) -> LossSum:
    return LossSum(result.loss_sum, result.count, {"token_accuracy": result.correct})


def _is_raw(fields: Mapping[str, Any], processor: Any, options: EncodeOptions) -> bool:
    return "prompt" in fields and (options.template == "none" or not processor.chat_template)


def _raw(fields: Mapping[str, Any]) -> Rendered:
    prompt, answer = fields["prompt"], fields["completion"]
    return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))


def _messages(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "prompt" not in fields:
        return [*fields["messages"]]
    answer = [{"role": "assistant", "content": fields["completion"]}] if "completion" in fields else []
    return [{"role": "user", "content": fields["prompt"]}, *answer]


def _split_answer(fields: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], str | None]:
    """(messages before the final answer, that answer or None)."""
    if "text" in fields:
        return [{"role": "user", "content": fields["text"]}], None
    messages = _messages(fields)
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        return messages, None
    return messages[:-1], str(messages[-1]["content"])


def _fitted(ids: list[int], limit: int) -> list[int]:
    """A prompt cut on the left like a training sample: its first token, which may be a BOS, stays."""
    return ids if len(ids) <= limit else [ids[0], *ids[len(ids) - limit + 1 :]]


def _asked(
    example: Example, processor: Any, template: ChatTemplate, options: EncodeOptions
) -> tuple[str, str | None, bool]:
    try:
        return _question(example.fields, processor, template, options)
    except ValueError as error:
        raise DataError(str(error), where=example.where) from error


def _question(
    fields: Mapping[str, Any], processor: Any, template: ChatTemplate, options: EncodeOptions
) -> tuple[str, str | None, bool]:
    """(prompt text, reference answer, whether it is raw text that the tokenizer adds its own BOS to)."""
    before, answer = _split_answer(fields)
    if _is_raw(fields, processor, options):
        return fields["prompt"], fields.get("completion"), True
    if "text" in fields and (options.template == "none" or not processor.chat_template):
        return fields["text"], None, True
    return template.prompt(before, fields.get("tools")), answer, False


TASKS.register(CausalLM())
