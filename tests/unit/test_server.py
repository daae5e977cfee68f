"""The web server as its clients see it: a real uvicorn on a loopback port, httpx and OpenAI's own
client.
"""

import html
import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import hypothesis
import openai
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.talker import VOCAB, engine, eventually, serving
from zangchat.server import connections, guard
from zangchat.server import http as server_module
from zangchat.server.page_api import PageChat, load_page
from zangchat.server.protocol import Settings
from zangchat.server.rendering import render_markdown, render_parts

SEPARATORS = "\x85\u2028\u2029"


def reply(question: str) -> str:
    if "calculate" in question:
        # the model's #### gives way to the tool's output
        return "It is <|python_start|>6*7<|python_end|>####, so 42."
    if "special" in question:
        return f"You said {len(question)} characters."
    if "accents" in question:
        return "é 你好 🙂"
    if "lines" in question:
        return f"one{SEPARATORS}two"
    if "bold" in question:
        return "**bold** <script>alert(1)</script>"
    return f"Re: {question}"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Any]]:
    with serving(
        engine(reply), max_batch=4, queue=8, model_name="zangchat-test", temperature=0.0
    ) as served:
        yield served


@pytest.fixture(scope="module")
def url(server: tuple[str, Any]) -> str:
    return server[0]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of server-sent events; comments are left out."""
    return [
        json.loads(line[6:])
        for line in response.text.split("\n")
        if line.startswith("data: ") and line != "data: [DONE]"
    ]


# ---- nanochat's stream ---------------------------------------------------------------------------


def test_the_stream_has_nanochats_format(url: str) -> None:
    response = httpx.post(
        url + "/chat/completions",
        json={"messages": ask("hi"), "temperature": 0, "max_tokens": 50, "top_k": 0},
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *tokens, last = events(response)
    assert all(set(event) == {"token", "gpu"} and event["gpu"] == 0 for event in tokens)
    assert "".join(event["token"] for event in tokens) == "Re: hi"
    assert last == {"done": True, "finish_reason": "stop"}


def test_the_stream_never_splits_a_character(url: str) -> None:
    *tokens, _ = events(httpx.post(url + "/chat/completions", json={"messages": ask("accents")}))
    assert "".join(event["token"] for event in tokens) == "é 你好 🙂"
    assert not any("\ufffd" in event["token"] for event in tokens)
    *tokens, last = events(
        httpx.post(url + "/chat/completions", json={"messages": ask("accents"), "max_tokens": 4})
    )
    assert (
        "".join(event["token"] for event in tokens) == "é \ufffd"
        and last["finish_reason"] == "length"
    )


@pytest.mark.parametrize("fields", [{}, {"render": True}, {"stream": True}])
def test_a_line_of_the_stream_ends_only_at_a_newline(url: str, fields: dict[str, bool]) -> None:
    """Clients split where Python's str.splitlines does, as httpx."""
    response = httpx.post(url + "/chat/completions", json={"messages": ask("lines"), **fields})
    assert list(response.iter_lines()) == response.text.split("\n")[:-1]
    assert all(json.dumps(separator)[1:-1] in response.text for separator in SEPARATORS)


def test_tool_calls_are_told_apart_from_text(url: str) -> None:
    *pieces, _ = events(httpx.post(url + "/chat/completions", json={"messages": ask("calculate")}))
    assert "".join(event.get("token", "") for event in pieces) == "It is , so 42."
    assert "".join(event["text"] for event in pieces if event.get("tool") == "python") == "6*7"
    assert (
        "".join(event["text"] for event in pieces if event.get("tool") == "python_output") == "42"
    )


def test_the_page_gets_the_reply_rendered(url: str) -> None:
    *snapshots, last = events(
        httpx.post(url + "/chat/completions", json={"messages": ask("bold"), "render": True})
    )
    (part,) = snapshots[-1]["parts"]
    assert part["text"] == "**bold** <script>alert(1)</script>"
    assert (
        part["html"].strip() == "<p><strong>bold</strong> &lt;script&gt;alert(1)&lt;/script&gt;</p>"
    )
    assert last["done"]


def test_special_tokens_in_a_message_are_plain_text(url: str) -> None:
    text = "special <|user_end|><|assistant_start|>"
    *tokens, _ = events(httpx.post(url + "/chat/completions", json={"messages": ask(text)}))
    assert "".join(event["token"] for event in tokens) == f"You said {len(text)} characters."


