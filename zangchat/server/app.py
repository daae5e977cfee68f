"""The application: the chat page, nanochat's event stream and OpenAI's API, all fed by the engine's running batch.

Request schemas are in protocol.py, the worker pool in pool.py, response formats in answers.py, request guards and HTTP in http.py.
Nothing of a conversation is logged.
"""

import base64
import hashlib
import html
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from zangchat.engine import Engine
from zangchat.engine.replies import ReplyDecoder
from zangchat.engine.sampling import Request as Continuation
from zangchat.server.answers import Answer, Choice, page_events
from zangchat.server.http import Guard, StreamResponse, error_handlers, unless_disconnected
from zangchat.server.pool import Pool, Worker
from zangchat.server.protocol import (
    MAX_CHOICES,
    ApiError,
    ErrorBody,
    OpenAIChat,
    OpenAICompletion,
    OpenAIRequest,
    PageChat,
    Prompter,
    Settings,
)


def load_page(settings: Settings, context: int) -> tuple[str, str]:
    """(HTML of the chat page, content security policy that admits exactly its own script and style)."""
    page = resources.files("zangchat.server").joinpath("ui.html").read_text(encoding="utf-8")

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in found)

    policy = (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; img-src 'self'; connect-src 'self'; "
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


def exposition(pool: Pool) -> str:
    """The pool's numbers in the text format of Prometheus, version 0.0.4."""
    lines = []

    def metric(kind: str, name: str, meaning: str, *values: tuple[str, float]) -> None:
        lines.extend([f"# HELP zangchat_{name} {meaning}", f"# TYPE zangchat_{name} {kind}"])
        lines.extend(
            f"zangchat_{name}{labels} {value:g}" if value < 1e6 else f"zangchat_{name}{labels} {value:.0f}" for labels, value in values
        )

    def per_worker(value: Callable[[Worker], float]) -> list[tuple[str, float]]:
        return [(f'{{gpu="{worker.number}"}}', value(worker)) for worker in pool.workers]

    metric("counter", "requests_total", "Requests taken on.", ("", pool.served))
    metric("counter", "refused_total", "Requests refused because the queue was full.", ("", pool.refused))
    metric("gauge", "in_hand", "Continuations taken on and not yet delivered.", ("", pool.load))
    metric("counter", "tokens_total", "Tokens generated.", *per_worker(lambda worker: worker.tokens))
    metric("gauge", "rows_running", "Rows of the running batch in use.", *per_worker(lambda worker: worker.rows))
    metric("gauge", "requests_waiting", "Continuations that wait for a row.", *per_worker(lambda worker: worker.waiting))
    return "\n".join(lines) + "\n"


def create_app(engine_list: Sequence[Engine], settings: Settings | None = None) -> FastAPI:
    """The application over one engine per device. Its worker threads live as long as its lifespan."""
    settings = settings or Settings()
    tokenizer, config = engine_list[0].tokenizer, engine_list[0].model.config
    pool, prompter = Pool(engine_list, settings), Prompter(tokenizer, config.sequence_len, settings)
    page, policy = load_page(settings, config.sequence_len)
    started = time.time()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pool.start()
        try:
            yield
        finally:
            await run_in_threadpool(pool.stop)

    refusals: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    either: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {}}, "description": "JSON, or events with stream=true"}
    }
    app = FastAPI(title="zangchat", lifespan=lifespan, docs_url=None, redoc_url=None, responses=refusals)
    app.state.pool = pool
    app.add_middleware(Guard, settings=settings, page_policy=policy)
    error_handlers(app)

    async def answer(body: OpenAIRequest, request: Request, answer: Answer, requests: list[Continuation]) -> Response:
        stream = pool.open(requests)
        if body.stream:
            return StreamResponse(stream, answer.chunks(stream, body.include_usage))
        try:
            whole = await unless_disconnected(request.receive, answer.whole(stream))
        finally:
            stream.close()
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    @app.get("/logo.svg", include_in_schema=False)
    async def logo() -> Response:
        return Response(resources.files("zangchat.server").joinpath("logo.svg").read_bytes(), media_type="image/svg+xml")

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok" if pool.healthy else "failed"}, 200 if pool.healthy else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return exposition(pool)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        workers = [{"gpu": w.number, "running": w.rows, "waiting": w.waiting, "tokens": w.tokens} for w in pool.workers]
        totals = {"in_hand": pool.load, "served": pool.served, "refused": pool.refused, "tokens": sum(w.tokens for w in pool.workers)}
        return {"model": settings.model_name, "uptime_seconds": round(time.time() - started), **totals, "workers": workers}

    @app.post("/chat/completions", responses={200: {"content": {"text/event-stream": {}}}}, response_class=Response)
    async def page_chat(body: PageChat) -> Response:
        prompt, left_out = await run_in_threadpool(prompter.chat, body.messages, body.max_tokens, body.truncate)
        stream = pool.open(body.requests(prompt, 1, settings))
        decoder = ReplyDecoder(tokenizer, stream.requests[0].stop)
        return StreamResponse(stream, page_events(stream, decoder, body.render, left_out))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await one_model(settings.model_name)]}

    @app.get("/v1/models/{name}", responses={404: {"model": ErrorBody}})
    async def one_model(name: str) -> dict[str, Any]:
        settings.check_model(name)
        facts = {"created": int(started), "owned_by": "zangchat", "context_length": config.sequence_len}
        return {"id": settings.model_name, "object": "model", **facts}

    @app.post("/v1/chat/completions", responses=either)
    async def openai_chat(body: OpenAIChat, request: Request) -> Response:
        body.check(settings)
        prompt, _ = await run_in_threadpool(prompter.chat, body.messages, body.limit, body.truncate)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        requests = body.requests(prompt, body.n, settings, logprobs=logprobs, max_tokens=body.limit or settings.max_tokens)
        choices = [Choice(tokenizer, one, is_chat=True) for one in requests]
        return await answer(body, request, Answer("chat.completion", settings.model_name, choices, len(prompt)), requests)

    @app.post("/v1/completions", responses=either)
    async def openai_completion(body: OpenAICompletion, request: Request) -> Response:
        body.check(settings)
        given = body.prompts()
        if len(given) * body.n > MAX_CHOICES:
            raise ApiError(400, f"{len(given)} prompts x n={body.n} are more than the {MAX_CHOICES} continuations of one request")
        prompts = await run_in_threadpool(lambda: [prompter.completion(prompt, body.max_tokens) for prompt in given])
        more = {"logprobs": body.logprobs, "prompt_logprobs": body.echo and body.logprobs is not None}
        requests, choices = [], []
        for asked, prompt in zip(given, prompts, strict=True):
            echo = None if not body.echo else asked if isinstance(asked, str) else tokenizer.decode(asked)
            for one in body.requests(prompt, body.n, settings, **more):
                requests.append(one)
                choices.append(Choice(tokenizer, one, is_chat=False, echo=echo, skipped=int(isinstance(asked, str))))
        return await answer(body, request, Answer("text_completion", settings.model_name, choices, sum(map(len, prompts))), requests)

    return app
