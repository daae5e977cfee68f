"""The chat page and its API: nanochat's event stream, and the page's markdown as HTML."""

import base64
import hashlib
import html
import json
import time
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Discriminator, Field, StrictBool, Tag

from zangchat.engine.replies import Reply
from zangchat.server.guard import MAX_BODY
from zangchat.server.http import EventStream, Incoming
from zangchat.server.messages import MAX_MESSAGES, Messages, Text
from zangchat.server.openai_api import JSON_OR_EVENTS, open_stream, openai_chat
from zangchat.server.openai_requests import OpenAIChat
from zangchat.server.pool import PoolError, Stream, Token
from zangchat.server.protocol import Sampling, Settings, event, join_pieces
from zangchat.server.rendering import render_markdown, render_parts
from zangchat.server.service import CurrentService

RENDER_SECONDS = 0.1  # at least, between two renderings of a reply
RENDER_SHARE = 0.2  # of a core, at most, for the renderings of all replies together
MAX_TEXT, MAX_TEXTS = 16_384, 64  # characters of a saved reply, replies of one request
TEXTS_SECONDS = 0.5  # for the replies of one request; the page requests the others again
FILES = resources.files("zangchat.server")
SCRIPTS = ("strings", "store", "draw", "talk", "page")  # of ui/, in the order of their definitions

router = APIRouter()


class PageChat(Sampling):
    """nanochat's chat request.

    `render` requests HTML with the stream, `truncate` drops the oldest turns that do not fit.
    """

    messages: Messages
    render: StrictBool = False
    truncate: StrictBool | None = None


def _whose(body: Any) -> str:
    """The format of a body without an address of its own: OpenAI's if a field is not nanochat's."""
    foreign = isinstance(body, dict) and body.keys() - PageChat.model_fields.keys()
    return "[openai]" if foreign else "[page]"


def _as_any_of(schema: dict[str, Any]) -> None:
    schema["anyOf"] = schema.pop("oneOf")  # a body of the page's fields has both formats


AnyChat = Annotated[
    Annotated[PageChat, Tag("[page]")] | Annotated[OpenAIChat, Tag("[openai]")],
    Discriminator(_whose),
    Field(json_schema_extra=_as_any_of),
]


class PageTexts(BaseModel):
    """Markdown of saved replies."""

    texts: list[Annotated[Text, Field(max_length=MAX_TEXT)]] = Field(max_length=MAX_TEXTS)


class PageHtml(BaseModel):
    """HTML of the first texts: of those that were rendered in time."""

    html: list[str]


# -- routes ----------------------------------------------------------------------------------------


@router.get("/", include_in_schema=False)
async def index(service: CurrentService) -> Response:
    return HTMLResponse(service.page, headers={"Cache-Control": "no-store"})


@router.get("/logo.svg", include_in_schema=False)
async def logo() -> Response:
    return Response(FILES.joinpath("logo.svg").read_bytes(), media_type="image/svg+xml")


@router.post("/chat/completions", responses=JSON_OR_EVENTS)
async def page_chat(body: AnyChat, service: CurrentService, receive: Incoming) -> Response:
    """nanochat's events, or OpenAI's answer to a request with one of OpenAI's fields."""
    if isinstance(body, OpenAIChat):
        return await openai_chat(body, service, receive)
    prompt, left_out = await run_in_threadpool(
        service.prompter.chat, body.messages, body.max_tokens, body.truncate
    )
    stream = open_stream(service, body.requests(prompt, 1, service.settings))
    rendering = service.rendering if body.render else None
    return EventStream(stream, page_events(stream, rendering, left_out))


@router.post("/render")
async def render(body: PageTexts, service: CurrentService) -> PageHtml:
    limiter = service.rendering
    return PageHtml(
        html=await anyio.to_thread.run_sync(render_in_time, body.texts, limiter=limiter)
    )


