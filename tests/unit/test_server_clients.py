"""The requests of other programs: OpenAI's fields one by one, and those of vLLM, llama.cpp,
LM Studio, SillyTavern and others. Each is served, or refused by a sentence that names it.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import TypeAdapter, ValidationError

from tests.talker import TOKENIZER, engine, serving
from zangchat.server.messages import ChatMessage, conversation_of
from zangchat.server.openai_requests import OpenAIChat, OpenAICompletion
from zangchat.server.page_api import AnyChat
from zangchat.server.protocol import Settings
from zangchat.server.service import Prompter

PATHS = ("/v1/chat/completions", "/chat/completions")
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Any]]:
    talker = engine(lambda question: f"Re: {question}")
    with serving(talker, model_name="zangchat-test", temperature=0.0, max_batch=4, queue=4) as it:
        yield it


@pytest.fixture(scope="module")
def url(server: tuple[str, Any]) -> str:
    return server[0]


def post(url: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body)
    head = {"Content-Type": "application/json", **headers}
    return httpx.post(url, content=content, headers=head, timeout=60)


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


# ---- the address ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/v1", "", "/v1/", "/"])
def test_openais_client_works_with_and_without_v1(url: str, base: str) -> None:
    with openai.OpenAI(base_url=url + base, api_key="none", max_retries=0) as client:
        messages: Any = HI
        whole = client.chat.completions.create(model="zangchat", messages=messages)
        assert whole.choices[0].message.content == "Re: hi"
        chunks = client.chat.completions.create(model="zangchat", messages=messages, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Re: hi"
        assert client.completions.create(model="zangchat", prompt="").choices[0].text == "Re: "
        assert [model.id for model in client.models.list()] == ["zangchat-test"]
        assert client.models.retrieve("zangchat-test").id == "zangchat-test"


@pytest.mark.parametrize(
    "field", [{"model": "m"}, {"stream": False}, {"n": 1}, {"model": None}, {"tools": []}]
)
def test_a_field_of_openais_makes_it_openais_request(url: str, field: dict[str, Any]) -> None:
    assert said(post(url + "/chat/completions", {"messages": HI, **field})) == "Re: hi"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["gpt-4o-mini", "zangchat", "zangchat-test", "some/model:tag"])
def test_any_model_name_is_served_and_the_answer_names_ours(url: str, path: str, name: str) -> None:
    answer = post(url + path, {"messages": HI, "model": name}).json()
    assert answer["model"] == "zangchat-test"
    assert httpx.get(url + "/v1/models/some/other").status_code == 404


@pytest.mark.parametrize(
    "path",
    """/v1/embeddings /v1/responses /tokenize /detokenize /api/tags /api/chat /api/generate /props
    /v1/v1/chat/completions /v1 /chat /v1/messages /v1/audio/speech /completion""".split(),
)
def test_an_unknown_address_is_told_the_known_ones(url: str, path: str) -> None:
    for response in (httpx.get(url + path), post(url + path, {})):
        error = response.json()["error"]
        assert response.status_code == 404 and error["code"] == "unknown_url"
        assert f"there is no {path} here" in error["message"]
        assert "POST /v1/chat/completions" in error["message"]
    wrong = httpx.get(url + "/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["message"] == "/v1/chat/completions takes POST, not GET"


# ---- fields --------------------------------------------------------------------------------------

NULLABLE = """model n stream stream_options logprobs top_logprobs stop seed temperature top_p top_k
    min_p max_tokens max_completion_tokens repetition_penalty frequency_penalty presence_penalty
    logit_bias tools tool_choice functions function_call response_format modalities audio user
    metadata store prediction service_tier reasoning_effort verbosity web_search_options
    parallel_tool_calls prompt_cache_key safety_identifier truncate guided_json""".split()
CHAT_OFF: list[dict[str, Any]] = [
    *({name: None} for name in NULLABLE),
    {"stream_options": {"include_usage": None}},
    {"stream_options": {"include_obfuscation": False, "continuous_usage_stats": False}},
    {"stop": ""},
    {"stop": []},
    {"stop": [""]},
    {"top_k": -1},
    {"top_k": 0},
    {"top_p": 0},
    {"max_tokens": -1},
    {"n_predict": -1},
    {"max_completion_tokens": -1},
    {"max_tokens": 50.0, "n": 1.0},
    {"seed": -1},
    {"top_logprobs": 0},
    {"presence_penalty": 0, "frequency_penalty": 0.0, "repeat_penalty": 1.0, "logit_bias": {}},
    {"logit_bias": {"50256": 0}},
    {"min_tokens": 0, "ignore_eos": False, "skip_special_tokens": True, "length_penalty": 1.0},
    {"stop_token_ids": [], "bad_words": [], "include_stop_str_in_output": False},
    {"spaces_between_special_tokens": True, "use_beam_search": False, "best_of": 1},
    {"echo": False, "add_generation_prompt": True, "continue_final_message": False},
    {"add_special_tokens": False, "priority": 0, "request_id": "1"},
    {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"},
    {"reasoning": {"effort": "none"}, "thinking": {"type": "disabled"}, "verbosity": "low"},
    {"cache_prompt": True, "id_slot": -1, "timings_per_token": False, "n_keep": 0},
    {"mirostat": 0, "mirostat_tau": 5, "mirostat_eta": 0.1, "typical_p": 1, "tfs_z": 1.0},
    {"dry_multiplier": 0, "dry_base": 1.75, "xtc_probability": 0, "xtc_threshold": 0.1},
    {"dynatemp_range": 0, "dynatemp_exponent": 1, "grammar": "", "top_n_sigma": -1},
    {"ttl": 300, "keep_alive": "5m", "user": "me", "metadata": {"a": "b"}, "store": True},
    {"tools": [], "tool_choice": "none", "functions": [], "parallel_tool_calls": True},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"response_format": {"type": "text"}, "modalities": ["text"], "n": 1, "logprobs": False},
    {"prediction": {"type": "content", "content": "x"}, "service_tier": "auto"},
]
COMPLETION_OFF: list[dict[str, Any]] = [
    *({name: None} for name in (*NULLABLE, "prompt", "echo", "suffix", "best_of")),
    {"suffix": "", "best_of": 1, "echo": False, "add_special_tokens": True},
    {"best_of": 2, "n": 2},
    {"prompt": [256], "add_special_tokens": False},  # tokens are taken as they are
    {"max_tokens": -1, "stop": [""], "top_k": -1},
    # LangChain's OpenAI class
    {"frequency_penalty": 0, "logprobs": None, "presence_penalty": 0, "seed": None, "top_p": 1},
]


def unique(body: dict[str, Any]) -> str:
    return json.dumps(body)[:60]


@pytest.mark.parametrize("field", CHAT_OFF, ids=unique)
def test_fields_that_change_nothing_are_served(url: str, field: dict[str, Any]) -> None:
    for path in PATHS:
        body = {"model": "zangchat", "messages": HI, "temperature": 0, **field}
        assert said(post(url + path, body)) == "Re: hi"


@pytest.mark.parametrize("field", COMPLETION_OFF, ids=unique)
def test_fields_of_completions_that_change_nothing_are_served(
    url: str, field: dict[str, Any]
) -> None:
    response = post(url + "/v1/completions", {"prompt": "", "temperature": 0, **field})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == "Re: "


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}], "function_call": "auto"}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"mirostat": 2}, "mirostat"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"temprature": 0}, "temprature"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(
    url: str, field: dict[str, Any], param: str
) -> None:
    for path in PATHS:
        response = post(url + path, {"model": "zangchat", "messages": HI, **field})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
        assert error["param"] == param and f"does not support {param}" in error["message"]
        assert "temperature, top_k, top_p" in error["message"]


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"n": "1"}, "n"),
        ({"n": 0}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": "0.7"}, "temperature"),
        ({"stop": 5}, "stop"),
        ({"model": 5}, "model"),
        ({"stream_options": 5}, "stream_options"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 30, "logprobs": True}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "x", "content": "y"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"n": 60}, "n"),
    ],
)
def test_an_error_names_its_field(url: str, field: dict[str, Any], param: str) -> None:
    for path in PATHS:
        response = post(url + path, {"model": "zangchat", "messages": HI, **field})
        assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_more_continuations_than_the_server_can_hold_are_refused_for_good(url: str) -> None:
    fits, too_many = (post(url + "/v1/chat/completions", {"messages": HI, "n": n}) for n in (8, 9))
    assert fits.status_code == 200 and len(fits.json()["choices"]) == 8
    assert too_many.status_code == 400
    assert "9 continuations are more than the 8 that" in too_many.json()["error"]["message"]


def test_a_request_that_chooses_its_sampling_gets_openais_defaults_for_the_rest() -> None:
    settings = Settings(temperature=0.8, top_k=50, top_p=0.9)

    def sampling(**fields: Any) -> tuple[float, int | None, float | None]:
        (request,) = OpenAICompletion(prompt="x", **fields).requests([1], 1, settings)
        return request.temperature, request.top_k, request.top_p

    assert sampling() == (0.8, 50, 0.9)  # the operator's
    assert sampling(temperature=1) == (1, 0, 1)  # pass@k draws from all tokens
    assert sampling(top_k=7) == (1.0, 7, 1)
    assert sampling(top_k=-1) == (1.0, 0, 1)
    assert sampling(temperature=None, top_p=None) == (0.8, 50, 0.9)


def test_minus_one_is_a_seed_at_random_and_no_limit() -> None:
    body = OpenAIChat(messages=HI, seed=-1, max_tokens=-1)
    seeds = {body.requests([1], 1, Settings())[0].seed for _ in range(8)}
    assert len(seeds) > 1 and -1 not in seeds
    assert (body.limit or 0) >= 10**6
    assert OpenAIChat(messages=HI, repeat_penalty=1.5).repetition_penalty == 1.5
    assert OpenAIChat(messages=HI, n_predict=7).limit == 7


def test_usage_is_null_in_chunks_before_the_last(url: str) -> None:
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    lines = post(url + "/v1/chat/completions", body).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == 6 and chunks[-1]["choices"] == []


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [{}] * 80_000},
        {"prompt": [[{}] * 80_000]},
        {"prompt": [[{}]] * 40_000},
        {"prompt": [None] * 80_000},
        {"messages": [{}] * 80_000},
        {"messages": [{"role": "user", "content": [{}] * 80_000}], "model": "m"},
        {"messages": [{"role": "user", "content": "x"}], "stop": [{}] * 80_000},
    ],
    ids=unique,
)
def test_a_body_full_of_errors_is_refused_at_the_first(body: dict[str, Any]) -> None:
    """One report per element froze the event loop for seconds."""
    kind: Any = OpenAICompletion if "prompt" in body else AnyChat
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(body)
    assert caught.value.error_count() < 10


# ---- messages ------------------------------------------------------------------------------------

CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("messages", "conversation", "opening"),
    [
        ("user:a", "user:a", ""),
        ("user:a user:b", "user:a\n\nb", ""),
        ("system:a system:b user:c", "system:a\n\nb user:c", ""),
        ("developer:a user:c", "system:a user:c", ""),
        ("user:a assistant:b assistant:c user:d", "user:a assistant:b\n\nc user:d", ""),
        ("assistant:a user:b", "user: assistant:a user:b", ""),
        ("system:s assistant:a user:b", "system:s user: assistant:a user:b", ""),
        ("user:a system:s user:b", "user:a\n\ns\n\nb", ""),
        ("user:a assistant:b system:s", "user:a assistant:b user:s", ""),
        ("system:s", "user:s", ""),
        ("user:", "user:", ""),
        ("user: user:a", "user:a", ""),
        ("user:a assistant: user:b", "user:a\n\nb", ""),
        ("user:a assistant:b user:", "user:a assistant:b user:", ""),
        ("user:a assistant:b", "user:a", "b"),
        ("user:a assistant:", "user:a", ""),
        ("assistant:a", "user:", "a"),
        ("system: user:a", "user:a", ""),
        ("user:a tool:b", "user:a\n\nb", ""),
        ("user:a assistant:x tool:b", "user:a assistant:x user:b", ""),
        ("user:a function:b", "user:a\n\nb", ""),
    ],
)
def test_roles_in_any_order_become_the_models_turns(
    messages: str, conversation: str, opening: str
) -> None:
    sent = [
        ChatMessage(role=role, content=text)  # type: ignore[arg-type]
        for role, _, text in (word.partition(":") for word in messages.split(" "))
    ]
    found, parts = conversation_of(sent)
    assert " ".join(f"{turn['role']}:{turn['content']}" for turn in found) == conversation
    assert "".join(part["text"] for part in parts) == opening
    Prompter(TOKENIZER, 512, Settings()).chat(sent, 10, None)  # the tokenizer accepts them


@pytest.mark.parametrize(
    ("messages", "answer"),
    [
        ([*HI, {"role": "assistant", "content": None, "tool_calls": CALL}], "Re: hi"),
        ([*HI, {"role": "assistant", "tool_calls": CALL}, {"role": "tool", "content": "5", "tool_call_id": "1"}], "Re: hi\n\n5"),
        ([{"role": "user", "content": None}, *HI], "Re: hi"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "Re: ab"),
        ([{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "Re: a"),
        ([*HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *HI], "Re: hi"),
        ([{"role": "user", "content": "hi", "name": "me", "extra": 1}], "Re: hi"),
        ([*HI, {"role": "assistant", "content": "Re:"}], " hi"),
    ],
)  # fmt: skip
def test_messages_of_other_programs_are_answered(
    url: str, messages: list[dict[str, Any]], answer: str
) -> None:
    assert said(post(url + "/v1/chat/completions", {"messages": messages})) == answer


def test_an_answer_can_be_sent_back_as_it_came(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        first = client.chat.completions.create(model="zangchat", messages=HI)  # type: ignore[arg-type]
        sent: Any = [*HI, first.choices[0].message.model_dump(), {"role": "user", "content": "x"}]
        again = client.chat.completions.create(model="zangchat", messages=sent)
        assert again.choices[0].message.content == "Re: x"


def test_the_beginning_of_a_reply_is_continued_in_both_spellings(url: str) -> None:
    body: dict[str, Any] = {"messages": [*HI, {"role": "assistant", "content": "Re: "}]}
    spelling = {"add_generation_prompt": False, "continue_final_message": True}
    for more in ({}, spelling):
        assert said(post(url + "/v1/chat/completions", {**body, **more})) == "hi"
    prompt, _ = Prompter(TOKENIZER, 512, Settings()).chat(
        [ChatMessage.model_validate(message) for message in body["messages"]], 10, None
    )
    start = TOKENIZER.encode_special("<|assistant_start|>")
    assert prompt[prompt.index(start) + 1 :] == TOKENIZER.encode("Re: ")


def test_a_chat_that_does_not_fit_is_refused_or_loses_its_oldest_turns(url: str) -> None:
    long = [*HI, {"role": "assistant", "content": "b" * 600}, {"role": "user", "content": "x"}]
    refused = post(url + "/v1/chat/completions", {"messages": long})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 512 tokens" in error["message"]
    cut = post(url + "/v1/chat/completions", {"messages": long, "truncate": True})
    assert said(cut) == "Re: x" and cut.json()["left_out"] == 2
    with serving(engine(lambda question: "fine"), truncate=True) as (other, _):
        for path in PATHS:
            assert post(other + path, {"messages": long}).status_code == 200
        body = {"messages": long, "truncate": False}
        assert post(other + "/v1/chat/completions", body).status_code == 400


# ---- a reply that takes too long -----------------------------------------------------------------


def test_a_timeout_does_not_look_like_an_answer() -> None:
    slow = engine(lambda question: "x" * 400, pause=0.05)
    with serving(slow, request_seconds=0.5, max_batch=1) as (url, _):
        whole = post(url + "/v1/chat/completions", {"messages": HI})
        error = whole.json()["error"]
        assert (whole.status_code, error["code"]) == (504, "timeout")
        assert "not complete after 0.5 seconds" in error["message"]
        assert "--request_timeout" in error["message"]
        assert whole.headers["x-should-retry"] == "false"
        stream = post(url + "/v1/chat/completions", {"messages": HI, "stream": True}).text
        *chunks, last = [json.loads(line[6:]) for line in stream.splitlines() if "{" in line]
        assert "x" in "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        assert last["error"]["code"] == "timeout"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=2)
        with client, pytest.raises(openai.APIError) as caught:
            messages: Any = HI
            for _ in client.chat.completions.create(model="m", messages=messages, stream=True):
                pass
        assert "not complete" in str(caught.value)


def test_the_wait_for_a_row_counts_as_well() -> None:
    slow = engine(lambda question: "x" * 400, pause=0.05)
    with serving(slow, request_seconds=0.5, max_batch=1, queue=1) as (url, pool):
        body = {"messages": HI, "max_tokens": 400}
        with httpx.stream("POST", url + "/chat/completions", json=body) as first:
            assert first.status_code == 200
            waiting = post(url + "/v1/chat/completions", body)
            assert (waiting.status_code, waiting.json()["error"]["code"]) == (504, "timeout")
            assert "waiting for a free row included" in waiting.json()["error"]["message"]


# ---- other clients, for real ---------------------------------------------------------------------

JAVA = """
import java.net.URI;
import java.net.http.*;

