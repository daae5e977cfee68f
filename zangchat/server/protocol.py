"""The part of the protocol that both APIs share: settings, errors, messages, sampling, events.

A request's body is checked completely before any work is done for it.
"""

import itertools
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictFloat, StrictInt

from zangchat.config import USER_LIMITS
from zangchat.engine import Request

MAX_MESSAGES = 500
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
ROLES = {"developer": "system"}  # the newer name of the same role
LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class Settings:
    """The operator's choices. A request that names no sampling parameters gets these."""

    model_name: str = "zangchat"
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 512
    max_batch: int = 64  # rows of each running batch
    queue: int = 64  # requests that may wait, all devices together
    request_seconds: float = 300.0  # wall-clock limit of one request, waiting included
    api_key: str | None = None
    hosts: frozenset[str] | None = frozenset(LOCAL_HOSTS)  # accepted Host headers; None: any


# -- errors ----------------------------------------------------------------------------------------


class ApiError(Exception):
    """A refused request, with the reason for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.param = status, code, headers, param

    def response(self) -> JSONResponse:
        kind = "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):  # the format of ApiError.response, for the API's description
    error: ErrorDetail


# -- messages --------------------------------------------------------------------------------------


def check_surrogates(text: str) -> str:
    """Raises ValueError for lone surrogates, which JSON can express and UTF-8 cannot."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is not a character")
    return text


Text = Annotated[str, AfterValidator(check_surrogates)]


class Part(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: Text


Role = Annotated[
    Literal["system", "developer", "user", "assistant"],
    AfterValidator(lambda role: ROLES.get(role, role)),
]


class ChatMessage(BaseModel):
    role: Role
    content: Text | list[Part]

    def plain(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if part.type == "text")

    def for_tokenizer(self) -> dict[str, Any]:
        """The message as `render_conversation` takes it; only the assistant's has parts."""
        if self.role == "assistant" and not isinstance(self.content, str):
            return {"role": self.role, "content": [part.model_dump() for part in self.content]}
        return {"role": self.role, "content": self.plain()}


# -- sampling --------------------------------------------------------------------------------------

StopText = Annotated[
    str, AfterValidator(check_surrogates), Field(min_length=1, max_length=MAX_STOP_LENGTH)
]


def limited(name: str) -> Any:
    """The optional field of a sampling parameter, with its limits."""
    limits = USER_LIMITS[name]
    if limits.above:
        return Field(None, gt=limits.least, le=limits.most)
    return Field(None, ge=limits.least, le=limits.most)


class Sampling(BaseModel):
    """Sampling parameters. Strict: JSON's `true` and "1" are not the number 1."""

    model_config = ConfigDict(allow_inf_nan=False)

    temperature: StrictFloat | None = limited("temperature")
    top_k: StrictInt | None = limited("top_k")
    top_p: StrictFloat | None = limited("top_p")
    min_p: StrictFloat | None = limited("min_p")
    repetition_penalty: StrictFloat | None = limited("repetition_penalty")
    max_tokens: StrictInt | None = limited("max_tokens")
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**64)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None

    def requests(self, prompt: list[int], n: int, settings: Settings, **more: Any) -> list[Request]:
        """`n` continuations of one prompt; `more` are further fields of `Request`."""
        fields: dict[str, Any] = {
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "seed": secrets.randbits(32) if self.seed is None else self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        }
        for name in ("max_tokens", "temperature", "top_k", "top_p"):
            requested = getattr(self, name)
            fields[name] = getattr(settings, name) if requested is None else requested
        return [Request(prompt, **{**fields, **more}, sample_index=i) for i in range(n)]


# -- streams ---------------------------------------------------------------------------------------

_as_json = json.JSONEncoder(ensure_ascii=False).encode


def event(value: Any) -> bytes:
    """A server-sent event."""
    return f"data: {_as_json(value)}\n\n".encode()


def join_pieces(pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(kind, text) pieces with neighbours of one kind joined."""
    groups = itertools.groupby(pieces, key=lambda piece: piece[0])
    return [(kind, "".join(text for _, text in group)) for kind, group in groups]