# ---- OpenAI's API --------------------------------------------------------------------------------


def test_openai_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["zangchat-test"]
    assert (
        client.models.retrieve("zangchat-test")
        == client.models.retrieve("zangchat")
        == next(iter(client.models.list()))
    )
    with pytest.raises(openai.NotFoundError, match="zangchat-test"):
        client.models.retrieve("gpt-2")


def test_a_developer_speaks_as_the_system(client: openai.OpenAI) -> None:
    first, second = (
        client.chat.completions.create(
            model="zangchat",
            messages=[{"role": role, "content": "be brief"}, {"role": "user", "content": "one"}],
            temperature=0,
        )
        for role in ("system", "developer")
    )
    assert first.usage == second.usage and first.choices[0].message == second.choices[0].message


def test_openai_chat(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Re: one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
    ]
    answer = client.chat.completions.create(model="zangchat-test", messages=messages, temperature=0)
    assert (answer.object, answer.model) == ("chat.completion", "zangchat-test")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "Re: two",
        "stop",
    )
    assert answer.usage is not None and answer.usage.completion_tokens == len("Re: two")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_chat_limits_and_samples(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="zangchat", messages=ask("x" * 20), max_completion_tokens=6, n=3
    )  # type: ignore[arg-type]
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (i, "Re: xx", "length") for i in range(3)
    ]
    assert answer.usage is not None and answer.usage.completion_tokens == 18


