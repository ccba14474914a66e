"""A conversation with a loaded model, answer by answer."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import TextIteratorStreamer

from lora_ft.errors import UsageError
from lora_ft.records import Example

from .loading import Loaded


class Chat:
    """Keeps the conversation and streams answers.

    Args:
        loaded: a model that writes.
        system: system prompt; default that of the recipe.
        max_new_tokens: most tokens in an answer.
        temperature: 0 for the likeliest token each time.
    """

    def __init__(self, loaded: Loaded, *, system: str | None, max_new_tokens: int, temperature: float) -> None:
        if not hasattr(loaded.model, "generate"):
            raise UsageError(f"a {loaded.task.name} model does not write, so there is nothing to talk to")
        self._loaded = loaded
        self._encode = replace(loaded.encode, system_prompt=system) if system else loaded.encode
        self._messages: list[dict[str, str]] = []
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._options["temperature"] = temperature

    def forget(self) -> None:
        """Start a new conversation."""
        self._messages = []

    def say(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text` as they are written."""
        loaded = self._loaded
        self._messages.append({"role": "user", "content": text})
        ids = loaded.task.prompt(loaded.processor, Example({"messages": self._messages}, "chat"), self._encode)
        streamer = TextIteratorStreamer(
            loaded.processor, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        inputs = loaded.processor.pad({"input_ids": [ids]}, return_tensors="pt").to(loaded.model.device)
        failed: list[BaseException] = []

        def work() -> None:
            try:
                loaded.model.generate(**inputs, **self._options, streamer=streamer)
            except BaseException as error:
                failed.append(error)
                streamer.end()  # type: ignore[no-untyped-call]

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        answer = ""
        for piece in streamer:
            answer += piece
            yield piece
        thread.join()
        if failed:
            raise failed[0]
        self._messages.append({"role": "assistant", "content": answer})
