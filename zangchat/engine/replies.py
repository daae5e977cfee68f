"""Tokens to text and back: streams that never split a character, stop strings, the parts of a reply, conversations that fit the context."""

import codecs
from collections.abc import Sequence
from typing import Any

REPLY_SHARE = 4  # where a chat is trimmed, 1/4 of the context is left to the reply, or max_tokens if that is less


class StreamDecoder:
    """Tokens -> text, piece by piece, never half a character: incomplete UTF-8 is held back until it is whole, or flushed as U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode_bytes = tokenizer.decode_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that became certain with this token; often "", when it ends within a character."""
        return self._decoder.decode(self._decode_bytes([token]))

    def flush(self) -> str:
        """What is still held back, at the end of the stream; the decoder can be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class StopFinder:
    """Watches a growing text for stop strings. Text that may yet turn out to be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False  # the text has ended in front of a stop string
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """What may be shown now; nothing any more once a stop string was found."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        places = [place for place in map(text.find, self._stops) if place >= 0]
        self.found = bool(places)
        shown = min(places) if places else len(text) - self._unsure(text)
        self._held = "" if self.found else text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """The length of the longest end of the text that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class ReplyDecoder:
    """Tokens of a reply -> the parts of its message: [{"type": "text" | "python" | "python_output", "text": str}], growing.

    The text ends in front of the first of the `stop` strings, which are looked for within each part of what is said.
    """

    SWITCHES = {
        "<|python_start|>": "python",
        "<|python_end|>": "text",
        "<|output_start|>": "python_output",
        "<|output_end|>": "text",
    }

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.parts: list[dict[str, str]] = []
        self._decoder = StreamDecoder(tokenizer)
        self._finder = StopFinder(stop)
        self._switches = {tokenizer.encode_special(name): kind for name, kind in self.SWITCHES.items()}
        self._silent = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()} - set(self._switches)
        self._kind = "text"

    def feed(self, token: int) -> list[tuple[str, str]]:
        """The (type, text) pieces that this token adds: none, or one."""
        if self.stopped:
            return []
        if token in self._switches:
            pieces = self.flush()
            self._kind = self._switches[token]
            if self._kind != "text" and not self.stopped:
                self.parts.append({"type": self._kind, "text": ""})
            return pieces
        if token in self._silent:
            return []
        text = self._decoder.feed(token)
        return self._add(self._finder.feed(text) if self._kind == "text" else text)

    def flush(self) -> list[tuple[str, str]]:
        """What was held back, at the end."""
        text = self._decoder.flush()
        return self._add(self._finder.feed(text) + self._finder.flush() if self._kind == "text" else text)

    def says(self, token: int) -> bool:
        """Whether this token, just fed, is part of what is said, not of a tool call nor a mark of one."""
        return self._kind == "text" and token not in self._silent and token not in self._switches

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._finder.found

    def text(self) -> str:
        """What was said, tool calls left out."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def content(self) -> str | list[dict[str, str]]:
        """The reply as a message's content: a string, or its parts where a tool was called."""
        return self.parts if any(part["type"] != "text" for part in self.parts) else self.text()

    def _add(self, text: str) -> list[tuple[str, str]]:
        if not text:
            return []
        if not self.parts or self.parts[-1]["type"] != self._kind:
            self.parts.append({"type": self._kind, "text": ""})
        self.parts[-1]["text"] += text
        return [(self._kind, text)]


def fit_conversation(tokenizer: Any, messages: list[dict[str, Any]], max_prompt: int) -> tuple[list[int], int]:
    """(prompt tokens of a chat that waits for the assistant, number of oldest messages left out to stay within `max_prompt` tokens).

    The system message stays, turns go in pairs, and the last user message always stays: the prompt may therefore still be too long.
    """
    head = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(head) :]
    cuts = range(0, len(turns), 2)  # turns alternate, so that every cut leaves a user message first

    def render(cut: int) -> list[int]:
        return tokenizer.render_for_completion({"messages": [*head, *turns[cut:]]})

    low, high = 0, len(cuts) - 1
    while low < high:  # the fewest turns to leave out: prompts only get shorter
        middle = (low + high) // 2
        low, high = (low, middle) if len(render(cuts[middle])) <= max_prompt else (middle + 1, high)
    return render(cuts[low]), cuts[low]
