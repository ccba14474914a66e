"""Ollama's Modelfile (https://docs.ollama.com/modelfile): the weights, a chat template in Go's syntax, stops."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from lora_ft.errors import UsageError

Messages = Sequence[Mapping[str, str]]
RAW = "{{ .Prompt }}"
SYSTEM, USERS, ANSWERS = "Qsystem0Q", ("Quser0Q", "Quser1Q", "Quser2Q"), ("Qanswer0Q", "Qanswer1Q")
OWN_MODELFILE = "lora-ft export --format gguf, with a Modelfile of your own"


@dataclass(frozen=True)
class ChatForm:
    """What a chat template puts around messages that start with the user and alternate.

    Attributes:
        head: before the first message, where there is no system message.
        system: before and after a system message; None where the template leaves it out.
        inside: whether the system message is a part of the first user message.
        user: before and after a user message.
        answer: before and after an answer.
        ask: where the next answer is to start.
    """

    head: str
    system: tuple[str, str] | None
    inside: bool
    user: tuple[str, str]
    answer: tuple[str, str]
    ask: str

    def text(self, messages: Messages) -> str:
        """The prompt as `go` would make it."""
        rest, found = list(messages), self.head
        opened = False
        if rest[0]["role"] == "system":
            content = rest.pop(0)["content"]
            if self.system:
                opened = self.inside
                found = self.system[0] + content + self.system[1]
        for i, message in enumerate(rest):
            before, after = self.user if message["role"] == "user" else self.answer
            found += ("" if opened and i == 0 else before) + message["content"] + after
        return found + self.ask

    def go(self) -> str:
        """The same as a Go template over Ollama's `.System` and `.Messages`, of which a system message is the first."""
        start = _literal(self.head)
        before = _literal(self.user[0])
        if self.system:
            system = f"{_literal(self.system[0])}{{{{ .System }}}}{_literal(self.system[1])}"
            start = f"{{{{ if .System }}}}{system}{{{{ else }}}}{start}{{{{ end }}}}"
            if self.inside:
                before = f"{{{{ if not (and $.System (eq $i 1)) }}}}{before}{{{{ end }}}}"
        content = "{{ $m.Content }}"
        user = f'{{{{ if eq $m.Role "user" }}}}{before}{content}{_literal(self.user[1])}'
        answer = (
            f'{{{{ else if eq $m.Role "assistant" }}}}{_literal(self.answer[0])}{content}{_literal(self.answer[1])}'
        )
        return f"{start}{{{{ range $i, $m := .Messages }}}}{user}{answer}{{{{ end }}}}{{{{ end }}}}{_literal(self.ask)}"


def _literal(text: str) -> str:
    """Text of a Go template inside three quotes; what either would read as its own is written as a Go string."""
    if any(c in '{}"\\' or (c < " " and c != "\n") for c in text):
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"
    return text


