"""The chat page and its API: nanochat's event stream, with markdown rendered and cleaned here."""

import base64
import hashlib
import html
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Annotated, Any

import anyio
import nh3
from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from markdown_it import MarkdownIt
from pydantic import Discriminator, Field, StrictBool, Tag

from zangchat.engine.replies import Reply
from zangchat.server.http import EventStream, Incoming
from zangchat.server.messages import Messages
from zangchat.server.openai_api import JSON_OR_EVENTS, open_stream, openai_chat
from zangchat.server.openai_requests import OpenAIChat
from zangchat.server.pool import PoolError, Stream
from zangchat.server.protocol import Sampling, Settings, event, join_pieces
from zangchat.server.service import CurrentService

RENDER_SECONDS = 0.1  # at least, between two renderings of a reply
RENDER_SHARE = 0.2  # of a core, at most, for the renderings of all replies together
FILES = resources.files("zangchat.server")
TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "del", "a", "code", "pre", "blockquote"),
    *("ul", "ol", "li", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
_markdown = MarkdownIt("commonmark", {"html": False})
_markdown.enable(["table", "strikethrough"]).disable("image")

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


# -- routes ----------------------------------------------------------------------------------------


@router.get("/", include_in_schema=False)
async def index(service: CurrentService) -> Response:
    return HTMLResponse(service.page, headers={"Cache-Control": "no-store"})


@router.get("/logo.svg", include_in_schema=False)
async def logo() -> Response:
    return Response(FILES.joinpath("logo.svg").read_bytes(), media_type="image/svg+xml")


@router.post("/chat/completions", responses=JSON_OR_EVENTS, response_class=Response)
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


def load_page(settings: Settings, context: int) -> tuple[str, str]:
    """(HTML of the chat page, content security policy that admits only its script and style)."""
    page = FILES.joinpath("ui.html").read_text(encoding="utf-8")

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [hashlib.sha256(body.encode()).digest() for body in found]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)

    policy = (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    facts = {
        "model": settings.model_name,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "context": context,
        "needs_key": settings.api_key is not None,
    }
    return page.replace("{{facts}}", html.escape(json.dumps(facts), quote=True)), policy


# -- events ----------------------------------------------------------------------------------------


async def page_events(
    stream: Stream, rendering: anyio.CapacityLimiter | None, left_out: int
) -> AsyncIterator[bytes]:
    """nanochat's events {"token", "gpu"} ... {"done": true}.

    Pieces of tool calls are {"tool", "text"}; {"queued"} counts the continuations ahead. With
    `rendering`, the reply so far comes as {"parts"} instead, at most ten times a second and less
    often if rendering is slow or many replies are rendered.
    """
    gpu, reply = stream.worker.number, Reply()
    next_render, stop_reason = 0.0, ""
    if left_out:
        yield event({"left_out": left_out})
    if stream.before:
        yield event({"queued": stream.before})
    try:
        async for items in stream:
            pieces = join_pieces(piece for item in items for piece in reply.add(item.pieces))
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
                yield event({"parts": parts, "gpu": gpu})
        yield event({"done": True, "finish_reason": stop_reason})
    except PoolError as error:
        yield event({"error": str(error), "done": True})


def timed_render(parts: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], float]:
    """(rendered parts, seconds of processor time)."""
    start = time.thread_time()
    return render_parts(parts), time.thread_time() - start


def render_parts(parts: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [
        {**part, "html": render_markdown(part["text"])} if part["type"] == "text" else dict(part)
        for part in parts
    ]


def render_markdown(text: str) -> str:
    """Markdown -> HTML that is safe to insert.

    No raw HTML, no images, no schemes other than http(s) and mailto.
    """
    return nh3.clean(
        _markdown.render(text),
        tags=TAGS,
        attributes={"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},  # the chat stays open
    )