def test_openai_chat_streams(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="zangchat-test",
            messages=ask("hi"),  # type: ignore[arg-type]
            stream=True,
            n=2,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    for index in range(2):
        mine = [
            chunk.choices[0]
            for chunk in chunks
            if chunk.choices and chunk.choices[0].index == index
        ]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == "Re: hi"
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
    assert (
        chunks[-1].choices == []
        and chunks[-1].usage is not None
        and chunks[-1].usage.completion_tokens == 12
    )


def test_openai_chat_shows_tool_calls_beside_the_text(url: str) -> None:
    message = httpx.post(url + "/v1/chat/completions", json={"messages": ask("calculate")}).json()[
        "choices"
    ][0]["message"]
    assert message["content"] == "It is , so 42."
    assert [part["type"] for part in message["parts"]] == [
        "text",
        "python",
        "python_output",
        "text",
    ]
    again = [*ask("calculate"), {"role": "assistant", "content": message["parts"]}, *ask("on")]
    assert (
        httpx.post(url + "/v1/chat/completions", json={"messages": again}).json()["choices"][0][
            "message"
        ]["content"]
        == "Re: on"
    )


def test_openai_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="zangchat-test", prompt="", echo=True)
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        "Re: ",
        "stop",
    )
    several = client.completions.create(model="zangchat-test", prompt=["", ""], n=2, max_tokens=2)
    assert [(c.index, c.text, c.finish_reason) for c in several.choices] == [
        (i, "Re", "length") for i in range(4)
    ]
    tokens = client.completions.create(model="zangchat-test", prompt=[256], max_tokens=3)
    assert (
        tokens.choices[0].text == "Re:"
        and tokens.usage is not None
        and tokens.usage.prompt_tokens == 1
    )
    streamed = client.completions.create(model="zangchat-test", prompt="", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Re: "


def test_openai_completions_with_log_probabilities(client: openai.OpenAI) -> None:
    """What evaluation harnesses ask for: the prompt's own log-probabilities, and those of what
    follows, the end included.
    """
    answer = client.completions.create(
        model="zangchat-test", prompt=[256, 82, 101], max_tokens=1, echo=True, logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None and answer.choices[0].text == "<|bos|>Re:"
    assert (found.tokens, found.text_offset) == (["<|bos|>", "R", "e", ":"], [0, 7, 8, 9])
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None  # type: ignore[index]
    likely = -math.log(1 + (VOCAB - 1) * math.exp(-20))  # the talker's logits are 10 and -10
    assert found.token_logprobs[1:] == pytest.approx([likely] * 3, abs=1e-5)  # type: ignore[index]
    for top, value in zip(found.top_logprobs[1:], found.token_logprobs[1:], strict=True):  # type: ignore[index]
        assert len(top) == 2 and max(top.values()) == value

    unlikely = client.completions.create(
        model="zangchat-test", prompt=["Rx", ""], max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert (
        unlikely.text == "Rx"
        and unlikely.logprobs is not None
        and unlikely.finish_reason == "length"
    )
    assert unlikely.logprobs.token_logprobs == pytest.approx(
        [likely, likely - 20], abs=1e-4
    )  # <|bos|> is in front
    assert set(unlikely.logprobs.top_logprobs[1]) == {"e", "x"}  # type: ignore[index]

    ended = client.completions.create(model="zangchat-test", prompt="", logprobs=0).choices[0]
    assert (
        ended.logprobs is not None
        and ended.logprobs.tokens == ["R", "e", ":", " ", "<|assistant_end|>"]
        and ended.text == "Re: "
    )
    whole = client.completions.create(model="zangchat-test", prompt="Re", echo=True, logprobs=1)
    streamed = list(
        client.completions.create(
            model="zangchat-test", prompt="Re", echo=True, logprobs=1, stream=True
        )
    )
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    for name in ("tokens", "token_logprobs", "text_offset"):
        together = [value for part in parts if part is not None for value in getattr(part, name)]
        assert together == getattr(whole.choices[0].logprobs, name)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_bytes_that_are_no_character_are_spelled_out(client: openai.OpenAI) -> None:
    found = (
        client.completions.create(
            model="zangchat-test", prompt="é", max_tokens=0, echo=True, logprobs=0
        )
        .choices[0]
        .logprobs
    )
    assert found is not None and (found.tokens, found.text_offset) == (
        ["bytes:\\xc3", "bytes:\\xa9"],
        [0, 0],
    )


def test_openai_chat_with_log_probabilities(client: openai.OpenAI) -> None:
    question: Any = ask("calculate")
    whole = client.chat.completions.create(
        model="zangchat-test", messages=question, logprobs=True, top_logprobs=2
    )
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    content = whole.choices[0].logprobs.content
    assert (
        "".join(entry.token for entry in content)
        == whole.choices[0].message.content
        == "It is , so 42."
    )
    assert all(
        len(entry.top_logprobs) == 2 and bytes(entry.bytes or []).decode() == entry.token
        for entry in content
    )
    streamed = client.chat.completions.create(
        model="zangchat-test", messages=question, logprobs=True, stream=True
    )
    entries = [
        entry
        for chunk in streamed
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [(entry.token, entry.logprob) for entry in entries] == [
        (entry.token, entry.logprob) for entry in content
    ]


def test_stop_strings_end_an_answer_and_are_not_shown(client: openai.OpenAI, url: str) -> None:
    answer = client.chat.completions.create(
        model="zangchat-test", messages=ask("one two three"), stop=["x", "two t"]
    )  # type: ignore[arg-type]
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (
        "Re: one ",
        "stop",
    )
    streamed = client.completions.create(model="zangchat-test", prompt="", stop=":", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Re"
    *tokens, last = events(
        httpx.post(url + "/chat/completions", json={"messages": ask("hi there"), "stop": "the"})
    )
    assert (
        "".join(event["token"] for event in tokens) == "Re: hi " and last["finish_reason"] == "stop"
    )


def test_parameters_that_are_off_or_about_openais_own_service_are_no_hindrance(url: str) -> None:
    body = {
        "prompt": "",
        "logit_bias": {},
        "suffix": None,
        "presence_penalty": 0,
        "user": "me",
        "best_of": 1,
        "min_p": 0.1,
    }
    assert httpx.post(url + "/v1/completions", json=body).status_code == 200


def test_the_api_keeps_to_its_own_description(url: str) -> None:
    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    seen = set()

    @hypothesis.settings(max_examples=8, deadline=None, database=None, derandomize=True)
    @hypothesis.given(data=st.data())
    def run(data: Any) -> None:
        for operation in schema.get_all_operations():
            case = data.draw(operation.ok().as_strategy())
            seen.add(case.path)
            # the order of roles and the length of the context have no words in JSON Schema
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

    run()
    assert {"/v1/completions", "/v1/chat/completions", "/chat/completions", "/metrics"} <= seen


# ---- what is refused -----------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        (b"{", 400, ""),
        (b"\xff\xfe", 400, ""),
        (b"[]", 400, ""),
        (b"{}", 400, "messages: Field required"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content.0.type: Input should be 'text'",
        ),
        ({"messages": [USER] * 501}, 400, "messages"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages.0.content"),
        ({"messages": [USER], "temperature": -1}, 400, "temperature"),
        ({"messages": [USER], "temperature": "hot"}, 400, "temperature"),
        (
            {"messages": [USER], "temperature": True},
            400,
            "temperature: Input should be a valid number",
        ),
        (
            {"messages": [USER], "max_tokens": True},
            400,
            "max_tokens: Input should be a valid integer",
        ),
        ({"messages": [USER], "top_k": "5"}, 400, "top_k: Input should be a valid integer"),
        ({"messages": [USER], "seed": 1.5}, 400, "seed: Input should be a valid integer"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            400,
            "temperature",
        ),
        ({"messages": [USER], "top_k": -2}, 400, "top_k"),
        ({"messages": [USER], "top_p": -0.1}, 400, "top_p"),
        ({"messages": [USER], "max_tokens": 0}, 400, "max_tokens"),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            400,
            "93 more than the context of 512",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 300_000}]},
            413,
            "larger than 262144 bytes",
        ),
    ],
)
def test_bad_requests_are_told_what_is_wrong(
    server: tuple[str, Any], path: str, body: Any, status: int, complaint: str
) -> None:
    url, pool = server
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert complaint in response.json()["error"]["message"]
    assert pool.load == 0


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        ({"prompt": []}, 400, "at least one"),
        ({"prompt": [9999]}, 400, "between 0 and 264"),
        ({"prompt": {"a": 1}}, 400, "prompt: Input should be a valid string"),
        ({"prompt": [True]}, 400, "prompt.0: "),
        ({"prompt": [[5, True]]}, 400, "prompt.0.1: Input should be a valid integer"),
        ({"prompt": "x", "logprobs": True}, 400, "logprobs: Input should be a valid integer"),
        ({"prompt": "x", "stream": "no"}, 400, "stream: Input should be a valid boolean"),
        ({"prompt": "\ud800", "echo": True}, 400, "prompt"),
        ({"prompt": [10**30]}, 400, "between 0 and 264"),
        ({"prompt": ["x"] * 40, "n": 2}, 400, "40 prompts x n=2"),
        ({"prompt": "x", "n": 0}, 400, "n: "),
        (
            {"prompt": "x", "logit_bias": {"1": 2}, "frequency_penalty": 0.5},
            400,
            "does not support logit_bias, frequency_penalty",
        ),
        ({"prompt": "x", "temprature": 0}, 400, "does not support temprature"),
        ({"prompt": "x", "add_special_tokens": False}, 400, "does not support add_special_tokens"),
        ({"prompt": "x", "stop": ["a"] * 17}, 400, "stop"),
        ({"prompt": "x", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "x", "min_p": 2}, 400, "min_p"),
        ({"prompt": "x", "repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"prompt": "x" * 512}, 400, "2 more than the context"),
    ],
)
def test_bad_completions_are_told_what_is_wrong(
    url: str, body: dict[str, Any], status: int, complaint: str
) -> None:
    response = httpx.post(
        url + "/v1/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == status, response.text
    assert complaint in response.json()["error"]["message"]


def test_a_body_without_a_length_is_bounded_as_well(url: str) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"messages": [{"role": "user", "content": "'
        for _ in range(100):
            yield b"x" * 10_000

    response = httpx.post(
        url + "/chat/completions", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413


def test_unknown_paths_and_methods_have_the_same_error_format(url: str) -> None:
    assert "there is no /nowhere here" in httpx.get(url + "/nowhere").json()["error"]["message"]
    assert "takes POST, not GET" in httpx.get(url + "/chat/completions").text


def test_whoever_asks_for_the_head_gets_it(url: str) -> None:
    for path in ("/", "/health"):
        response = httpx.head(url + path)
        assert response.status_code == 200 and not response.content


def test_a_body_that_is_not_sent_or_not_written_as_json_is_told_so(url: str) -> None:
    def complaint(content: str, **headers: str) -> str:
        return httpx.post(url + "/v1/chat/completions", content=content, headers=headers).json()[
            "error"
        ]["message"]

    assert "`Content-Type: application/json`" in complaint(
        "{}"
    )  # as `curl -d` sends it: called a form
    assert (
        complaint('{"a": }', **{"Content-Type": "application/json"})
        == "the body is not JSON: Expecting value at character 6"
    )


def test_a_long_chat_is_trimmed_where_that_was_asked_for(url: str) -> None:
    long = [*ask("a" * 300), {"role": "assistant", "content": "b" * 300}, *ask("short")]
    refused = httpx.post(url + "/chat/completions", json={"messages": long})
    assert refused.status_code == 400 and "truncate" in refused.json()["error"]["message"]
    first, *tokens, _ = events(
        httpx.post(url + "/chat/completions", json={"messages": long, "truncate": True})
    )
    assert first == {"left_out": 2}
    assert "".join(event["token"] for event in tokens) == "Re: short"


# ---- load ----------------------------------------------------------------------------------------


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)


def post_head(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode()


def idle(pool: Any) -> bool:
    return pool.load == 0 and not any(worker.batch.busy for worker in pool.workers)


def test_many_requests_at_once_all_get_their_own_answer(server: tuple[str, Any]) -> None:
    url, pool = server
    answers: dict[int, str] = {}

    def one(i: int) -> None:
        response = httpx.post(
            url + "/v1/chat/completions", json={"messages": ask(f"number {i}")}, timeout=60
        )
        answers[i] = response.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"Re: number {i}" for i in range(12)}
    assert eventually(lambda: idle(pool))


def test_a_full_queue_refuses_and_disconnecting_makes_room() -> None:
    slow = engine(lambda question: "x" * 400, pause=0.02)
    with serving(slow, max_batch=1, queue=1) as (url, pool), httpx.Client(timeout=30) as client:
        body = {"messages": ask("hi")}
        with client.stream("POST", url + "/chat/completions", json=body) as first:
            lines = first.iter_lines()  # kept: a dropped iterator closes its connection
            assert next(lines)
            with client.stream("POST", url + "/chat/completions", json=body):
                refused = client.post(url + "/v1/chat/completions", json=body)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
                assert refused.json()["error"]["code"] == "queue_full"
                assert client.get(url + "/health").json() == {
                    "status": "ok"
                }  # while the model is busy
        assert eventually(lambda: idle(pool))  # both left long before their 400 tokens


def test_a_client_that_leaves_before_its_answer_frees_its_slot() -> None:
    slow = engine(lambda question: "x" * 400, pause=0.02)
    with serving(slow, max_batch=2, queue=0) as (url, pool):
        for path, extra in (
            ("/v1/chat/completions", {}),
            ("/v1/chat/completions", {"n": 2}),
            ("/chat/completions", {}),
        ):
            body = json.dumps({"messages": ask("hi"), **extra}).encode()
            with connect(url) as connection:
                connection.sendall(post_head(path, body) + body)
                assert eventually(lambda: pool.load > 0)
            assert eventually(lambda: idle(pool))


@pytest.mark.parametrize(
    "sent", [b"", b"POST /chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le", None]
)
def test_half_open_connections_take_no_place(server: tuple[str, Any], sent: bytes | None) -> None:
    url, pool = server
    body = json.dumps({"messages": ask("hi")}).encode()
    if sent is None:
        sent = post_head("/chat/completions", body) + body[:10]  # the rest never comes
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(url)).sendall(sent)
        assert pool.load == 0
        assert (
            httpx.post(url + "/v1/chat/completions", json={"messages": ask("hi")}).status_code
            == 200
        )
    assert eventually(lambda: idle(pool))


def test_what_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with serving(engine(reply)) as (url, pool):
        for sent in (
            b"",
            b"POST /chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le",
            b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /",
        ):
            with connect(url) as connection:
                connection.sendall(sent)
                while connection.recv(4096):  # until the server closes it
                    pass
        body = json.dumps({"messages": ask("hi")}).encode()
        with connect(url) as connection:
            connection.sendall(post_head("/chat/completions", body) + body[:10])
            answer = connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive" in answer
        # a drop now and then is no excuse either
        with (
            connect(url) as connection,
            pytest.raises(OSError),
        ):
            connection.sendall(post_head("/chat/completions", body))
            for i in range(len(body) - 1):
                time.sleep(0.1)
                connection.sendall(body[i : i + 1])
            raise AssertionError("the server took it all")
        assert pool.load == 0 and httpx.get(url + "/health").status_code == 200


def test_headers_are_bounded(url: str) -> None:
    with connect(url) as connection:
        with suppress(ConnectionError):
            for _ in range(40):
                connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 5000)
        with suppress(ConnectionError):
            assert b"400 Bad Request" in connection.recv(4096)
    assert httpx.get(url + "/health").status_code == 200


def test_stopping_ends_what_is_under_way_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ExitStack() as stack, caplog.at_level(logging.INFO):
        with serving(engine(lambda question: "x" * 400, pause=0.05)) as (url, pool):
            body = json.dumps({"messages": ask("hi")}).encode()
            half, whole = (stack.enter_context(connect(url)) for _ in range(2))
            half.sendall(post_head("/chat/completions", body) + body[:10])
            whole.sendall(post_head("/chat/completions", body) + body)
            assert eventually(lambda: pool.load == 1)
        assert half.recv(4096).startswith(b"HTTP/1.1 503") and whole.recv(4096).startswith(
            b"HTTP/1.1 200"
        )
        assert pool.load == 0
    assert "Traceback" not in caplog.text and "Exception" not in caplog.text


def test_a_stream_that_has_nothing_to_say_shows_that_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "PING_SECONDS", 0.1)
    with serving(engine(reply, pause=0.5)) as (url, _), httpx.Client(timeout=30) as client:
        text = client.post(
            url + "/chat/completions", json={"messages": ask("hi"), "max_tokens": 2}
        ).text
        assert ": still here\n\n" in text and '"done": true' in text