def chat_form(tokenizer: Any) -> ChatForm | None:
    """The form of a tokenizer's chat template, found by rendering it; None without a template.

    Raises:
        UsageError: it has no such form.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        form = _form(tokenizer)
        if all(form.text(m) == _render(tokenizer, m, True) for m in _conversations(form.system is not None)):
            return form
    except (ValueError, TypeError, TemplateError):  # TypeError: one that cannot do without tools
        pass
    raise UsageError(
        "the chat template does more than put text around messages, so it cannot be written in Ollama's syntax here",
        fix=OWN_MODELFILE,
    )


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _conversations(system: bool) -> list[list[dict[str, str]]]:
    turns = [_say("user", USERS[0]), _say("assistant", ANSWERS[0]), _say("user", USERS[1])]
    longer = [*turns, _say("assistant", ANSWERS[1]), _say("user", USERS[2])]
    found = [turns[:1], turns, longer]
    return found + [[_say("system", SYSTEM), *c] for c in found] if system else found


def _render(tokenizer: Any, messages: Messages, ask: bool) -> str:
    """A prompt, without the token that llama.cpp puts first by itself."""
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    ids = tokenizer("a")["input_ids"]
    if tokenizer.bos_token and ids and ids[0] == tokenizer.bos_token_id:
        return text.removeprefix(tokenizer.bos_token)
    return text


def _form(tokenizer: Any) -> ChatForm:
    """Cut rendered prompts at the contents.

    Raises:
        ValueError: the parts do not fit together.
    """
    asked = _render(tokenizer, _conversations(False)[1], True)
    start, to_answer, to_user, end = _cut(asked, [USERS[0], ANSWERS[0], USERS[1]])
    # Where one message ends and the next starts, only rendering shows; any cut gives the same text.
    after_user = _shared(to_answer, end, _render(tokenizer, _conversations(False)[0], False).partition(USERS[0])[2])
    before_user = to_user
    while not start.endswith(before_user):
        before_user = before_user[1:]
    turns = [*_conversations(False)[0], _say("assistant", ANSWERS[0])]
    after_answer = _render(tokenizer, turns, False).partition(ANSWERS[0])[2]
    if to_user.startswith(after_answer) and start.endswith(to_user.removeprefix(after_answer)):
        before_user = to_user.removeprefix(after_answer)
    user = (before_user, after_user)
    answer = (to_answer.removeprefix(after_user), to_user[: len(to_user) - len(before_user)])
    system, inside = _system(tokenizer, before_user)
    return ChatForm(start.removesuffix(before_user), system, inside, user, answer, end.removeprefix(after_user))


def _shared(one: str, other: str, likely: str) -> str:
    """A start of both texts: the likely one, or the longest."""
    if one.startswith(likely) and other.startswith(likely):
        return likely
    while not other.startswith(one):
        one = one[:-1]
    return one


def _system(tokenizer: Any, before_user: str) -> tuple[tuple[str, str] | None, bool]:
    try:
        text = _render(tokenizer, [_say("system", SYSTEM), _say("user", USERS[0])], True)
    except TemplateError:  # Gemma 2's refuses one
        return None, False
    if SYSTEM not in text:
        return None, False
    before, after, _ = _cut(text, [SYSTEM, USERS[0]])
    if after.endswith(before_user):
        return (before, after.removesuffix(before_user)), False
    return (before, after), True


def _cut(text: str, contents: Sequence[str]) -> list[str]:
    parts = []
    for content in contents:
        part, found, text = text.partition(content)
        if not found:
            raise ValueError(content)
        parts.append(part)
    return [*parts, text]


def modelfile(weights: str, template: str, stops: Sequence[str], system: str = "", adapter: str = "") -> str:
    """The file's text.

    Args:
        weights: name of the GGUF file beside it.
        template: in Go's syntax.
        stops: texts that end an answer.
        system: what the model was trained with; "" for none.
        adapter: name of a GGUF file with a LoRA for the weights; "" for none.

    Raises:
        UsageError: a text that the format cannot hold.
    """
    lines = [f"FROM ./{weights}", *([f"ADAPTER ./{adapter}"] if adapter else []), f"TEMPLATE {_quoted(template)}"]
    lines += [f"SYSTEM {_quoted(system)}"] if system else []
    return "\n".join([*lines, *(f"PARAMETER stop {_quoted(s)}" for s in stops)]) + "\n"


def _quoted(text: str) -> str:
    """Ollama knows no escapes: a text ends at its closing quotes and the end of a line."""
    if '"' not in text and "\n" not in text:
        return f'"{text}"'
    if '"""' in text or text.startswith('"') or text.endswith('"'):
        raise UsageError(f"{text!r} cannot be written in a Modelfile", why="of its quotes", fix=OWN_MODELFILE)
    return f'"""{text}"""'


def stop_texts(tokenizer: Any, generation: Mapping[str, Any]) -> list[str]:
    """Texts of the tokens that end an answer, each once."""
    ids = generation.get("eos_token_id")
    ids = list(ids) if isinstance(ids, list | tuple) else [ids]
    known = [i for i in (*ids, tokenizer.eos_token_id) if i is not None]
    texts = [str(tokenizer.decode([i], skip_special_tokens=False)) for i in known]
    return list(dict.fromkeys(t for t in texts if t.strip()))
