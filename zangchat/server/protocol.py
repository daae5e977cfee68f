"""The part of the protocol that both APIs share: settings, errors, sampling, events.

A request's body is checked completely before any work is done for it.
"""

import itertools
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi.responses import JSONResponse
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    model_validator,
)

from zangchat.config import USER_LIMITS
from zangchat.engine import Request
from zangchat.server.exposure import LOCAL_HOSTS
from zangchat.server.messages import check_surrogates

MAX_STOPS, MAX_STOP_LENGTH = 16, 256


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
    truncate: bool = False  # drop the oldest turns of a chat that does not fit, unasked
    hosts: frozenset[str] | None = frozenset(LOCAL_HOSTS)  # accepted Host headers; None: any
    origins: frozenset[str] = frozenset()  # pages of other sites that may send requests; *: any
    root_path: str = ""  # the path of this server, if a proxy does not remove it


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

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):  # the format of ApiError.response, for the API's description
    error: ErrorDetail


# -- sampling --------------------------------------------------------------------------------------

# Other servers' spellings of our values: -1 is off, at random, or as many as the context holds.
MEANINGS: dict[str, dict[float, Any]] = {
    "top_k": {-1: 0},
    "top_p": {0: 1e-9},  # only the likeliest token
    "seed": {-1: None},
    "max_tokens": {-1: USER_LIMITS["max_tokens"].most},
    "max_completion_tokens": {-1: USER_LIMITS["max_tokens"].most},
}
OTHER_NAMES = {"repeat_penalty": "repetition_penalty", "n_predict": "max_tokens"}


def _whole(value: Any) -> Any:
    """A number like 5.0 as an integer: JSON does not tell them apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[StrictInt, BeforeValidator(_whole)]
StopText = Annotated[str, AfterValidator(check_surrogates), Field(max_length=MAX_STOP_LENGTH)]
StopTexts = Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)]


def limited(name: str) -> Any:
    """The optional field of a sampling parameter, with its limits."""
    limits = USER_LIMITS[name]
    if limits.above:
        return Field(None, gt=limits.least, le=limits.most)
    return Field(None, ge=limits.least, le=limits.most)


class Sampling(BaseModel):
    """Sampling parameters. Strict: JSON's `true` and "1" are not the number 1. null: not given."""

    model_config = ConfigDict(allow_inf_nan=False)

    temperature: StrictFloat | None = limited("temperature")
    top_k: Int | None = limited("top_k")
    top_p: StrictFloat | None = limited("top_p")
    min_p: StrictFloat | None = limited("min_p")
    repetition_penalty: StrictFloat | None = limited("repetition_penalty")
    max_tokens: Int | None = limited("max_tokens")
    seed: Int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: StopText | StopTexts | None = None  # empty ones stop nothing

    @model_validator(mode="before")
    @classmethod
    def _as_others_write_it(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields: dict[str, Any] = body
        known: dict[str, Any] = {}
        for sent, value in fields.items():
            name = OTHER_NAMES.get(sent, sent)
            if type(value) in (int, float):  # not a bool, which would equal 0 or 1
                value = MEANINGS.get(name, {}).get(value, value)
            if value is not None and (name == sent or name not in fields):
                known[name] = value
        return known

    def defaults(self, settings: Settings) -> dict[str, float]:
        """The values of the parameters that this request does not name."""
        return {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}

    def requests(self, prompt: list[int], n: int, settings: Settings, **more: Any) -> list[Request]:
        """`n` continuations of one prompt; `more` are further fields of `Request`."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        fields: dict[str, Any] = {
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "seed": secrets.randbits(32) if self.seed is None else self.seed,
            "stop": tuple(stop for stop in stops if stop),
        }
        defaults = {**self.defaults(settings), "max_tokens": settings.max_tokens}
        for name, default in defaults.items():
            requested = getattr(self, name)
            fields[name] = default if requested is None else requested
        return [Request(prompt, **{**fields, **more}, sample_index=i) for i in range(n)]


# -- streams ---------------------------------------------------------------------------------------

_as_json = json.JSONEncoder(ensure_ascii=False).encode


# JSON may hold these, but many clients end a line at them, as Python's str.splitlines does
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


def event(value: Any) -> bytes:
    """A server-sent event."""
    return f"data: {_as_json(value).translate(_LINE_ENDS)}\n\n".encode()


def join_pieces(pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(kind, text) pieces with neighbours of one kind joined."""
    groups = itertools.groupby(pieces, key=lambda piece: piece[0])
    return [(kind, "".join(text for _, text in group)) for kind, group in groups]
