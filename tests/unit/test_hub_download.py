"""Download shards with the real huggingface_hub client from a server that misbehaves on purpose."""

import base64
import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.hub.server import Hub, Repo
from zangchat.dataset import find_dataset, folder_lock, hub
from zangchat.dataset.__main__ import main
from zangchat.dataset.manifest import check_shard
from zangchat.dataset.shards import write_shard
from zangchat.errors import UserError

ROOT = Path(__file__).parents[2]
REPO = hub.HUB_REPOS["climbmix"]
SHARD0, SHARD1, LAST = (f"{REPO}/shard_{number:05d}.parquet" for number in (0, 1, 4))
NUM_SHARDS = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo")
    for i in range(NUM_SHARDS):
        write_shard(
            folder / f"shard_{i:05d}.parquet",
            [
                f"shard {i} document {j} {hashlib.sha256(f'{i} {j}'.encode()).hexdigest()}"
                for j in range(1500)
            ],
        )
    return {
        "README.md": b"# readme",
        **{path.name: path.read_bytes() for path in sorted(folder.iterdir())},
    }


@pytest.fixture
def server(files, monkeypatch, tmp_path):
    with Hub([Repo(REPO, dict(files))]) as server:
        for name, value in server.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(hub, "RETRY_WAIT", 0.01)
        yield server
        assert not server.unknown


def download(num_shards=2, source="climbmix"):
    return hub.download(source, num_shards, num_workers=2)


def same_files(dataset, server):
    return all(
        (dataset.folder / entry["name"]).read_bytes() == server.repos[REPO].files[entry["name"]]
        for entry in dataset.manifest["shards"]
    )


def leftovers(folder):
    return [
        path.name
        for path in folder.iterdir()
        if not re.fullmatch(r"shard_\d{5}\.parquet|manifest\.json", path.name)
    ]


def test_download_takes_the_first_shards_and_the_last_for_validation(server):
    dataset = download(2)
    assert dataset.shards("train") == ["shard_00000.parquet", "shard_00001.parquet"]
    assert dataset.shards("validation") == ["shard_00004.parquet"]
    assert same_files(dataset, server) and not leftovers(dataset.folder)
    assert dataset.manifest["revision"] == server.repos[REPO].revision and dataset.arrives_in_order
    assert [entry["sha256"] for entry in dataset.manifest["shards"]] == [
        hashlib.sha256(server.repos[REPO].files[entry["name"]]).hexdigest()
        for entry in dataset.manifest["shards"]
    ]
    assert next(dataset.iter_documents("validation")).startswith("shard 4 document 0")
    assert main(["verify"]) == 0


def test_repeated_download_fetches_only_missing_shards(server, capsys):
    first = download(1)
    server.requests.clear()
    assert download(1).fingerprint == first.fingerprint
    assert server.requests == [] and "already" in capsys.readouterr().out
    more = download(3)
    assert more.shards("train") == [f"shard_{i:05d}.parquet" for i in range(3)] and same_files(
        more, server
    )
    assert not server.fetched(SHARD0) and not server.fetched(LAST)
    assert download(-1).shards("train") == [f"shard_{i:05d}.parquet" for i in range(4)]
    server.requests.clear()
    assert len(download(2).shards("train")) == 4, "what is there is never forgotten"
    assert server.requests == []


def test_an_interrupted_download_can_be_made_smaller(server):
    server.faults[SHARD1] = [404] * 100
    with pytest.raises(UserError, match="shard_00001"):
        hub.download("climbmix", -1, num_workers=1)
    server.requests.clear()
    dataset = download(1)
    assert dataset.shards("train") == ["shard_00000.parquet"] and server.requests == []
    assert find_dataset("climbmix").fingerprint == dataset.fingerprint
    server.faults.clear()
    assert same_files(download(3), server)


def test_broken_download_resumes_midway(server, tmp_path):
    big = tmp_path / "big.parquet"  # the client keeps a partial download in steps of 10 MiB
    write_shard(
        big, [base64.b64encode(random.Random(i).randbytes(1 << 20)).decode() for i in range(13)]
    )
    server.repos[REPO].files["shard_00000.parquet"] = big.read_bytes()
    server.faults[SHARD0] = [("drop", 12_000_000)]
    assert same_files(download(1), server)
    first, second = server.fetched(SHARD0)
    assert first is None and int(second.removeprefix("bytes=").removesuffix("-")) >= 10_000_000


@pytest.mark.parametrize("fault", [503, 500, ("truncated", 1000), "wrong"])
def test_temporary_fault_is_retried(server, fault):
    server.faults[SHARD1] = [fault]
    dataset = download(2)
    assert same_files(dataset, server) and not leftovers(dataset.folder)
    assert len(server.fetched(SHARD1)) >= 2


def test_wrong_bytes_never_reach_the_dataset(server, capsys):
    server.faults[SHARD1] = ["wrong"] * 100
    with pytest.raises(
        UserError,
        match=r"shard_00001\.parquet could not be fetched intact .*its sha256 is not the manifest's",
    ):
        download(2)
    folder = find_dataset("climbmix").folder
    assert not (folder / "shard_00001.parquet").exists()
    server.faults.clear()
    server.requests.clear()
    dataset = download(2)
    assert same_files(dataset, server) and not leftovers(folder)
    assert len(server.fetched(SHARD1)) == 1
    assert not server.fetched(LAST), "the whole shards stay"


def test_permanently_failing_server_is_given_up(server):
    server.faults[SHARD0] = [503] * 100
    with pytest.raises(
        UserError,
        match=r"shard_00000\.parquet could not be fetched intact .*in 5 tries .*run the same "
        r"command again",
    ):
        download(1)
    assert len(server.fetched(SHARD0)) == hub.TRIES


