"""What clients may ask: the bodies of requests, checked whole before any work is done for them, and the refusals.

nanochat's chat request, and OpenAI's chat and completion requests with the parameters that mean something here.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from zangchat.config import MAX_LOGPROBS
from zangchat.engine.replies import REPLY_SHARE, fit_conversation
from zangchat.engine.sampling import Request as Continuation
from zangchat.tokenizer import turns

MAX_MESSAGES = 500
MAX_CHOICES = 64  # continuations that one request may ask for
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
ROLES = {"developer": "system"}  # by the name that newer clients give it
LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class Settings:
    """What the operator chose; the sampling settings hold where a request names none."""

    model_name: str = "zangchat"
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 512
    max_batch: int = 64  # rows of each running batch
    queue: int = 64  # requests that may wait, all devices together
    request_seconds: float = 300.0  # wall-clock limit of one request, waiting included
    api_key: str | None = None
    hosts: frozenset[str] | None = frozenset(LOCAL_HOSTS)  # names under which the server may be addressed; None: any

    def check_model(self, name: str) -> None:
        """Raises ApiError for the name of another model."""
        if name not in ("zangchat", self.model_name):
            raise ApiError(404, f"there is no model {name!r} here; this server has {self.model_name!r}", "model_not_found", param="model")


class ApiError(Exception):
    """A request that is refused, with the reason for the client."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.param = status, code, headers, param

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


# ---- requests -------------------------------------------------------------------------------------------------------


def whole_characters(text: str) -> str:
    """Raises ValueError for lone surrogates, which JSON can spell and UTF-8 cannot."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is not a character")
    return text


Text = Annotated[str, AfterValidator(whole_characters)]


class Part(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: Text


class ChatMessage(BaseModel):
    role: Annotated[Literal["system", "developer", "user", "assistant"], AfterValidator(lambda role: ROLES.get(role, role))]
    content: Text | list[Part]

    def plain(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content if part.type == "text")

    def for_tokenizer(self) -> dict[str, Any]:
        structured = self.role == "assistant" and not isinstance(self.content, str)
        return {"role": self.role, "content": [part.model_dump() for part in self.content] if structured else self.plain()}  # type: ignore[union-attr]


StopText = Annotated[str, AfterValidator(whole_characters), Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Sampling(BaseModel):
    """Strict: JSON's `true` and "1" are not the number 1."""

    temperature: StrictFloat | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_k: StrictInt | None = Field(None, ge=0, le=1_000_000)
    top_p: StrictFloat | None = Field(None, gt=0, le=1)
    min_p: StrictFloat | None = Field(None, ge=0, le=1)
    repetition_penalty: StrictFloat | None = Field(None, gt=0, le=100, allow_inf_nan=False)
    max_tokens: StrictInt | None = Field(None, ge=1, le=1_000_000)
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**64)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None

    def requests(self, prompt: list[int], n: int, settings: Settings, **more: Any) -> list[Continuation]:
        """`n` continuations of one prompt; `more` are further fields of theirs."""
        fields: dict[str, Any] = {
            "max_tokens": settings.max_tokens if self.max_tokens is None else self.max_tokens,
            "temperature": settings.temperature if self.temperature is None else self.temperature,
            "top_k": settings.top_k if self.top_k is None else self.top_k,
            "top_p": settings.top_p if self.top_p is None else self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "seed": secrets.randbits(32) if self.seed is None else self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        }
        return [Continuation(prompt, **{**fields, **more}, sample_index=i) for i in range(n)]


class PageChat(Sampling):
    """nanochat's chat request; `render` asks for HTML along the stream, `truncate` drops the oldest turns that do not fit."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    render: StrictBool = False
    truncate: StrictBool = False


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


# Parameters of OpenAI's API that change nothing here: they are about OpenAI's accounts, caches and service.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "stream_obfuscation"),
}
# Those that would change the answer are refused, unless they have the value that means "off".
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
        """Raises ApiError for another model, and for parameters that would silently change nothing."""
        if self.model is not None:
            settings.check_model(self.model)
        more = {name: value for name, value in (self.model_extra or {}).items() if name not in IGNORED and value is not None}
        unsupported = [name for name, value in more.items() if value not in OFF.get(name, ())]
        if unsupported:
            message = f"this server does not support {', '.join(unsupported)[:200]}"
            raise ApiError(400, message, "unsupported_parameter", param=unsupported[0][:100])


class OpenAIChat(OpenAIRequest):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=1_000_000)
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncate: StrictBool = False

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", "invalid_request", param="top_logprobs")


class OpenAICompletion(OpenAIRequest):
    prompt: Text | list[Text] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: StrictInt | None = Field(16, ge=0, le=1_000_000)
    echo: StrictBool = False
    logprobs: StrictInt | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


# ---- prompts --------------------------------------------------------------------------------------------------------


class Prompter:
    """Checked messages -> prompt tokens that fit the model. Pure, so that it may run in any thread."""

    def __init__(self, tokenizer: Any, context: int, settings: Settings) -> None:
        self.tokenizer, self.context, self.settings = tokenizer, context, settings

    def chat(self, messages: list[ChatMessage], max_tokens: int | None, truncate: bool) -> tuple[list[int], int]:
        """(prompt, messages left out). Raises ApiError for an impossible order of roles and for a chat that is too long."""
        given = [message.for_tokenizer() for message in messages]
        check_roles(given)
        reply = min(max_tokens or self.settings.max_tokens, self.context // REPLY_SHARE)
        room = self.context - max(1, reply) if truncate else 1 << 62
        prompt, left_out = fit_conversation(self.tokenizer, given, room)
        self._check_length(prompt, "shorten it or start a new chat" if truncate else "shorten it, or set truncate to drop the oldest turns")
        return prompt, left_out

    def completion(self, prompt: str | list[int], limit: int | None) -> list[int]:
        """A text behind <|bos|>, or tokens as they are. With limit 0, nothing to generate, the prompt may fill the context."""
        bos, vocab_size = self.tokenizer.get_bos_token_id(), self.tokenizer.get_vocab_size()
        tokens = [bos, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        if not tokens or not all(0 <= token < vocab_size for token in tokens):
            raise ApiError(400, f"a prompt of tokens needs at least one, each between 0 and {vocab_size - 1}")
        self._check_length(tokens, "shorten it", 0 if limit == 0 else 1)
        return tokens

    def _check_length(self, prompt: list[int], remedy: str, reply: int = 1) -> None:
        over = len(prompt) - (self.context - reply)
        if over > 0:
            message = f"the prompt has {len(prompt)} tokens, {over} more than the context of {self.context} leaves room for: {remedy}"
            raise ApiError(400, message, "context_length_exceeded")


def check_roles(messages: Sequence[dict[str, Any]]) -> None:
    """An optional system message, then user and assistant in turn, the user last. Raises ApiError saying which message is wrong."""
    for index, message in enumerate(messages):
        if message["role"] == "user" and not message["content"].strip():
            raise ApiError(400, f"message {index}, of the user, is empty", "empty_message")
    try:
        *_, (role, _, _) = turns({"messages": messages})
    except ValueError as error:
        raise ApiError(400, f"{error}: after an optional system message, user and assistant take turns", "role_order") from None
    if role != "user":
        raise ApiError(400, "the last message must be of role 'user': it is what the model answers", "role_order")
