"""A request and its state: the tokens so far, and the effect of the next one. No model, no
tensors.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zangchat.engine.replies import Markup, ReplyDecoder
from zangchat.engine.sampling import Logprob, Request
from zangchat.engine.tools import use_calculator


@dataclass(eq=False)
class Sequence:
    """A request in a running batch, and its new tokens without the one that ended it."""

    request: Request
    limit: int  # new tokens at most
    markup: Markup
    owner: Any = None  # sequences of one owner share its part of the rows
    text: bool = False  # events bring text
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1: the model chose it, 0: tool output
    # "stop" (end of turn or stop string), "length" (max_tokens or the context), "error", or the
    # reason with which it was cancelled; None while waiting or running
    stop_reason: str | None = None
    stop_token: int | None = None  # the special token that ended it
    error: Exception | None = None
    # if requested: per token, then of stop_token
    logprobs: list[Logprob] = field(default_factory=list)
    # if requested: all but the first token's
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    drawn: int = 0  # tokens drawn so far, including one that the host has not read yet
    forced: deque[int] = field(default_factory=deque)  # tool output still to be inserted
    call: int | None = None  # number of tokens before the tool call being written
    reply: ReplyDecoder | None = None  # the text, and its stop strings

    def __post_init__(self) -> None:
        self.owner = self.owner or object()
        if self.text or self.request.stop:
            self.reply = ReplyDecoder(self.markup.tokenizer, self.request.stop)

    @property
    def most_tokens(self) -> int:
        """Of the prompt and the continuation."""
        return len(self.request.tokens) + self.limit

    @property
    def last_token(self) -> int | None:
        """The newest token, None while only the device knows it."""
        if self.drawn == len(self.tokens):
            return self.tokens[-1]
        return self.forced[0] if self.forced else None

    def accept(self, token: int, logprob: Logprob | None = None) -> "Event":
        """Append the token that was drawn, or the tool output that takes its place."""
        forced = bool(self.forced)
        if logprob is not None:
            # tool output was not chosen: it counts as certain
            logprob = Logprob(0.0, []) if forced else logprob.cut(self.request.logprobs or 0)
            self.logprobs.append(logprob)
        if forced:
            token = self.forced.popleft()
        elif token in self.markup.stop_tokens:
            self.stop_token = token
            return self.end("stop", logprob)
        self.tokens.append(token)
        self.mask.append(0 if forced else 1)
        self._follow_call(token)
        pieces = self.reply.feed(token) if self.reply else []
        if self.reply and self.reply.stopped:
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.limit:
            pieces = pieces + self.end("length").pieces
        says = self.reply is not None and self.reply.says(token)
        return Event(self, token, self.mask[-1], logprob, pieces, says)

    def end(self, reason: str, logprob: Logprob | None = None) -> "Event":
        """End without another token."""
        self.stop_reason = reason
        pieces = self.reply.flush() if self.reply else []
        return Event(self, None, self.mask[-1] if self.mask else 0, logprob, pieces)

    def fail(self, error: Exception) -> "Event":
        """End with the error, which `result` raises."""
        self.stop_reason, self.error = "error", error
        return Event(self, None)

    def result(self) -> "Sequence":
        """The ended sequence. Raises the error with which it ended."""
        if self.error is not None:
            raise self.error
        if self.stop_reason is None:
            raise ValueError("this sequence has not ended yet")
        return self

    def _follow_call(self, token: int) -> None:
        """<|python_start|> expression <|python_end|> forces <|output_start|> result <|output_end|>.

        A second start begins a new expression, an end without a start has no effect, and an
        expression that the calculator refuses gets no output.
        """
        markup = self.markup
        if token == markup.python_start:
            self.call = len(self.tokens)
        elif token == markup.python_end and self.call is not None:
            result = use_calculator(markup.tokenizer.decode(self.tokens[self.call : -1]))
            self.call = None
            if result is not None:
                output = markup.tokenizer.encode(result)
                self.forced.extend((markup.output_start, *output, markup.output_end))


class Event(NamedTuple):
    """A sequence got a token, or (token None) ended without one; see its stop_reason."""

    sequence: Sequence
    token: int | None
    # 0 for tool output: a "python_output" piece of mask 1 was made up by the model
    mask: int = 0
    # if requested, also of the stop token in an event without a token
    logprob: Logprob | None = None
    pieces: list[tuple[str, str]] = []  # (type of part, text) that became certain, if requested
    says: bool = False  # the token belongs to the text, not to a tool call or its markup
