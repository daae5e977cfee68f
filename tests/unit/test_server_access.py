"""Who reaches the server, and how: host names, origins, keys, a reverse proxy, hostile connections."""

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.middleware.cors import CORSMiddleware

from scripts.chat_web import Config, address_of, listen, make_settings
from tests.proxy import proxied
from tests.talker import engine, eventually, serving
from zangchat import configurator
from zangchat.errors import UserError
from zangchat.server import connections, exposure

ROOT = Path(__file__).parents[2]
HI = [{"role": "user", "content": "hi"}]
SITE = "https://chat.example.com"


def reply(question: str) -> str:
    return f"Re: {question}"


@contextmanager
def served(**flags: Any) -> Iterator[str]:
    """A server as scripts.chat_web configures it."""
    settings = make_settings(Config(temperature=0.0, **flags))
    with serving(engine(reply), settings=settings) as (url, _):
        yield url


def ask(url: str, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    return httpx.post(url + path, json={"messages": HI}, headers=headers, timeout=30)


# ---- host names ----------------------------------------------------------------------------------


def test_a_server_has_the_names_that_its_operator_gives_it() -> None:
    with served(allowed_hosts="Chat.example.com, *.lan") as url:
        for host in ("chat.example.com", "chat.example.com:443", "box.lan", "localhost:1"):
            assert ask(url, Host=host).status_code == 200
        for host in ("example.com", "evilchat.example.com", "lan", "chat.example.com.evil.com"):
            refused = ask(url, Host=host)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_host")
            assert f"--allowed_hosts={host}" in refused.json()["error"]["message"]


def test_an_address_is_no_name_that_could_be_rebound() -> None:
    with served() as url:
        for host in ("10.0.0.5:8000", "[fe80::1]:8000", "192.168.1.2"):
            assert ask(url, Host=host).status_code == 200
        assert ask(url, Host="10.0.0.5.evil.com").status_code == 400


def test_all_names_are_accepted_only_where_that_was_asked_for_and_it_is_said() -> None:
    every = Config(host="0.0.0.0")
    assert make_settings(every).hosts is None
    first, second = exposure.warnings(every)
    assert "--host=0.0.0.0" in first and "--allowed_hosts" in first
    assert "ZANGCHAT_API_KEY" in second
    named = Config(host="0.0.0.0", allowed_hosts="a.lan", api_key="k")
    assert make_settings(named).hosts == {"a.lan", *exposure.LOCAL_HOSTS}
    assert list(exposure.warnings(named)) == list(exposure.warnings(Config())) == []
    assert make_settings(Config(allowed_hosts="*")).hosts is None


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"allowed_hosts": "https://a.example/"}, "leave out https:// and the path"),
        ({"allowed_origins": "a.example"}, "write https://chat.example.com"),
        ({"allowed_origins": "https://a.example/page"}, "which is no origin"),
        ({"root_path": "chat"}, "write /chat"),
        ({"request_timeout": 0.0}, "--request_timeout=0.0 is not possible"),
        ({"api_key": "a", "api_key_file": "b"}, "leave one of them out"),
        ({"api_key_file": "/nowhere/key"}, "/nowhere/key cannot be read"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        make_settings(Config(**flags))


def test_every_address_means_those_of_both_kinds() -> None:
    with listen(Config(host="::", port=0)) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener).startswith(f"http://[::1]:{port} and ")
        hosts = ["::1", "127.0.0.1"] if socket.has_dualstack_ipv6() else ["::1"]
        for host in hosts:
            socket.create_connection((host, port), timeout=20).close()


@pytest.mark.parametrize("host", ["192.0.2.1", "[::1]"])
def test_a_host_that_is_no_address_here_is_not_taken_for_a_busy_port(host: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--host={host}")) as refusal:
        listen(Config(host=host, port=0))
    assert "choose another --port" not in str(refusal.value)
    assert "127.0.0.1" in str(refusal.value)
    with (
        listen(Config(port=0)) as listener,
        pytest.raises(UserError, match="choose another --port"),
    ):
        listen(Config(port=listener.getsockname()[1]))


# ---- origins -------------------------------------------------------------------------------------


def test_pages_of_allowed_origins_may_use_the_api() -> None:
    with served(allowed_origins=f"{SITE}/, chrome-extension://abc", api_key="k") as url:
        for origin in (SITE, "chrome-extension://abc"):
            preflight = httpx.options(
                url + "/v1/chat/completions",
                headers={
                    "Origin": origin,
                    "Access-Control-Request-Method": "POST",
                    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
                    "Access-Control-Request-Private-Network": "true",
                },
            )
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == origin
            if "allow_private_network" in inspect.signature(CORSMiddleware).parameters:
                assert preflight.headers["access-control-allow-private-network"] == "true"
            assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
            answer = ask(url, Origin=origin, Authorization="Bearer k")
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origin
            refused = ask(url, Origin=origin)  # the page can read why
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == origin
        for origin in ("https://evil.example", "http://chat.example.com", "null"):
            refused = ask(url, Origin=origin, Authorization="Bearer k")
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "bad_origin")
            assert "access-control-allow-origin" not in refused.headers