public class Client {
    public static void main(String[] args) throws Exception {
        HttpClient client = HttpClient.newHttpClient(); // HTTP/2 by default: it offers h2c
        for (int i = 0; i < 2; i++) {
            for (String path : new String[] {"/v1/chat/completions", "/chat/completions"}) {
                HttpRequest request = HttpRequest.newBuilder(URI.create(args[0] + path))
                    .header("Content-Type", "application/json")
                    .POST(HttpRequest.BodyPublishers.ofString(args[1])).build();
                HttpResponse<String> answer =
                    client.send(request, HttpResponse.BodyHandlers.ofString());
                System.out.println(answer.statusCode() + " " + answer.body());
            }
        }
    }
}
"""


def required(program: str) -> str:
    """The path of a program that CI installs; elsewhere its test may be skipped."""
    path = shutil.which(program)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"{program} is missing: .ci/run installs it")
    return path or pytest.skip(f"no {program} here")


@pytest.mark.parametrize("length", [2, 100])
def test_the_jdks_own_client_keeps_its_body(url: str, tmp_path: Path, length: int) -> None:
    required("javac")
    program = tmp_path / "Client.java"
    program.write_text(JAVA)
    question = "x" * length
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": question}]})
    command = ["java", "-Xshare:auto", str(program), url, body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("200 ") and f'"content":"Re: {question}"' in line


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--http1.0"],
        ["--http2"],  # Upgrade: h2c
        ["-H", "Expect: 100-continue"],
        ["-H", "Transfer-Encoding: chunked"],
        ["-H", "Connection: Upgrade, close", "-H", "Upgrade: websocket"],
    ],
)
def test_curl_is_answered(url: str, flags: list[str]) -> None:
    body = json.dumps({"model": "m", "messages": HI})
    command = [required("curl"), "-sS", *flags, url + "/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", body]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Re: hi", answer.stderr


LANGCHAIN = (  # langchain-openai 1.x: ChatOpenAI, and the completions of OpenAI
    '{"model":"zangchat","stream":false,"messages":[{"content":"be brief","role":"system"},'
    '{"content":"hi","role":"user"}],"temperature":0.7}',
    '{"model":"zangchat","prompt":[""],"frequency_penalty":0,"logprobs":null,"max_tokens":256,'
    '"n":1,"presence_penalty":0,"seed":null,"temperature":0.7,"top_p":1}',
)
LITELLM = (  # openai/..., hosted_vllm/..., and the completions of text-completion-openai/...
    '{"model":"zangchat","messages":[{"role":"user","content":"hi"}],"presence_penalty":0,'
    '"reasoning_effort":"low","stream":true}',
    '{"model": "x", "messages": [{"role": "system", "content": "s"}, '
    '{"role": "user", "content": "hi"}], "top_k": -1}',
    '{"model":"zangchat","prompt":""}',
)


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("body", [*LANGCHAIN, *LITELLM])
def test_bodies_that_langchain_and_litellm_were_seen_to_send(
    url: str, prefix: str, body: str
) -> None:
    path = "/completions" if "prompt" in body else "/chat/completions"
    response = post(url + prefix + path, body.encode())
    assert response.status_code == 200 and "choices" in response.text
