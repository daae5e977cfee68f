"""Tokens to text: streams, stop strings, the parts of a reply, conversations that fit the
context.
"""

import codecs
from collections.abc import Sequence
from typing import Any

REPLY_SHARE = 4  # a trimmed chat leaves 1/4 of the context, or max_tokens if less, to the reply


class StreamDecoder:
    """Tokens -> text, piece by piece, never half a character.

    Incomplete UTF-8 is held back until it is whole, or flushed as U+FFFD.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode_bytes = tokenizer.decode_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that became certain with this token; "" if it ends within a character."""
        return self._decoder.decode(self._decode_bytes([token]))

    def flush(self) -> str:
        """The rest, at the end of the stream; the decoder can be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class StopFinder:
    """Watches a growing text for stop strings. Holds back text that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False  # the text has ended before a stop string
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """The text to show now; nothing after a stop string."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        places = [place for place in map(text.find, self._stops) if place >= 0]
        self.found = bool(places)
        shown = min(places) if places else len(text) - self._unsure(text)
        self._held = "" if self.found else text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text that was held back, at the end."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """The length of the longest suffix of the text that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        suffixes = range(longest, 0, -1)
        return next((n for n in suffixes if any(s.startswith(text[-n:]) for s in self._stops)), 0)


class Markup:
    """The special tokens of a reply: those that end it, and those that change the kind of its
    parts.

    text <|python_start|> python <|python_end|> text
    text <|output_start|> python_output <|output_end|> text
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = tokenizer.encode_special
        self.stop_tokens = frozenset((special("<|assistant_end|>"), special("<|bos|>")))
        self.python_start, self.python_end, self.output_start, self.output_end = (
            special(f"<|{name}|>")
            for name in ("python_start", "python_end", "output_start", "output_end")
        )
        self.kinds = {
            self.python_start: "python",
            self.python_end: "text",
            self.output_start: "python_output",
            self.output_end: "text",
        }


class ReplyDecoder:
    """Tokens of a reply -> the parts of its message, growing.

    A part is {"type": "text" | "python" | "python_output", "text": str}. The reply ends before the
    first of the `stop` strings, which count within a part of type "text".
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.parts: list[dict[str, str]] = []
        self.kind = "text"  # of the part that grows
        self._decoder = StreamDecoder(tokenizer)
        self._finder = StopFinder(stop)
        self.kinds = Markup(tokenizer).kinds  # of the parts that these tokens begin
        specials = map(tokenizer.encode_special, tokenizer.get_special_tokens())
        self._silent = {token for token in specials if token not in self.kinds}

    def feed(self, token: int) -> list[tuple[str, str]]:
        """The (type, text) pieces that this token adds: none, or one."""
        if self.stopped:
            return []
        if token in self.kinds:
            pieces = self.flush()
            self.kind = self.kinds[token]
            if self.kind != "text" and not self.stopped:
                self.parts.append({"type": self.kind, "text": ""})
            return pieces
        if token in self._silent:
            return []
        text = self._decoder.feed(token)
        return self._add(self._finder.feed(text) if self.kind == "text" else text)

    def flush(self) -> list[tuple[str, str]]:
        """The pieces that were held back, at the end."""
        text = self._decoder.flush()
        if self.kind == "text":
            text = self._finder.feed(text) + self._finder.flush()
        return self._add(text)

    def says(self, token: int) -> bool:
        """Whether this token, just fed, belongs to the text, not to a tool call or its markup."""
        return self.kind == "text" and token not in self._silent and token not in self.kinds

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._finder.found

    def text(self) -> str:
        """The text, without tool calls."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def content(self) -> str | list[dict[str, str]]:
        """The reply as a message's content: its parts if it calls a tool, else a string."""
        return self.parts if any(part["type"] != "text" for part in self.parts) else self.text()

    def _add(self, text: str) -> list[tuple[str, str]]:
        if not text:
            return []
        if not self.parts or self.parts[-1]["type"] != self.kind:
            self.parts.append({"type": self.kind, "text": ""})
        self.parts[-1]["text"] += text
        return [(self.kind, text)]


def fit_conversation(
    tokenizer: Any, messages: list[dict[str, Any]], max_prompt: int
) -> tuple[list[int], int]:
    """A chat that waits for the assistant, cut to `max_prompt` tokens.

    Returns (prompt tokens, number of oldest messages left out). The system message stays, turns go
    in pairs, and the last user message always stays: the prompt may therefore still be too long.
    """
    head = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(head) :]
    cuts = range(0, len(turns), 2)  # turns alternate: every cut leaves a user message first

    def render(cut: int) -> list[int]:
        return tokenizer.render_for_completion({"messages": [*head, *turns[cut:]]})

    low, high = 0, len(cuts) - 1
    while low < high:  # the fewest turns to leave out: prompts only get shorter
        middle = (low + high) // 2
        if len(render(cuts[middle])) <= max_prompt:
            high = middle
        else:
            low = middle + 1
    return render(cuts[low]), cuts[low]