def test_without_a_flag_a_foreign_page_is_refused_by_a_sentence_that_names_it() -> None:
    with served() as url:
        for response in (
            ask(url, Origin=SITE),
            httpx.options(url + "/v1/models", headers={"Origin": SITE}),
        ):
            assert response.status_code == 403
            assert f"--allowed_origins={SITE}" in response.json()["error"]["message"]
        assert ask(url, Origin="http://localhost:3000").status_code == 403  # another local program
    with served(allowed_origins="*") as url:
        answer = ask(url, Origin=SITE)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


# ---- the key -------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ZANGCHAT_API_KEY", "from the environment")
    assert make_settings(Config()).api_key == "from the environment"
    assert make_settings(Config(api_key="flag")).api_key == "flag"
    file = tmp_path / "key"
    file.write_text("from a file\n")
    assert make_settings(Config(api_key_file=str(file))).api_key == "from a file"
    file.write_text("from Windows\r\n", encoding="utf-8-sig")
    assert make_settings(Config(api_key_file=str(file))).api_key == "from Windows"
    file.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        make_settings(Config(api_key_file=str(file)))


@pytest.mark.parametrize("flag", ["api_key", "api_key_file"])
def test_a_key_from_a_variable_that_is_not_set_opens_no_server(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("", "from the environment"):
        monkeypatch.setenv("ZANGCHAT_API_KEY", other)
        with pytest.raises(UserError, match=f"^--{flag}\\b.*: (write|name)"):
            make_settings(configurator.parse(Config, [f"--{flag}="]))


def test_a_key_that_no_client_could_send_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ZANGCHAT_API_KEY", "s3cret\n")  # a secret that `echo` wrote
    with served() as url:
        assert ask(url, Authorization="Bearer s3cret").status_code == 200
        assert ask(url, Authorization="Bearer s3cre").status_code == 401
    file = tmp_path / "key"
    for key in ("s3crét", "钥匙", "ｓ3cret", "s3c\tret", "s3c\nret"):
        file.write_text(key, encoding="utf-8")
        monkeypatch.setenv("ZANGCHAT_API_KEY", key)
        for flags in ({}, {"api_key": key}, {"api_key_file": str(file)}):
            with pytest.raises(UserError, match="printable ASCII") as refusal:
                make_settings(Config(**flags))
            assert key not in str(refusal.value)
    monkeypatch.setenv("ZANGCHAT_API_KEY", " \n")  # no reason to let everyone in
    with pytest.raises(UserError, match="ZANGCHAT_API_KEY is empty"):
        make_settings(Config())
    monkeypatch.setenv("ZANGCHAT_API_KEY", "")
    assert make_settings(Config()).api_key is None


@pytest.mark.parametrize(
    ("header", "status"),
    [("Bearer k", 200), ("bearer k", 200), ("BEARER  k", 200), ("k", 401), ("Basic k", 401)],
)
def test_the_scheme_of_a_key_has_no_case(header: str, status: int) -> None:
    with served(api_key="k") as url:
        assert ask(url, Authorization=header).status_code == status


# ---- a reverse proxy -----------------------------------------------------------------------------


@pytest.mark.parametrize("strips", [True, False])
def test_the_page_and_the_api_work_behind_a_proxy_with_a_path(strips: bool) -> None:
    flags = {} if strips else {"root_path": "/apps/zangchat/"}
    with (
        served(allowed_hosts="chat.example.com", **flags) as url,
        proxied(url, "/apps/zangchat", strips, host="localhost:8000") as outside,
    ):
        page = httpx.get(outside + "/")
        assert page.status_code == 200
        for address in re.findall(r'(?:src|href)="([^"]*)"|fetch\("([^"]*)"', page.text):
            assert not "".join(address).startswith("/"), address
        assert httpx.get(outside + "/logo.svg").headers["content-type"] == "image/svg+xml"
        for path in ("/chat/completions", "/v1/chat/completions", "/health", "/v1/models"):
            send = httpx.get if path in ("/health", "/v1/models") else ask
            response = (
                send(outside + path) if send is httpx.get else ask(outside, path, Origin=SITE)
            )
            assert response.status_code == 200, response.text
        # the Host header is the proxy's, the Origin the outside name
        assert ask(outside, Origin="https://evil.example").status_code == 403
        with httpx.stream("POST", outside + "/chat/completions", json={"messages": HI}) as stream:
            assert '"done": true' in "".join(stream.iter_text())


# ---- hostile connections -------------------------------------------------------------------------


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)