def test_a_client_that_stops_reading_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SEND_SECONDS", 0.3)
    flood = engine(lambda question: "x" * 400, sequence_len=512)
    with (
        serving(flood, max_tokens=400, model_name="z" * 100_000) as (url, pool),
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        body = json.dumps(
            {"messages": ask("hi"), "stream": True}
        ).encode()  # every event repeats the model's long name
        client.sendall(post_head("/v1/chat/completions", body) + body)
        assert eventually(lambda: pool.served == 1) and eventually(lambda: idle(pool))


def test_a_request_has_a_time_limit() -> None:
    slow = engine(lambda question: "x" * 400, pause=0.02)
    with serving(slow, request_seconds=0.3) as (url, pool):
        *_, last = events(
            httpx.post(url + "/chat/completions", json={"messages": ask("hi")}, timeout=30)
        )
        assert last == {"done": True, "finish_reason": "timeout"}
        assert eventually(lambda: idle(pool))


def test_an_engine_that_fails_answers_with_an_error_and_serves_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def moody(question: str) -> str:
        if question == "secret boom":
            raise RuntimeError("out of memory, say")
        return "fine"

    with serving(engine(moody)) as (url, pool), caplog.at_level(logging.INFO):
        assert (
            httpx.post(
                url + "/v1/chat/completions", json={"messages": ask("secret boom")}
            ).status_code
            == 500
        )
        (last,) = events(
            httpx.post(url + "/chat/completions", json={"messages": ask("secret boom")})
        )
        assert last["done"] and "failed" in last["error"]
        assert (
            httpx.post(url + "/v1/chat/completions", json={"messages": ask("hi")}).json()[
                "choices"
            ][0]["message"]["content"]
            == "fine"
        )
        assert eventually(lambda: idle(pool))
    assert "out of memory, say" in caplog.text and "secret" not in caplog.text.replace(
        '"secret boom"', ""
    )


def test_several_engines_share_the_load() -> None:
    slow = [engine(lambda question: "x" * 30, pause=0.01) for _ in range(2)]
    with serving(*slow, max_batch=1) as (url, pool), httpx.Client(timeout=30) as client:
        with client.stream(
            "POST", url + "/chat/completions", json={"messages": ask("hi")}
        ) as first:
            lines = first.iter_lines()
            assert '"gpu": 0' in next(lines)
            assert (
                '"gpu": 1'
                in client.post(url + "/chat/completions", json={"messages": ask("hi")}).text
            )
        assert client.get(url + "/stats").json()["served"] == 2


def test_what_a_request_does_not_name_is_the_operators_choice() -> None:
    settings = Settings(temperature=0.3, top_k=7, top_p=0.9, max_tokens=5)
    sampling = ("temperature", "top_k", "top_p", "max_tokens")
    (plain,) = PageChat(messages=ask("hi")).requests([1], 1, settings)
    assert [getattr(plain, name) for name in sampling] == [0.3, 7, 0.9, 5]
    named = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_tokens": 9}
    (own,) = PageChat(messages=ask("hi"), **named).requests([1], 1, settings)
    assert {name: getattr(own, name) for name in sampling} == named
    page, _ = load_page(settings, 64)
    facts = json.loads(html.unescape(re.search(r'<meta name="zangchat" content="(.*?)">', page)[1]))  # type: ignore[index]
    assert [facts[name] for name in sampling] == [0.3, 7, 0.9, 5] and "top_p: facts.top_p" in page


# ---- access --------------------------------------------------------------------------------------


def test_health_and_stats(server: tuple[str, Any]) -> None:
    url, _ = server
    assert httpx.get(url + "/health").json() == {"status": "ok"}
    stats = httpx.get(url + "/stats").json()
    assert (
        stats["model"] == "zangchat-test"
        and stats["tokens"] > 0
        and stats["workers"][0]["running"] == 0
    )


def test_metrics_can_be_scraped(server: tuple[str, Any]) -> None:
    url, pool = server
    response = httpx.get(url + "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'zangchat_[a-z_]+(\{gpu="0"\})? \d+\.0', line) for line in lines)
    numbers = dict(line.rsplit(" ", 1) for line in lines)
    assert (
        float(numbers["zangchat_requests_total"]) == pool.served
        and float(numbers['zangchat_tokens_total{gpu="0"}']) > 0
    )


def test_an_api_key_guards_all_but_the_page() -> None:
    with serving(engine(reply), api_key="s3cret") as (url, _):
        assert httpx.get(url + "/").status_code == httpx.get(url + "/health").status_code == 200
        assert "s3cret" not in httpx.get(url + "/").text
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer é".encode()},
        ):
            refused = httpx.get(url + "/v1/models", headers=headers)
            assert refused.status_code == 401 and "API key" in refused.json()["error"]["message"]
        assert (
            httpx.post(url + "/chat/completions", json={"messages": ask("hi")}).status_code == 401
        )
        key = {"Authorization": "Bearer s3cret"}
        assert httpx.get(url + "/v1/models", headers=key).status_code == 200
        described = httpx.get(url + "/openapi.json", headers=key).json()["paths"]
        paths = {"/docs", "/openapi.json", "/stats", "/metrics", *described} - {"/", "/health"}
        assert len(paths) >= 8
        for path in paths - {"/logo.svg"}:
            assert httpx.get(url + path).status_code == 401, path
            assert httpx.post(url + path, json={}).status_code == 401, path


def test_other_sites_and_other_names_are_not_served(url: str) -> None:
    assert httpx.get(url + "/health", headers={"Host": "attacker.example"}).status_code == 400
    assert httpx.get(url + "/health", headers={"Host": "localhost:1234"}).status_code == 200
    foreign = httpx.post(
        url + "/chat/completions",
        json={"messages": ask("hi")},
        headers={"Origin": "http://attacker.example"},
    )
    assert foreign.status_code == 403
    own = httpx.post(
        url + "/chat/completions", json={"messages": ask("hi")}, headers={"Origin": url}
    )
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


def test_the_page_may_run_its_own_script_and_nothing_else(url: str) -> None:
    page = httpx.get(url + "/")
    policy = page.headers["content-security-policy"]
    assert (
        "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
    )
    assert "{{facts}}" not in page.text and "zangchat-test" in page.text
    assert (
        "http://" not in page.text.replace("http://www.w3.org", "") and "https://" not in page.text
    )
    assert page.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(url + "/logo.svg").headers["content-type"] == "image/svg+xml"


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        ("<img src=x onerror=alert(1)>", "<img"),
        ("[x](javascript:alert(1))", "href"),
        ("![x](http://elsewhere.example/x.png)", "<img"),
        ("<a href='data:text/html,x'>x</a>", "<a"),
        ('```"><script>\nx\n```', "<script"),
    ],
)
def test_rendered_markdown_is_harmless(text: str, forbidden: str) -> None:
    assert forbidden not in render_markdown(text)


def test_markdown_is_rendered_part_by_part() -> None:
    parts = render_parts(
        [{"type": "text", "text": "| a |\n|---|\n| `b` |\n"}, {"type": "python", "text": "*1*"}]
    )
    assert "<table>" in parts[0]["html"] and "<code>b</code>" in parts[0]["html"]
    assert parts[1] == {"type": "python", "text": "*1*"}
    assert 'class="language-python"' in render_markdown(
        "```python\nx\n"
    )  # an unfinished block while it streams in
