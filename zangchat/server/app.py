"""The application: the chat page, nanochat's event stream and OpenAI's API over one worker pool.

The content of conversations is never logged.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from zangchat.engine import Engine
from zangchat.server import monitoring, openai_api, page_api
from zangchat.server.guard import add_guard
from zangchat.server.http import ERROR_HANDLERS
from zangchat.server.pool import Pool
from zangchat.server.protocol import ErrorBody, Settings
from zangchat.server.service import Prompter, Service

ERROR_FORMAT: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody},
    "5XX": {"model": ErrorBody},
}


def create_app(engines: Sequence[Engine], settings: Settings | None = None) -> FastAPI:
    """The application over one engine per device. Its lifespan runs the workers."""
    settings = settings or Settings()
    tokenizer, context = engines[0].tokenizer, engines[0].model.config.sequence_len
    page, page_policy = page_api.load_page(settings, context)
    pool = Pool(engines, settings.max_batch, settings.queue, settings.request_seconds)
    prompter = Prompter(tokenizer, context, settings)
    app = FastAPI(
        title="zangchat",
        lifespan=run_pool,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the guard has removed them
        responses=ERROR_FORMAT,
        exception_handlers=ERROR_HANDLERS,
    )
    app.state.service = Service(settings, tokenizer, context, pool, prompter, page)
    add_guard(app, settings, page_policy)
    app.include_router(page_api.router)  # its /chat/completions takes OpenAI's requests as well
    app.include_router(monitoring.router)
    app.include_router(openai_api.router, prefix="/v1")
    app.include_router(openai_api.router, include_in_schema=False)
    return app


@asynccontextmanager
async def run_pool(app: FastAPI) -> AsyncIterator[None]:
    pool = app.state.service.pool
    pool.start()
    try:
        yield
    finally:
        await run_in_threadpool(pool.stop)
