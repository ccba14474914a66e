"""Conversations with images as token ids: rendered by the chat template, its image marks expanded by the processor.

How many tokens an image becomes only the processor knows. So the text is encoded twice: by the tokenizer as it was
rendered, where the answers are found as for text alone, and by the processor with the images. An answer stands behind
its images, so both end in the same tokens, and the labels go over from the right; an answer with a later image behind
it is placed in the conversation up to that answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from lora_ft.errors import UsageError
from lora_ft.media import Media, find_media
from lora_ft.records import Example

from ._base import IGNORE
from ._chat import ChatTemplate, Message, Rendered
from ._tokens import close, encode_spans


class Parts(list[dict[str, str]]):
    """The parts of a turn; as a string, its text alone."""

    def __str__(self) -> str:
        return "".join(p["text"] for p in self if p["type"] == "text")


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation as the template takes it.

    Attributes:
        messages: with a list of parts as content; an image part says only that there is one.
        images: (number of its turn, image), in order.
    """

    messages: tuple[Message, ...]
    images: tuple[tuple[int, Media], ...]

    def until(self, turn: int) -> tuple[Media, ...]:
        """The images of the turns before this one."""
        return tuple(media for at, media in self.images if at < turn)

    @property
    def answers(self) -> list[int]:
        """Numbers of the assistant's turns."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]


def read_talk(example: Example, processor: Any) -> Talk:
    """The example's conversation, its images found but not read.

    Raises:
        ValueError: an image that is missing or nothing of the kind; a text with the processor's own mark for images.
    """
    messages: list[Message] = []
    images: list[tuple[int, Media]] = []
    for turn, message in enumerate(example.fields["messages"]):
        parts = Parts()
        for part in message["content"]:
            if part["type"] == "image":
                images.append((turn, find_media(part["image"], "image", example.root)))
                parts.append({"type": "image"})
            else:
                _check_text(part["text"], processor)
                parts.append({"type": "text", "text": part["text"]})
        messages.append({**message, "content": parts})
    return Talk(tuple(messages), tuple(images))


def _check_text(text: str, processor: Any) -> None:
    mark = next((m for m in _of_both(processor, "image_token", "boi_token", "eoi_token") if m in text), None)
    if mark is not None:
        raise ValueError(f"the text contains {mark!r}, which stands for an image; put images into parts or a column")


def image_ids(processor: Any) -> set[int]:
    """Ids of the tokens that images are written with."""
    return set(_of_both(processor, "image_token_id"))


def _of_both(processor: Any, *names: str) -> list[Any]:
    """What processor and tokenizer have under these names; Gemma's call different tokens so."""
    found = (getattr(holder, name, None) for holder in (processor, processor.tokenizer) for name in names)
    return [x for x in found if x is not None]


class ImageChat(ChatTemplate):
    """A processor's chat template, for turns that are lists of parts."""

    def __init__(self, processor: Any, system_prompt: str | None = None) -> None:
        super().__init__(processor, system_prompt)
        if not processor.chat_template:
            self._template = processor.tokenizer.chat_template

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [
            m if isinstance(m["content"], Parts) else {**m, "content": Parts([{"type": "text", "text": m["content"]}])}
            for m in super()._with_system(messages)
        ]

    def _render(self, messages: Sequence[Message], tools: Any, generation: bool = False) -> str:
        refused: TemplateError | None = None
        for given in (messages, _folded(messages)):
            try:
                return self._apply(given, tools, generation) if given else ""
            except TemplateError as error:
                refused = refused or error
            if not _folded(messages):
                break
        raise ValueError(f"the chat template refuses this conversation: {refused}") from refused


