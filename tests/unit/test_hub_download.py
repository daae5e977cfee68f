"""Shards from the hub: the real huggingface_hub client against a small server that misbehaves on purpose."""

import base64
import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from zangchat import hub
from zangchat.configurator import UserError
from zangchat.dataset import find_dataset, folder_lock, main, write_shard

ROOT = Path(__file__).parents[2]
REPO = hub.HUB_REPOS["climbmix"]
REVISION = "0123456789abcdef0123456789abcdef01234567"
NUM_SHARDS = 5


class Hub(http.server.ThreadingHTTPServer):
    """One dataset repository. `faults[name]` lists what goes wrong at the next requests for that file's content: an HTTP status,
    ("drop", n): the connection breaks after n bytes, ("truncated", n): a shorter file, "wrong": other bytes of the same length."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.faults = {}
        self.requests = []  # (method, what, Range)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self, name):
        """The Range headers (or None) of the requests for a file's content."""
        return [ranges for method, what, ranges in self.requests if method == "GET" and what == name]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == f"/api/datasets/{REPO}":
            self.note("info")
            self.json({"id": REPO, "sha": REVISION, "siblings": [], "tags": [], "private": False, "downloads": 0, "likes": 0})
        elif path.startswith(f"/api/datasets/{REPO}/tree/{REVISION}"):
            self.note("tree")
            self.json([self.entry(name, content) for name, content in self.server.files.items()])
        elif path.startswith(f"/datasets/{REPO}/resolve/{REVISION}/"):
            self.file(path.rpartition("/")[2])
        else:
            self.note(path)
            self.json({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})

    def note(self, what):
        self.server.requests.append((self.command, what, self.headers.get("Range")))

    def entry(self, name, content):
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "lfs": lfs}

    def json(self, value, status=200, headers=None):
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, header in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, header)
        self.end_headers()
        self.wfile.write(body)

    def file(self, name):
        self.note(name)
        if name not in self.server.files:
            return self.json({"error": "Entry not found"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        content = self.server.files[name]
        digest = hashlib.sha256(content).hexdigest()
        fault = None
        if self.command == "GET" and self.server.faults.get(name):
            fault = self.server.faults[name].pop(0)
        if isinstance(fault, int):
            return self.json({"error": "a bad day"}, status=fault)
        if fault == "wrong":
            content = bytes(byte ^ 255 for byte in content)
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
        body = content[start:]
        sent = body[: fault[1]] if isinstance(fault, tuple) else body
        length = len(sent) if isinstance(fault, tuple) and fault[0] == "truncated" else len(body)
        self.send_response(206 if start else 200)
        headers = {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": REVISION}
        headers |= {"Accept-Ranges": "bytes", "Content-Length": str(length)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(sent)
            if isinstance(fault, tuple):
                self.wfile.flush()
                self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo")
    for i in range(NUM_SHARDS):
        write_shard(
            folder / f"shard_{i:05d}.parquet",
            [f"shard {i} document {j} {hashlib.sha256(f'{i} {j}'.encode()).hexdigest()}" for j in range(1500)],
        )
    return {"README.md": b"# readme", **{path.name: path.read_bytes() for path in sorted(folder.iterdir())}}


@pytest.fixture
def server(files, monkeypatch, tmp_path):
    server = Hub(dict(files))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hub, "RETRY_WAIT", 0.01)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield server
    server.shutdown()
    server.server_close()


def download(num_shards=2, source="climbmix"):
    return hub.download(source, num_shards, num_workers=2)


def same_files(dataset, server):
    return all((dataset.folder / entry["name"]).read_bytes() == server.files[entry["name"]] for entry in dataset.manifest["shards"])


def leftovers(folder):
    return [path.name for path in folder.iterdir() if not re.fullmatch(r"shard_\d{5}\.parquet|manifest\.json", path.name)]


def test_the_first_shards_and_the_last_for_validation(server):
    dataset = download(2)
    assert dataset.shards("train") == ["shard_00000.parquet", "shard_00001.parquet"]
    assert dataset.shards("validation") == ["shard_00004.parquet"]
    assert same_files(dataset, server) and not leftovers(dataset.folder)
    assert dataset.manifest["revision"] == REVISION and dataset.arrives_in_order
    assert [entry["sha256"] for entry in dataset.manifest["shards"]] == [
        hashlib.sha256(server.files[entry["name"]]).hexdigest() for entry in dataset.manifest["shards"]
    ]
    assert next(dataset.iter_documents("validation")).startswith("shard 4 document 0")
    assert main(["verify"]) == 0


def test_again_fetches_nothing_and_more_fetches_only_more(server, capsys):
    first = download(1)
    server.requests.clear()
    assert download(1).fingerprint == first.fingerprint
    assert server.requests == [] and "already" in capsys.readouterr().out
    more = download(3)
    assert more.shards("train") == [f"shard_{i:05d}.parquet" for i in range(3)] and same_files(more, server)
    assert not server.fetched("shard_00000.parquet") and not server.fetched("shard_00004.parquet")
    assert download(-1).shards("train") == [f"shard_{i:05d}.parquet" for i in range(4)]
    server.requests.clear()
    assert len(download(2).shards("train")) == 4, "what is there is never forgotten"
    assert server.requests == []


def test_a_broken_connection_goes_on_where_it_broke(server, tmp_path):
    big = tmp_path / "big.parquet"  # the client keeps what has come in pieces of 10 MiB
    write_shard(big, [base64.b64encode(random.Random(i).randbytes(1 << 20)).decode() for i in range(13)])
    server.files["shard_00000.parquet"] = big.read_bytes()
    server.faults["shard_00000.parquet"] = [("drop", 12_000_000)]
    assert same_files(download(1), server)
    first, second = server.fetched("shard_00000.parquet")
    assert first is None and int(second.removeprefix("bytes=").removesuffix("-")) >= 10_000_000


@pytest.mark.parametrize("fault", [503, 500, ("truncated", 1000), "wrong"])
def test_a_passing_fault_is_tried_again(server, fault):
    server.faults["shard_00001.parquet"] = [fault]
    dataset = download(2)
    assert same_files(dataset, server) and not leftovers(dataset.folder)
    assert len(server.fetched("shard_00001.parquet")) >= 2


def test_wrong_bytes_never_reach_the_dataset(server, capsys):
    server.faults["shard_00001.parquet"] = ["wrong"] * 100
    with pytest.raises(UserError, match=r"shard_00001\.parquet could not be fetched intact .*its sha256 is not the manifest's"):
        download(2)
    folder = find_dataset("climbmix").folder
    assert not (folder / "shard_00001.parquet").exists()
    server.faults.clear()
    server.requests.clear()
    dataset = download(2)
    assert same_files(dataset, server) and not leftovers(folder)
    assert len(server.fetched("shard_00001.parquet")) == 1
    assert not server.fetched("shard_00004.parquet"), "the whole shards stay"


def test_a_server_that_always_fails_is_given_up(server):
    server.faults["shard_00000.parquet"] = [503] * 100
    with pytest.raises(UserError, match=r"shard_00000\.parquet could not be fetched intact .*in 5 tries .*run the same command again"):
        download(1)
    assert len(server.fetched("shard_00000.parquet")) == hub.TRIES


def test_a_damaged_shard_is_named_by_verify_and_fetched_by_repair(server, capsys):
    dataset = download(1)
    shard = dataset.folder / "shard_00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert main(["verify"]) == 2
    assert "shard_00000.parquet (its sha256" in capsys.readouterr().err
    assert main(["verify", "--repair"]) == 0
    assert same_files(dataset, server) and main(["verify"]) == 0


def test_what_was_left_by_a_killed_process_is_cleared(server):
    download(1)
    folder = find_dataset("climbmix").folder
    (folder / hub.INCOMING / "dead").mkdir(parents=True)
    (folder / hub.INCOMING / "dead" / "half.incomplete").write_bytes(b"x")
    (folder / "shard_00000.parquet").write_bytes(b"half")
    dataset = download(1)
    assert same_files(dataset, server) and not leftovers(folder)


def test_more_shards_than_there_are_is_refused(server):
    with pytest.raises(UserError, match=r"-n 9: .* has 4 training shards"):
        download(9)


def test_a_repository_that_the_mirror_lacks_is_named(server):
    with pytest.raises(UserError, match=r"does not list karpathy/fineweb-edu-100b-shuffle .*--source=pydocs"):
        download(1, source="fineweb-edu")


def test_a_file_that_the_mirror_lacks_is_named(server):
    download(1)
    del server.files["shard_00002.parquet"]
    manifest = find_dataset("climbmix").folder / "manifest.json"
    entries = json.loads(manifest.read_text())
    entries["shards"].insert(1, {"name": "shard_00002.parquet", "split": "train", "bytes": 5, "sha256": "0" * 64})
    manifest.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"shard_00002\.parquet is not in .*is the mirror complete"):
        download(2)


def test_two_downloads_do_not_meet(server, monkeypatch):
    dataset = download(1)
    monkeypatch.setattr(hub, "LOCK_WAIT", 0.1)
    with folder_lock(dataset.folder), pytest.raises(UserError, match="another process is writing to"):
        download(2)


def test_the_command_fetches_and_fails_with_an_exit_code(server, base_dir):
    def run(*arguments):
        command = [sys.executable, "-m", "zangchat.dataset", *arguments]
        return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)

    done = run("-n", "1")
    assert done.returncode == 0, done.stderr
    assert "climbmix: 1 training shards and the validation shard are in" in done.stdout
    assert (base_dir / "base_data" / "climbmix" / "shard_00004.parquet").exists()
    failed = run("--source=fineweb-edu", "-n", "1")
    assert failed.returncode == 2 and "does not list" in failed.stderr and "Traceback" not in failed.stderr
