"""A vision-language model in chat form: images and text in, text out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_ft.errors import DataError, UsageError
from lora_ft.media import Media, read_image
from lora_ft.records import Batch, Encoded, EncodeOptions, Example, LossSum, Prediction, PredictOptions, Sample
from lora_ft.registry import TASKS
from lora_ft_adapters import AdapterError
from lora_ft_adapters.fast.causal import labelled_loss

from ._base import IGNORE, TaskBase, in_dtype_of, padded
from ._generate import in_order
from ._image_text import (
    ImageChat,
    Parts,
    Talk,
    adds_special,
    check_image_processor,
    conversations,
    expanded,
    image_ids,
    label,
    read_talk,
)
from ._image_text_batch import Row, model_inputs, write_answers
from ._images import rgb
from ._tokens import encode_spans, fit, special_ids
from .causal_lm import CausalLM

PROBE_TOKENS = 1024  # in all probes together; the logits of each are compared in full
WHOLE = ("drop", "error")


@dataclass(frozen=True)
class ImageTextToText(CausalLM):
    """Models that write about images. Loss only on what the assistant wrote, its end token included."""

    name = "image-text-to-text"
    hub_task = "image-text-to-text"
    description = "A conversation with any number of images and a model that writes (loss on answers only)."
    auto_class = "AutoModelForImageTextToText"
    processor_class = "AutoProcessor"
    kinds = ("image_conversation",)
    media = True
    chats = False

    def check_processor(self, processor: Any) -> list[str]:
        """Refuse what has no images, no chat template or no end token."""
        check_image_processor(processor)
        return []

    def encoder(self, processor: Any, options: EncodeOptions) -> Callable[[Example], Encoded]:
        """Conversations through the chat template, images expanded; a row that is too long is dropped, never cut."""
        if options.overlong not in WHOLE:
            raise UsageError(
                f"data.overlong: {options.overlong} would cut images in two",
                why=f"allowed: {', '.join(WHOLE)}",
                fix="--set data.overlong=drop",
            )
        if options.template == "none":
            raise UsageError("data.template: none leaves out where images stand", fix="--set data.template=auto")
        chat = ImageChat(processor, options.system_prompt)

        def encode(example: Example) -> Encoded:
            talk = read_talk(example, processor)
            images = [read_image(media, options.max_pixels) for _, media in talk.images]
            found = [
                self._sample(label(rendered, counts, images, processor), talk, counts, options, example.where)
                for rendered, counts in conversations(talk, chat)
            ]
            outcome = next((f.outcome for f in found if f.outcome), "one sample per answer" if len(found) > 1 else "")
            return Encoded(tuple(s for f in found for s in f.samples), outcome)

        return encode

    def _sample(
        self, labelled: tuple[str, list[int], list[int]], talk: Talk, counts: Sequence[int], options: EncodeOptions,
        where: str,
    ) -> Encoded:  # fmt: skip
        text, ids, labels = labelled
        shown = [media for _, media in talk.images][: counts[-1] if counts else None]
        more = {"text": text, "images": dict(enumerate(shown))}
        fitted = fit(ids, labels, options, where)
        return replace(fitted, samples=tuple(replace(s, inputs={**s.inputs, **more}) for s in fitted.samples))

    def collate(self, samples: Sequence[Sample], processor: Any, draw: int = 0) -> Batch:
        """input_ids, attention_mask, labels (B, T), padded on the right, and the images as the model takes them."""
        rows = [Row(s.inputs["text"], s.inputs["input_ids"], [*s.inputs["images"].values()]) for s in samples]
        return {**model_inputs(rows, processor), "labels": padded([s.inputs["labels"] for s in samples], IGNORE)}

    def show(self, sample: Sample, processor: Any) -> str:
        """The sample's text, its supervised parts in [[ ]]; equal tokens of images in a row are shown once."""
        ids = sample.inputs["input_ids"]
        marks = image_ids(processor)
        keep = [i for i, x in enumerate(ids) if x not in marks or i == 0 or ids[i - 1] != x]
        inputs = {name: [sample.inputs[name][i] for i in keep] for name in ("input_ids", "labels")}
        return super().show(replace(sample, inputs=inputs), processor.tokenizer)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The model's own loss over full logits."""
        return super().loss(model, in_dtype_of(model, batch))

    def fast_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Head at labelled positions only, and no attention mask: real tokens never see padding on their right."""
        if self.options.label_smoothing_factor:
            raise AdapterError("label smoothing needs all logits")
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "attention_mask")}
        result = labelled_loss(model, in_dtype_of(model, inputs), batch["labels"])
        return LossSum(result.loss_sum, result.count, {"token_accuracy": result.correct})

    def probes(self, samples: Sequence[Sample], processor: Any) -> list[Batch]:
        """Whole samples, since images cannot be cut: the shortest, as many as have PROBE_TOKENS together."""
        chosen: list[Sample] = []
        for s in sorted(samples, key=lambda s: s.length):
            if not chosen or sum(c.length for c in chosen) + s.length <= PROBE_TOKENS:
                chosen.append(s)
        return TaskBase.probes(self, chosen, processor)

    def predict(
        self, model: nn.Module, processor: Any, examples: Iterable[Example], options: PredictOptions
    ) -> Iterator[Prediction]:
        """Greedy answers to the last question of each example; a final assistant turn is the reference."""
        examples = list(examples)
        chat = ImageChat(processor, options.encode.system_prompt)
        asked = [_asked(e, processor, chat, options.encode) for e in examples]
        ends = self.generation_defaults(model, processor)["eos_token_id"]
        for index, new in in_order(write_answers(model, processor, [row for row, _ in asked], options, ends)):
            row, reference = asked[index]
            answer = processor.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            details = {"images": [media.shown for media in row.images]}
            yield Prediction(examples[index].where, row.text, answer.strip(), reference, details=details)

    def prompt(self, processor: Any, example: Example, options: EncodeOptions) -> list[int]:
        """There is no way to show images in a terminal's conversation."""
        return TaskBase.prompt(self, processor, example, options)

    def reference_lengths(self, processor: Any, examples: Sequence[Example]) -> list[int | None]:
        """Tokens of each example's final answer; a conversation that ends with the user has none."""
        answers = [_final_answer(e.fields["messages"]) for e in examples]
        encode = processor.tokenizer
        return [None if a is None else len(encode(a, add_special_tokens=False)["input_ids"]) + 1 for a in answers]

    def generation_defaults(self, model: nn.Module, processor: Any) -> dict[str, Any]:
        """All tokens that end an answer: the tokenizer's, the model's and the one that ends the template's turns."""
        found = super().generation_defaults(model, processor.tokenizer)
        turns = [{"role": r, "content": Parts([{"type": "text", "text": "a"}])} for r in ("user", "assistant")]
        (rendered,) = ImageChat(processor).conversations(turns)
        special = adds_special(processor.tokenizer, rendered.text)
        ids, labels = encode_spans(rendered, processor.tokenizer, special=special)
        last = [i for i, x in zip(ids, labels, strict=True) if x != IGNORE][-1:]
        ends = {*found["eos_token_id"], *(i for i in last if i in special_ids(processor.tokenizer))}
        return {**found, "eos_token_id": sorted(ends)}


def _final_answer(messages: Sequence[Any]) -> str | None:
    last = messages[-1]
    return str(Parts(last["content"])) if last["role"] == "assistant" and len(messages) > 1 else None


def _asked(example: Example, processor: Any, chat: ImageChat, options: EncodeOptions) -> tuple[Row, str | None]:
    """The prompt, and the reference answer."""
    try:
        talk = read_talk(example, processor)
        reference = _final_answer(talk.messages)
        before = len(talk.messages) - (reference is not None)
        text = chat.prompt(talk.messages[:before])
        images: tuple[Media, ...] = talk.until(before)
        for media in images:
            read_image(media, options.max_pixels)
        return Row(text, expanded(processor, text, [rgb(m) for m in images]), images), reference
    except ValueError as error:
        raise DataError(str(error), where=example.where) from error


TASKS.register(ImageTextToText())
