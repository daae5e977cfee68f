"""The routes of OpenAI's API. app.py includes them twice: clients add /v1 to their base URL or
not.
"""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.types import Receive

from zangchat.engine import Request
from zangchat.server.http import EventStream, Incoming, unless_disconnected
from zangchat.server.openai_answers import Answer, Choice
from zangchat.server.openai_requests import OpenAIChat, OpenAICompletion, OpenAIRequest
from zangchat.server.pool import Stream
from zangchat.server.protocol import ApiError, ErrorBody
from zangchat.server.service import CurrentService, Service

JSON_OR_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {}},
        "description": "JSON, or events with stream=true",
    }
}

router = APIRouter()


@router.get("/models")
async def models(service: CurrentService) -> dict[str, Any]:
    return {"object": "list", "data": [describe_model(service)]}


@router.get("/models/{name:path}", responses={404: {"model": ErrorBody}})
async def one_model(name: str, service: CurrentService) -> dict[str, Any]:
    ours = service.settings.model_name
    if name not in ("zangchat", ours):
        message = f"there is no model {name[:100]!r} here; this server has {ours!r}"
        raise ApiError(404, message, "model_not_found", param="model")
    return describe_model(service)


def describe_model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "zangchat",
        "context_length": service.context,
        "max_model_len": service.context,  # vLLM's name for it, which clients read
    }


@router.post("/chat/completions", responses=JSON_OR_EVENTS)
async def openai_chat(body: OpenAIChat, service: CurrentService, receive: Incoming) -> Response:
    settings = service.settings
    body.check()
    prompt, left_out = await run_in_threadpool(
        service.prompter.chat, body.messages, body.limit, body.truncate
    )
    more = {
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "max_tokens": body.limit or settings.max_tokens,
    }
    requests = body.requests(prompt, body.n, settings, **more)
    choices = [Choice(service.tokenizer, request, is_chat=True) for request in requests]
    answer = Answer("chat.completion", settings.model_name, choices, len(prompt), left_out)
    return await respond(service, receive, body, answer)


@router.post("/completions", responses=JSON_OR_EVENTS)
async def openai_completion(
    body: OpenAICompletion, service: CurrentService, receive: Incoming
) -> Response:
    settings, tokenizer = service.settings, service.tokenizer
    body.check()
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
    stream = open_stream(service, [choice.request for choice in answer.choices])
    if body.stream:
        return EventStream(stream, answer.chunks(stream, body.include_usage))
    try:
        content = await unless_disconnected(receive, answer.whole(stream))
    finally:
        stream.close()
    return Response(status_code=499) if content is None else JSONResponse(content)


def open_stream(service: Service, requests: list[Request]) -> Stream:
    """Give requests to the pool. Raises ApiError if there are more than it can ever hold."""
    settings = service.settings
    most = settings.max_batch * len(service.pool.workers) + settings.queue
    if len(requests) > most:
        message = f"{len(requests)} continuations are more than the {most} that this server holds"
        raise ApiError(400, f"{message} at once: lower n", "invalid_request", param="n")
    return service.pool.open(requests)
