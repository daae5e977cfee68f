"""A stand-in for the Hugging Face hub: an HTTP server with files in memory that can misbehave.

    with Hub([Repo("cais/mmlu", files)]) as hub:
        environment = hub.environment(folder)   # for a process that sees only this hub

`hub.faults[target]` lists the faults of the next requests for `target`, in order:

    None              nothing                               503               that status
    ("busy", s)       429, with Retry-After                 ("slow", s)       an answer after s
                      seconds
    ("drop", n)       the connection breaks after n bytes   ("truncated", n)  a shorter file
    "wrong"           other bytes, as many as listed        ("changed", b)    the bytes b: the file
                      changed since it was listed

`target` is "REPO/path" for a file, "REPO" for the API's answers about a repository, and just the
path for a file outside the hub.
"""

import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOCAL = "127.0.0.1,localhost"
LFS_BYTES = 4096  # the real hub keeps smaller text files in git and gives no sha256 for them


@dataclass
class Repo:
    """One dataset repository with one commit."""

    name: str
    files: dict[str, bytes]
    revision: str = field(init=False)

    def __post_init__(self) -> None:
        self.revision = hashlib.sha1(self.name.encode()).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """A file as the API lists it."""
        content = self.files[path]
        listed: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        if is_lfs(path, content):
            listed["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 134,
            }
        return listed

    def listing(self, below: str, recursive: bool) -> list[dict[str, Any]]:
        """The files and folders below a folder ("" for the root)."""
        start = f"{below}/" if below else ""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.files):
            if not path.startswith(start):
                continue
            steps = path.removeprefix(start).split("/")
            for depth in range(1, len(steps) if recursive else min(len(steps), 2)):
                folder = start + "/".join(steps[:depth])
                found.setdefault(
                    folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
                )
            if recursive or len(steps) == 1:
                found[path] = self.entry(path)
        return list(found.values())


def is_lfs(path: str, content: bytes) -> bool:
    return path.endswith((".parquet", ".zip")) or len(content) > LFS_BYTES


class Hub(http.server.ThreadingHTTPServer):
    """A server of `repos`. `beside`: variable -> (path, content) of a file outside the hub.

    `variables` holds the address of each such file. `requests` holds (method, target, Range) of all
    requests, `unknown` those that the hub does not support.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        repos: Iterable[Repo],
        beside: Mapping[str, tuple[str, bytes]] | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.repos = {repo.name: repo for repo in repos}
        self.files = dict((beside or {}).values())  # path -> content
        self.variables = {"HF_ENDPOINT": self.url} | {
            name: self.url + path for name, (path, _) in (beside or {}).items()
        }
        self.faults: dict[str, list[Any]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.unknown: list[str] = []

    def __enter__(self) -> "Hub":
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that make a process use only this hub and keep its caches below `home`."""
        return {**self.variables, "HF_HOME": str(home), "NO_PROXY": LOCAL, "no_proxy": LOCAL}

    def fetched(self, target: str) -> list[str | None]:
        """The Range headers (or None) of the requests for a file's content."""
        return [
            ranges
            for method, requested, ranges in self.requests
            if method == "GET" and requested == target
        ]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path)
        form = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        parameters = urllib.parse.parse_qs(form or query)
        if path in ("/", "/api/agent-harnesses"):
            self.json({})
        elif path in self.server.files:
            self.content(
                path,
                self.server.files[path],
                {"ETag": f'"{hashlib.md5(self.server.files[path]).hexdigest()}"'},
            )
        elif api := re.fullmatch(
            r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path
        ):
            self.api(*api.groups(), parameters)
        elif file := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*file.groups())
        # the target of the redirect in `resolve`
        elif stored := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            self.content(
                f"{stored[1]}/{stored[2]}", self.server.repos[stored[1]].files[stored[2]], {}
            )
        else:
            self.server.unknown.append(f"{self.command} {self.path}")
            self.json({"error": "Not Found"}, 404)

    # ---- the API ---------------------------------------------------------------------------------

    def api(
        self,
        name: str,
        kind: str | None,
        revision: str | None,
        below: str | None,
        parameters: dict[str, list[str]],
    ) -> None:
        if self.refused(name) or not (repo := self.repo(name, revision)):
            return
        if kind == "tree":
            self.json(
                repo.listing(below or "", parameters.get("recursive") in (["true"], ["True"]))
            )
        elif kind == "paths-info":
            self.json(
                [repo.entry(path) for path in parameters.get("paths", []) if path in repo.files]
            )
        else:
            siblings = [{"rfilename": path} for path in sorted(repo.files)]
            self.json(
                {
                    "id": name,
                    "sha": repo.revision,
                    "siblings": siblings,
                    "tags": [],
                    "private": False,
                    "downloads": 0,
                    "likes": 0,
                }
            )

    def repo(self, name: str, revision: str | None) -> Repo | None:
        """The repository; None if it, or the revision, has been refused."""
        repo = self.server.repos.get(name)
        if repo is None:
            self.json(
                {"error": "Repository not found"},
                404,
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            )
        elif revision not in (None, "main", repo.revision):
            self.json(
                {"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"}
            )
            repo = None
        return repo

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name, revision)
        if repo is None:
            return
        target = f"{name}/{path}"
        if path not in repo.files:
            self.note(target)
            return self.json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content, listed = repo.files[path], repo.entry(path)
        headers = {"X-Repo-Commit": repo.revision, "ETag": f'"{listed["oid"]}"'}
        if "lfs" not in listed:
            return self.content(target, content, headers)
        headers |= {
            "X-Linked-Etag": f'"{listed["lfs"]["oid"]}"',
            "X-Linked-Size": str(len(content)),
        }
        # redirect to another host, as the real hub does: the client must identify the file by the
        # headers of this answer
        storage = f"http://localhost:{self.server.server_address[1]}/storage/"
        self.json({}, 302, headers | {"Location": storage + urllib.parse.quote(target)})

    # ---- answers ---------------------------------------------------------------------------------

    def note(self, target: str) -> None:
        self.server.requests.append((self.command, target, self.headers.get("Range")))

    def refused(self, target: str) -> Any:
        """Record the request, then delay or refuse it if such a fault is due.

        Returns any fault but a delay.
        """
        self.note(target)
        due = self.server.faults.get(target)
        fault = due.pop(0) if due and self.command != "HEAD" else None
        if isinstance(fault, tuple) and fault[0] == "slow":
            time.sleep(fault[1])
            return None
        if isinstance(fault, tuple) and fault[0] == "busy":
            self.json({"error": "Too Many Requests"}, 429, {"Retry-After": str(fault[1])})
        elif isinstance(fault, int):
            self.json({"error": "a bad day"}, fault)
        return fault

    def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, header in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def content(self, target: str, content: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the requested range of it."""
        fault = self.refused(target)
        kind = fault[0] if isinstance(fault, tuple) else fault
        if isinstance(kind, int) or kind == "busy":
            return
        if kind == "wrong":
            content = bytes(byte ^ 255 for byte in content)
        elif kind == "changed":
            content = fault[1]
        start, end = 0, len(content)
        if ranges := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(ranges[1]), min(end, int(ranges[2]) + 1 if ranges[2] else end)
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        body = content[start:end]
        sent = body[: fault[1]] if kind in ("drop", "truncated") else body
        self.send_response(206 if ranges else 200)
        headers = headers | {
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(sent) if kind == "truncated" else len(body)),
        }
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
            if kind in ("drop", "truncated"):
                self.wfile.flush()
                self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print nothing: `requests` has them all."""