def render_in_time(texts: list[str]) -> list[str]:
    """HTML of the first text and of as many others as TEXTS_SECONDS allow."""
    rendered: list[str] = []
    end = time.monotonic() + TEXTS_SECONDS
    while len(rendered) < len(texts) and (not rendered or time.monotonic() < end):
        rendered.append(render_markdown(texts[len(rendered)]))
    return rendered


def load_page(settings: Settings, context: int) -> tuple[str, str]:
    """(HTML of the chat page, content security policy that admits only its script and style).

    The page is one document: it needs no paths of its own, so a proxy may serve it under any.
    """
    ui = FILES.joinpath("ui")
    style = ui.joinpath("style.css").read_text(encoding="utf-8")
    scripts = [ui.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    script = "\n".join(['"use strict";', *scripts])
    facts = {
        "model": settings.model_name,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "context": context,
        "needs_key": settings.api_key is not None,
        "max_messages": MAX_MESSAGES,
        "max_body": MAX_BODY,
    }
    page = ui.joinpath("index.html").read_text(encoding="utf-8")
    page = page.replace("{{facts}}", html.escape(json.dumps(facts), quote=True))
    page = page.replace("{{style}}", style).replace("{{script}}", script)
    policy = (
        f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; "
        "img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def digest(content: str) -> str:
    """The source expression that admits an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# -- events ----------------------------------------------------------------------------------------


async def page_events(
    stream: Stream, rendering: anyio.CapacityLimiter | None, left_out: int
) -> AsyncIterator[bytes]:
    """nanochat's events {"token", "gpu"} ... {"done": true}.

    Pieces of tool calls are {"tool", "text"}; {"queued"} counts the continuations ahead. With
    `rendering`, the reply so far comes as {"parts"} instead, at most ten times a second and less
    often if rendering is slow or many replies are rendered, with {"tokens", "tokens_per_second"}.
    """
    gpu, reply = stream.worker.number, Reply()
    next_render, stop_reason = 0.0, ""
    pace = Pace()
    if left_out:
        yield event({"left_out": left_out})
    if stream.before:
        yield event({"queued": stream.before})
    try:
        async for items in stream:
            pace.add(sum(item.token is not None for item in items))
            pieces = join_pieces(piece for item in items for piece in grow(reply, item))
            stop_reason = items[-1].stop_reason or ""
            if rendering is None:
                for kind, text in pieces:
                    shown = {"token": text} if kind == "text" else {"tool": kind, "text": text}
                    yield event({**shown, "gpu": gpu})
            elif stop_reason or time.monotonic() >= next_render:
                parts, seconds = await anyio.to_thread.run_sync(
                    timed_render, reply.parts, limiter=rendering
                )
                pause = max(RENDER_SECONDS, seconds * stream.pool.load / RENDER_SHARE)
                next_render = time.monotonic() + pause
                yield event({"parts": parts, "gpu": gpu, **pace.figures()})
        figures = {} if rendering is None else pace.figures()
        yield event({"done": True, "finish_reason": stop_reason, **figures})
    except PoolError as error:
        yield event({"error": str(error), "done": True})


def grow(reply: Reply, item: Token) -> list[tuple[str, str]]:
    """The pieces of a token. A tool's output that the model made up gets {"by": "model"}."""
    pieces = reply.add(item.pieces)
    if item.mask and any(kind == "python_output" for kind, _ in pieces):
        reply.parts[-1]["by"] = "model"
    return pieces


def timed_render(parts: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], float]:
    """(rendered parts, seconds of processor time)."""
    start = time.thread_time()
    return render_parts(parts), time.thread_time() - start


class Pace:
    """How many tokens of a reply have come, and how fast since the first of them."""

    def __init__(self) -> None:
        self.tokens = self._first = 0
        self._start = self._last = 0.0

    def add(self, tokens: int) -> None:
        self._last = time.monotonic()
        if not self.tokens:
            self._start, self._first = self._last, tokens
        self.tokens += tokens

    def figures(self) -> dict[str, Any]:
        seconds, later = self._last - self._start, self.tokens - self._first
        rate = {"tokens_per_second": round(later / seconds, 1)} if later and seconds else {}
        return {"tokens": self.tokens, **rate}