def request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x.localhost\r\nContent-Type: application/json\r\n"
    return head.replace("x.", "").encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


def test_headers_are_bounded_while_a_reply_runs() -> None:
    slow = engine(lambda question: "x" * 400, pause=0.05)
    with serving(slow) as (url, pool), connect(url) as connection:
        connection.sendall(request({"messages": HI, "stream": True}))
        assert eventually(lambda: pool.load == 1)
        sent = 0
        with suppress(ConnectionError, TimeoutError):
            for _ in range(400):  # 20 MB
                sent += connection.send(b"GET / HTTP/1.1\r\nX: " + b"x" * 50_000)
        assert sent < 10_000_000  # held in the kernel's buffers, not by the server
        assert eventually(lambda: pool.load == 0)


def test_a_reply_survives_a_request_that_waits_behind_it() -> None:
    with serving(engine(reply)) as (url, _), connect(url) as connection:
        connection.sendall(request({"messages": HI}) * 2)
        received = b""
        while received.count(b"Re: hi") < 2:
            received += connection.recv(65536) or pytest.fail("closed")


@pytest.mark.parametrize(
    "offer",
    [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA",
        "Connection: keep-alive, Upgrade\r\nUpgrade: websocket",
        "Upgrade: h2c\r\nConnection: upgrade",
    ],
)
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_an_offer_of_another_protocol_costs_no_body(offer: str, pieces: int) -> None:
    """As the JDK's HttpClient sends it, in one write or in several."""
    with serving(engine(reply)) as (url, _), connect(url) as connection:
        for _ in range(2):  # the connection stays usable
            whole = request({"messages": HI}).replace(
                b"\r\n", b"\r\n" + offer.encode() + b"\r\n", 1
            )
            end = whole.index(b"\r\n\r\n") + 4
            cuts = {1: [], 2: [end], 3: [30, end + 5]}[pieces]
            for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
                connection.sendall(whole[start:stop])
            received = b""
            while b"Re: hi" not in received:
                received += connection.recv(65536) or pytest.fail(received.decode())
            assert received.startswith(b"HTTP/1.1 200")


def test_a_proxy_request_is_refused() -> None:
    with serving(engine(reply)) as (url, _), connect(url) as connection:
        connection.sendall(b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_idle_connections_make_room_for_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 8)
    monkeypatch.setattr(connections.PatientProtocol, "last_warning", float("-inf"))
    slow = engine(lambda question: "x" * 100, pause=0.02)
    with (
        serving(slow, temperature=0.0) as (url, _),
        ExitStack() as stack,
        connect(url) as busy,  # while its reply runs it is not idle
    ):
        busy.sendall(request({"messages": HI, "stream": True}))
        assert busy.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(40):
            stack.enter_context(connect(url))
        assert httpx.get(url + "/health").status_code == 200
        assert b"[DONE]" in b"".join(iter(lambda: busy.recv(4096), b""))
    warnings = [record for record in caplog.records if "ulimit -n" in record.getMessage()]
    assert len(warnings) == 1  # not one per connection


def test_of_connections_that_come_at_once_the_first_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    all_wait = threading.Event()
    made = connections.PatientProtocol.connection_made

    def connection_made(self: connections.PatientProtocol, transport: Any) -> None:
        all_wait.wait()  # the loop's clock stands still until all have come
        made(self, transport)

    monkeypatch.setattr(connections, "most_connections", lambda: 8)
    monkeypatch.setattr(connections.PatientProtocol, "connection_made", connection_made)
    with serving(engine(reply)) as (url, _), ExitStack() as stack:
        made_in_order = [stack.enter_context(connect(url)) for _ in range(40)]
        last = made_in_order[-8:]
        for one in last:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        all_wait.set()
        assert [one.recv(4096)[:12] for one in last] == [b"HTTP/1.1 200"] * 8


SERVER = """
import sys
from tests.proxy import proxied
from tests.talker import engine, serving
with serving(engine(lambda question: "fine")) as (url, _):
    print(url, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ulimit")
def test_two_hundred_idle_connections_do_not_use_up_the_files() -> None:
    import resource

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    command = [sys.executable, "-c", SERVER]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, text=True, env=env, preexec_fn=few_files, **pipes) as server:
        url = server.stdout.readline().strip()  # type: ignore[union-attr]
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(connect(url))
            assert ask(url).status_code == 200
        _, errors = server.communicate()
    assert "idle connections are being closed" in errors and "ulimit -n" in errors
