"""OpenAI's API: chat and completion requests with the parameters that are supported here."""

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt
from starlette.types import Receive

from zangchat.config import USER_LIMITS
from zangchat.engine import Request, Sequence
from zangchat.engine.replies import Reply, StreamDecoder
from zangchat.engine.sampling import Logprob
from zangchat.server.http import EventStream, Incoming, from_pool, unless_disconnected
from zangchat.server.pool import PoolError, Stream, Token
from zangchat.server.protocol import (
    MAX_MESSAGES,
    ApiError,
    ChatMessage,
    ErrorBody,
    Sampling,
    Settings,
    Text,
    event,
    join_pieces,
    limited,
)
from zangchat.server.service import CurrentService, Service

MAX_CHOICES = 64  # continuations that one request may ask for

# Parameters about OpenAI's accounts, caches and service, which change nothing here.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "stream_obfuscation"),
}
# Parameters that would change the answer are refused, unless they have a value that means "off".
OFF: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}

router = APIRouter(prefix="/v1")


# -- requests --------------------------------------------------------------------------------------


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class OpenAIRequest(Sampling):
    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: StrictInt = Field(1, ge=1, le=MAX_CHOICES)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, settings: Settings) -> None:
        """Raises ApiError for another model and for parameters that would have no effect."""
        if self.model is not None:
            check_model(self.model, settings)
        unsupported = [
            name
            for name, value in (self.model_extra or {}).items()
            if name not in IGNORED and value is not None and value not in OFF.get(name, ())
        ]
        if unsupported:
            message = f"this server does not support {', '.join(unsupported)[:200]}"
            raise ApiError(400, message, "unsupported_parameter", param=unsupported[0][:100])


class OpenAIChat(OpenAIRequest):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: StrictInt | None = limited("max_tokens")
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = limited("logprobs")
    truncate: StrictBool = False

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs needs logprobs=true"
            raise ApiError(400, message, "invalid_request", param="top_logprobs")


class OpenAICompletion(OpenAIRequest):
    prompt: Text | list[Text] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: StrictInt | None = Field(16, ge=0, le=USER_LIMITS["max_tokens"].most)
    echo: StrictBool = False
    logprobs: StrictInt | None = limited("logprobs")

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def check(self, settings: Settings) -> None:
        super().check(settings)
        prompts = len(self.prompts())
        if prompts * self.n > MAX_CHOICES:
            limit = f"the {MAX_CHOICES} continuations of one request"
            raise ApiError(400, f"{prompts} prompts x n={self.n} are more than {limit}")


def check_model(name: str, settings: Settings) -> None:
    """Raises ApiError for the name of another model."""
    if name not in ("zangchat", settings.model_name):
        message = f"there is no model {name!r} here; this server has {settings.model_name!r}"
        raise ApiError(404, message, "model_not_found", param="model")


# -- one choice ------------------------------------------------------------------------------------