def _folded(messages: Sequence[Message]) -> list[Message]:
    """The system's parts moved into the first user turn, for templates without a system role; [] without a system."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return []
    gap = {"type": "text", "text": "\n\n"}
    joined = Parts([*messages[0]["content"], gap, *messages[1]["content"]])
    return [{**messages[1], "content": joined}, *messages[2:]]


def conversations(talk: Talk, chat: ChatTemplate) -> list[tuple[Rendered, list[int]]]:
    """What to learn from: texts with the answers in them, and for each answer how many images stand before its end."""
    rendered = chat.conversations(talk.messages)
    images = [len(talk.until(turn)) for turn in talk.answers]
    if len(rendered) == 1:
        return [(rendered[0], images)]
    return [(one, [count]) for one, count in zip(rendered, images, strict=True)]


def label(
    rendered: Rendered, counts: Sequence[int], images: Sequence[Any], processor: Any
) -> tuple[str, list[int], list[int]]:
    """Text, token ids with expanded images, and labels that are -100 outside the answers and on images.

    Args:
        rendered: with a span for each answer; one without an end token gets it.
        counts: for each answer the images before it.
        images: of the conversation, in RGB.
        processor: with tokenizer.

    Raises:
        ValueError: the processor and the chat template do not go together.
    """
    special = adds_special(processor.tokenizer, rendered.text)
    ids, labels = encode_spans(rendered, processor.tokenizer, special=special)
    if len(close(ids, labels, processor.tokenizer)[0]) > len(ids):
        end = processor.tokenizer.eos_token
        last = (rendered.spans[-1][0], rendered.spans[-1][1] + len(end))
        rendered = Rendered(rendered.text + end, (*rendered.spans[:-1], last))
    return (rendered.text, *_placed(rendered, counts, images, processor, special))


def _placed(
    rendered: Rendered, counts: Sequence[int], images: Sequence[Any], processor: Any, special: bool
) -> tuple[list[int], list[int]]:
    ids, labels = encode_spans(rendered, processor.tokenizer, special=special)
    given = images[: counts[-1]] if counts else images
    whole = expanded(processor, rendered.text, given)
    same = _common_end(ids, whole)
    placed = [IGNORE] * (len(whole) - same) + labels[len(labels) - same :]
    if any(x != IGNORE for x in labels[: len(labels) - same]):
        before = max((n for n, count in enumerate(counts) if count < counts[-1]), default=None)
        if before is None:
            raise ValueError("the processor changes the text behind the images, so the answer cannot be found in it")
        head = Rendered(rendered.text[: rendered.spans[before][1]], rendered.spans[: before + 1])
        begun, begun_labels = _placed(head, counts[: before + 1], images, processor, special)
        end = max(n for n, x in enumerate(begun_labels) if x != IGNORE) + 1
        if begun[:end] != whole[:end]:
            raise ValueError("the processor writes an answer differently where another turn follows")
        placed[:end] = begun_labels[:end]
    if [x for x in placed if x != IGNORE] != [x for x in labels if x != IGNORE]:
        raise ValueError("the processor changes the text of an answer")
    return whole, placed


def _common_end(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def adds_special(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer adds its own BOS: not where the template has written it, as Transformers decides it."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def expanded(processor: Any, text: str, images: Sequence[Any]) -> list[int]:
    """Token ids of a text with its images.

    Raises:
        ValueError: the processor refuses them.
    """
    return list(processed(processor, [text], [images])["input_ids"][0])


def processed(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What the processor makes of texts and the images of each: ids as lists of their own lengths, pixels as tensors.

    Nothing is padded by the tokenizer: that would change its state, which threads share.

    Raises:
        ValueError: the processor refuses them.
    """
    nested = [list(row) for row in images]
    try:
        made = processor(
            text=list(texts), images=nested if any(nested) else None,
            text_kwargs={"padding": False, "truncation": False,
                         "add_special_tokens": adds_special(processor.tokenizer, texts[0])},
            images_kwargs={"return_tensors": "pt"},
        )  # fmt: skip
    except (IndexError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the model's processor ({type(processor).__name__}) fails on this row: {error}") from error
    return dict(made)


def check_image_processor(processor: Any) -> None:
    """Refuse what does not take images and text in chat form.

    Raises:
        UsageError: says what is missing.
    """
    name = type(processor).__name__
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UsageError(
            f"the model's processor ({name}) does not take images and text together",
            fix="a model such as HuggingFaceTB/SmolVLM-256M-Instruct, or builtin:tiny-vlm to try",
        )
    if not processor.chat_template and not processor.tokenizer.chat_template:
        raise UsageError(f"the model's processor ({name}) has no chat template", fix="a model tuned for conversations")
    if processor.tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end token, so the model could never learn to stop")
    _try(processor)


def _try(processor: Any) -> None:
    """A conversation with a grey image, or two, must come through, or no row will."""
    from PIL import Image

    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    told: Message = {"role": "assistant", "content": Parts([{"type": "text", "text": "grey"}])}
    marks, shown, seen = image_ids(processor), "", []
    for images in ([grey], [grey, grey]):
        parts = Parts([*({"type": "image"} for _ in images), {"type": "text", "text": "what"}])
        try:
            (rendered,) = ImageChat(processor).conversations([{"role": "user", "content": parts}, told])
            shown, ids, _ = label(rendered, [len(images)], images, processor)
        except ValueError as error:
            raise UsageError(f"the model's processor cannot encode a conversation with an image: {error}") from error
        seen.append(sum(x in marks for x in ids) if marks else len(ids))
    if not 0 < seen[0] < seen[1]:
        raise UsageError("the chat template does not write down where an image stands", why=f"it renders {shown!r}")