def test_verify_reports_a_damaged_shard_and_repair_fetches_it(server, capsys):
    dataset = download(1)
    shard = dataset.folder / "shard_00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert main(["verify"]) == 2
    assert "shard_00000.parquet (its sha256" in capsys.readouterr().err
    assert main(["verify", "--repair"]) == 0
    assert same_files(dataset, server) and main(["verify"]) == 0


def test_repair_keeps_what_a_running_download_has_brought_meanwhile(server, monkeypatch):
    dataset = download(2)
    shard = dataset.folder / "shard_00001.parquet"
    aside = shard.rename(shard.with_suffix(".aside"))

    def check(path, entry):
        problem = check_shard(path, entry)
        if problem:
            aside.rename(path)
        return problem

    monkeypatch.setattr("zangchat.dataset.__main__.check_shard", check)
    server.requests.clear()
    assert main(["verify", "--repair"]) == 0
    assert same_files(dataset, server) and server.requests == []


def test_leftovers_of_a_killed_process_are_removed(server):
    download(1)
    folder = find_dataset("climbmix").folder
    (folder / hub.INCOMING / "dead").mkdir(parents=True)
    (folder / hub.INCOMING / "dead" / "half.incomplete").write_bytes(b"x")
    (folder / "shard_00000.parquet").write_bytes(b"half")
    dataset = download(1)
    assert same_files(dataset, server) and not leftovers(folder)


def test_the_end_of_a_corpus_of_one_file_is_for_validation(server, files):
    lone = {"README.md": b"# readme", "stories.parquet": files["shard_00000.parquet"]}
    name = hub.HUB_REPOS["tinystories"]
    server.repos[name] = Repo(name, lone)
    dataset = download(-1, source="tinystories")
    assert dataset.shards("train") == dataset.shards("validation") == ["stories.parquet"]
    train, validation = map(list, map(dataset.iter_documents, ("train", "validation")))
    assert (len(train), len(validation)) == (1024, 476) and not {*train} & {*validation}
    assert download(1, source="tinystories").fingerprint == dataset.fingerprint
    with pytest.raises(UserError, match=r"-n 2: .* has 1 training shard, whose end is for valid"):
        download(2, source="tinystories")
    del server.repos[REPO].files["shard_00001.parquet"]
    for number in (2, 3, 4):
        del server.repos[REPO].files[f"shard_0000{number}.parquet"]
    with pytest.raises(UserError, match="is the mirror complete"):
        download(1)


def test_too_many_shards_are_refused(server):
    with pytest.raises(UserError, match=r"-n 9: .* has 4 training shards"):
        download(9)


def test_repository_missing_on_the_mirror_is_named(server):
    with pytest.raises(
        UserError, match=r"does not list karpathy/fineweb-edu-100b-shuffle .*--source=pydocs"
    ):
        download(1, source="fineweb-edu")


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    hub.unreachable.cache_clear()
    close_session()  # it has read the variables
    yield
    close_session()


def test_the_hub_is_asked_through_the_proxy_of_its_client(no_proxies, monkeypatch):
    with Hub([]) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert hub.unreachable("http://hub.example") == ""
        assert proxy.unknown == ["HEAD http://hub.example/"]


def test_it_is_said_why_the_hub_cannot_be_reached(no_proxies, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "no.address")
    with pytest.raises(
        UserError, match=r"cannot be reached \(.*(protocol|scheme).*--source=pydocs"
    ):
        download(1)


@pytest.mark.parametrize("settings", [constants, datasets.config])
def test_a_hub_that_is_switched_off_is_not_tried_again(base_dir, monkeypatch, settings):
    tries = []

    def load(*args):
        tries.append(args)
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr(hub, "RETRY_WAIT", 0.01)
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError):
        hub.fetch_table("owner/name", "", "train")
    assert len(tries) == 1


def test_a_full_disk_is_told_at_once(server, monkeypatch, capsys):
    tries = []

    def fetch(*args, **kwargs):
        tries.append(args)
        raise RuntimeError("not written") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    assert main(["-n", "1", "-w", "1"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device: make room" in error and "HF_ENDPOINT" not in error
    assert len(tries) == 1


def test_file_missing_on_the_mirror_is_named(server):
    download(1)
    del server.repos[REPO].files["shard_00002.parquet"]
    manifest = find_dataset("climbmix").folder / "manifest.json"
    entries = json.loads(manifest.read_text())
    entries["shards"].insert(
        1, {"name": "shard_00002.parquet", "split": "train", "bytes": 5, "sha256": "0" * 64}
    )
    manifest.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"shard_00002\.parquet is not in .*is the mirror complete"):
        download(2)


def test_concurrent_downloads_are_refused(server, monkeypatch):
    dataset = download(1)
    monkeypatch.setattr(hub, "LOCK_WAIT", 0.1)
    with (
        folder_lock(dataset.folder),
        pytest.raises(UserError, match="another process is writing to"),
    ):
        download(2)


def test_command_downloads_and_fails_with_an_exit_code(server, base_dir):
    def run(*arguments):
        command = [sys.executable, "-m", "zangchat.dataset", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120
        )

    done = run("-n", "1")
    assert done.returncode == 0, done.stderr
    assert "climbmix: 1 training shard and the validation shard in" in done.stdout
    assert (base_dir / "base_data" / "climbmix" / "shard_00004.parquet").exists()
    failed = run("--source=fineweb-edu", "-n", "1")
    assert (
        failed.returncode == 2
        and "does not list" in failed.stderr
        and "Traceback" not in failed.stderr
    )