class Choice:
    """One continuation: its text, and its log-probabilities if they were requested."""

    def __init__(
        self,
        tokenizer: Any,
        request: Request,
        is_chat: bool,
        echo: str | None = None,
        skipped: int = 0,
    ) -> None:
        self.tokenizer, self.request, self.is_chat = tokenizer, request, is_chat
        self.reply = Reply()
        self.echo = echo  # the prompt's text, to be returned before the continuation's
        self.skipped = skipped  # leading prompt tokens that the client did not send: <|bos|>
        self.reason = ""
        self._length = len(echo or "")  # characters so far
        self._pending: list[tuple[int, int, Logprob | None]] = []  # token, offset, log-probability

    def feed(self, item: Token) -> list[tuple[str, str]]:
        """The (kind, text) pieces that a step adds."""
        pieces = self.reply.add(item.pieces)
        offset = self._length
        if item.stop_reason is not None:
            self.reason = "stop" if item.stop_reason == "stop" else "length"
        self._length += sum(len(text) for kind, text in pieces if kind == "text")
        token = item.token
        if token is None and not self.is_chat:  # OpenAI's chat format leaves the end token out
            token = item.stop_token
        if item.logprob is None or token is None:
            return pieces
        if not self.is_chat or item.says:
            self._pending.append((token, offset, item.logprob))
        return pieces

    def add_prompt(self, logprobs: Iterable[Logprob]) -> None:
        """Put the prompt's log-probabilities first; its very first token has none."""
        decoder, offset, prompt = StreamDecoder(self.tokenizer), 0, []
        scored = list(zip(self.request.tokens, [None, *logprobs], strict=True))
        for token, logprob in scored[self.skipped :]:
            prompt.append((token, offset, logprob))
            offset += len(decoder.feed(token))
        self._pending = prompt + self._pending

    def take_logprobs(self) -> dict[str, Any] | None:
        """Those added since the last call, in the format of chat or of completions.

        None if they were not requested.
        """
        pending, self._pending = self._pending, []
        if self.request.logprobs is None or (self.is_chat and not pending):
            return None
        if self.is_chat:
            content = [self._chat_entry(token, value) for token, _, value in pending if value]
            return {"content": content}
        return {
            "tokens": [token_text(self.tokenizer, token) for token, _, _ in pending],
            "token_logprobs": [logprob and logprob.value for _, _, logprob in pending],
            "top_logprobs": [value and self._top(token, value) for token, _, value in pending],
            "text_offset": [offset for _, offset, _ in pending],
        }

    def _chat_entry(self, token: int, logprob: Logprob) -> dict[str, Any]:
        top = [self._named(other, value) for other, value in logprob.top]
        return {**self._named(token, logprob.value), "top_logprobs": top}

    def _named(self, token: int, value: float) -> dict[str, Any]:
        text, data = token_text(self.tokenizer, token), self.tokenizer.decode_bytes([token])
        return {"token": text, "logprob": value, "bytes": list(data)}

    def _top(self, token: int, logprob: Logprob) -> dict[str, float]:
        """The likeliest tokens, and this one, which OpenAI adds if it is not among them."""
        found: dict[str, float] = {}
        for other, value in [*logprob.top, (token, logprob.value)]:
            found.setdefault(token_text(self.tokenizer, other), value)
        return found


