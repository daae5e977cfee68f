"""A request and its state: the tokens so far, and the effect of the next one. No model, no
tensors.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from zangchat.engine.replies import Markup, ReplyDecoder
from zangchat.engine.sampling import Logprob, Request
from zangchat.engine.tools import use_calculator


@dataclass
class Result:
    """The new tokens of a request, without the token that ended it."""

    tokens: list[int]
    mask: list[int]  # 1 for a token that the model chose, 0 for tool output
    stop_reason: str
    """Why it ended: "stop" (end of turn or stop string), "length" (max_tokens or the context) or
    "cancelled".
    """
    # if requested: per token, then of stop_token
    logprobs: list[Logprob] = field(default_factory=list)
    # if requested: all but the first token's
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    stop_token: int | None = None  # the special token that ended it


@dataclass(eq=False)
class Sequence:
    """A request in a running batch."""

    request: Request
    limit: int  # new tokens at most
    markup: Markup
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    stop_reason: str | None = None  # None while waiting or running
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    stop_token: int | None = None
    drawn: int = 0  # tokens drawn so far, including one that the host has not read yet
    forced: deque[int] = field(default_factory=deque)  # tool output still to be inserted
    call: list[int] | None = None  # tokens of the tool call being written, None outside of one
    reply: ReplyDecoder | None = None  # finds the stop strings

    def __post_init__(self) -> None:
        if self.request.stop:
            self.reply = ReplyDecoder(self.markup.tokenizer, self.request.stop)

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
            self.stop_reason, self.stop_token = "stop", token
            return Event(self, None, 0, logprob)
        else:
            self._follow_call(token)
        self.tokens.append(token)
        self.mask.append(0 if forced else 1)
        if self.reply is not None:
            self.reply.feed(token)
        if self.reply is not None and self.reply.stopped:
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.stop_reason = "length"
        return Event(self, token, self.mask[-1], logprob)

    def end(self, reason: str) -> "Event":
        """End without another token."""
        self.stop_reason = reason
        return Event(self, None)

    def result(self) -> Result:
        if self.stop_reason is None:
            raise ValueError("this sequence has not ended yet")
        return Result(
            self.tokens,
            self.mask,
            self.stop_reason,
            self.logprobs,
            self.prompt_logprobs,
            self.stop_token,
        )

    def _follow_call(self, token: int) -> None:
        """<|python_start|> expression <|python_end|> forces <|output_start|> result <|output_end|>.

        A second start begins a new expression, an end without a start has no effect, and an
        expression that the calculator refuses gets no output.
        """
        markup = self.markup
        if token == markup.python_start:
            self.call = []
        elif self.call is None:
            return
        elif token != markup.python_end:
            self.call.append(token)
        else:
            result = use_calculator(markup.tokenizer.decode(self.call))
            self.call = None
            if result is not None:
                self.forced += [
                    markup.output_start,
                    *markup.tokenizer.encode(result),
                    markup.output_end,
                ]


class Event(NamedTuple):
    """A sequence got a token, or (token None) ended without one; its stop_reason tells whether it
    ended.
    """

    sequence: Sequence
    token: int | None
    mask: int = 0
    # if requested, also of the stop token in an event without a token
    logprob: Logprob | None = None
