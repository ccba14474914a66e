"""A chat template as strings around the turns, found by rendering it, for programs with templates of another kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_ft.errors import UsageError

SYSTEM, USER, ANSWER, MORE = "Sq1system", "Uq2question", "Aq3answer", "Mq4more"  # letters that no template changes


@dataclass(frozen=True)
class Turns:
    """What stands before and after the text of each turn.

    Attributes:
        user: before a user's text.
        answer: before an assistant's text, and at the end, where the model goes on.
        end: after an assistant's text.
        system: before and after a system text; None where the template has no place for one.
        default: the system text that stands where none is given; "" for none.
    """

    user: str
    answer: str
    end: str
    system: tuple[str, str] | None
    default: str

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation, open for the next answer."""
        if self.default and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        around = {"user": (self.user, ""), "assistant": (self.answer, self.end), "system": self.system or ("", "")}
        return "".join(f"{around[m['role']][0]}{m['content']}{around[m['role']][1]}" for m in messages) + self.answer


def turns_of(tokenizer: Any) -> Turns:
    """The strings of a tokenizer's own template, without a first token that the reader adds itself.

    Raises:
        UsageError: it cannot be said in such strings.
    """
    plain = _render(tokenizer, [_turn("user", USER), _turn("assistant", ANSWER), _turn("user", MORE)])
    first, rest = plain.split(USER)
    between, rest = rest.split(ANSWER)
    follow, last = rest.split(MORE)
    try:
        with_system = _render(tokenizer, [_turn("system", SYSTEM), _turn("user", USER)])
    except Exception:  # a template refuses with what it likes
        with_system = ""
    system, user = None, _ending(first, follow)
    before, found, after = with_system.partition(SYSTEM)
    after = after.split(USER)[0]
    if found and USER in with_system:
        user = _ending(user, after)
        system = (before, after.removesuffix(user))
    default = ""
    if first != user and system is not None and first.startswith(system[0]):
        default = first.removeprefix(system[0]).removesuffix(system[1] + user)
    turns = Turns(user, between, follow.removesuffix(user), system, default)
    talk = [_turn("user", "one"), _turn("assistant", "two"), _turn("user", "three")]
    for messages in (talk, talk[:1], *([[_turn("system", "be brief"), *talk]] if system else [])):
        if last != between or turns.render(messages) != _render(tokenizer, messages):
            raise UsageError(
                "the chat template cannot be said as strings around each turn",
                why="it looks at more than the turns, such as dates, tools or thoughts",
                fix="--format gguf holds the template itself, which llama.cpp runs",
            )
    return turns


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token or "") if tokenizer.bos_token else text


def _ending(one: str, other: str) -> str:
    """The longest common ending."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]