def token_text(tokenizer: Any, token: int) -> str:
    """A token's text; if it is not whole characters, its bytes as OpenAI writes them."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


# -- responses -------------------------------------------------------------------------------------


@dataclass
class Answer:
    """A response under construction, whole or in chunks."""

    kind: Literal["chat.completion", "text_completion"]
    model: str
    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def feed(self, item: Token) -> list[tuple[str, str]]:
        self.completion_tokens += item.token is not None
        return self.choices[item.choice].feed(item)

    def envelope(
        self, choices: list[dict[str, Any]], chunk: bool = False, **more: Any
    ) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}",
            "object": f"{self.kind}.chunk" if chunk and self.is_chat else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    async def whole(self, stream: Stream) -> dict[str, Any]:
        async for items in stream:
            for item in items:
                self.feed(item)
        for choice, generation in zip(self.choices, stream.generations, strict=True):
            if generation.request.prompt_logprobs:
                choice.add_prompt(generation.prompt_logprobs)
        choices = [self._choice(index, choice) for index, choice in enumerate(self.choices)]
        return self.envelope(choices, usage=self.usage())

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs, text = choice.take_logprobs(), choice.reply.text()
        shown = {"index": index, "finish_reason": choice.reason, "logprobs": logprobs}
        if not self.is_chat:
            return {**shown, "text": (choice.echo or "") + text}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if any(part["type"] != "text" for part in choice.reply.parts):
            message["parts"] = choice.reply.parts  # tool calls, which OpenAI's format lacks
        return {**shown, "message": message}

    async def chunks(self, stream: Stream, include_usage: bool) -> AsyncIterator[bytes]:
        def choice_of(item: Token) -> int:
            return item.choice

        unopened = set(range(len(self.choices)))
        try:
            async for items in stream:
                for index, group in itertools.groupby(sorted(items, key=choice_of), key=choice_of):
                    if index in unopened:
                        unopened.remove(index)
                        for chunk in self._opening(index, stream.generations[index]):
                            yield chunk
                    for chunk in self._steps(index, list(group)):
                        yield chunk
            if include_usage:
                yield event(self.envelope([], chunk=True, usage=self.usage()))
        except PoolError as error:
            code = from_pool(error).code
            yield event({"error": {"message": str(error), "type": "server_error", "code": code}})
        yield b"data: [DONE]\n\n"

    def _opening(self, index: int, generation: Sequence) -> Iterable[bytes]:
        choice = self.choices[index]
        if self.is_chat:
            yield self._chunk(index, delta={"role": "assistant", "content": ""})
        elif choice.echo is not None:
            if generation.request.prompt_logprobs:
                choice.add_prompt(generation.prompt_logprobs)
            yield self._chunk(index, text=choice.echo)

    def _steps(self, index: int, items: list[Token]) -> Iterable[bytes]:
        for kind, text in join_pieces(piece for item in items for piece in self.feed(item)):
            if self.is_chat:
                tool = {} if kind == "text" else {"part": {"type": kind, "text": text}}
                yield self._chunk(index, delta={"content": text if kind == "text" else "", **tool})
            elif kind == "text":
                yield self._chunk(index, text=text)
        if items[-1].stop_reason is not None:
            end: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
            yield self._chunk(index, self.choices[index].reason, **end)

    def _chunk(self, index: int, reason: str | None = None, **body: Any) -> bytes:
        logprobs = self.choices[index].take_logprobs()
        choice = {"index": index, **body, "finish_reason": reason, "logprobs": logprobs}
        return event(self.envelope([choice], chunk=True))


# -- routes ----------------------------------------------------------------------------------------

JSON_OR_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {}},
        "description": "JSON, or events with stream=true",
    }
}


@router.get("/models")
async def models(service: CurrentService) -> dict[str, Any]:
    return {"object": "list", "data": [describe_model(service)]}


@router.get("/models/{name}", responses={404: {"model": ErrorBody}})
async def one_model(name: str, service: CurrentService) -> dict[str, Any]:
    check_model(name, service.settings)
    return describe_model(service)


def describe_model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "zangchat",
        "context_length": service.context,
    }


@router.post("/chat/completions", responses=JSON_OR_EVENTS)
async def openai_chat(body: OpenAIChat, service: CurrentService, receive: Incoming) -> Response:
    settings = service.settings
    body.check(settings)
    prompt, _ = await run_in_threadpool(
        service.prompter.chat, body.messages, body.limit, body.truncate
    )
    more = {
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "max_tokens": body.limit or settings.max_tokens,
    }
    requests = body.requests(prompt, body.n, settings, **more)
    choices = [Choice(service.tokenizer, request, is_chat=True) for request in requests]
    answer = Answer("chat.completion", settings.model_name, choices, len(prompt))
    return await respond(service, receive, body, answer)


@router.post("/completions", responses=JSON_OR_EVENTS)
async def openai_completion(
    body: OpenAICompletion, service: CurrentService, receive: Incoming
) -> Response:
    settings, tokenizer = service.settings, service.tokenizer
    body.check(settings)
    sent = body.prompts()
    prompts = await run_in_threadpool(
        lambda: [service.prompter.completion(prompt, body.max_tokens) for prompt in sent]
    )
    more = {
        "logprobs": body.logprobs,
        "prompt_logprobs": body.echo and body.logprobs is not None,
    }
    choices = []
    for original, prompt in zip(sent, prompts, strict=True):
        is_text = isinstance(original, str)
        echo = None
        if body.echo:
            echo = original if isinstance(original, str) else tokenizer.decode(original)
        choices += [
            Choice(tokenizer, request, is_chat=False, echo=echo, skipped=int(is_text))
            for request in body.requests(prompt, body.n, settings, **more)
        ]
    prompt_tokens = sum(map(len, prompts))
    answer = Answer("text_completion", settings.model_name, choices, prompt_tokens)
    return await respond(service, receive, body, answer)


async def respond(
    service: Service, receive: Receive, body: OpenAIRequest, answer: Answer
) -> Response:
    """Run the answer's requests; JSON, or events if the client asked for a stream."""
    stream = service.pool.open([choice.request for choice in answer.choices])
    if body.stream:
        return EventStream(stream, answer.chunks(stream, body.include_usage))
    try:
        content = await unless_disconnected(receive, answer.whole(stream))
    finally:
        stream.close()
    return Response(status_code=499) if content is None else JSONResponse(content)
