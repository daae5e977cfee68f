"""Shared basics: the base folder, files, downloads, logs, seeds, devices, processes."""

import errno
import hashlib
import http.server
import json
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.machines import gpus, nvidia_smi
from zangchat import checkpoint_manager, common, configurator
from zangchat.configurator import to_dict
from zangchat.errors import UserError
from zangchat.runtime import devices, memory
from zangchat.runtime.devices import device_synchronize, resolve_dtype
from zangchat.runtime.downloads import DOWNLOAD_TRIES
from zangchat.runtime.files import atomic_file, atomic_write, expand_home
from zangchat.runtime.logs import get_wandb, log0
from zangchat.runtime.memory import (
    available_memory,
    device_memory,
    free_memory,
    peak_memory_bytes,
)
from zangchat.runtime.seeds import derive_seed
from zangchat.training.flags import RunConfig

# -- files -----------------------------------------------------------------------------------------


def test_base_folder_is_set_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path / "a" / "b"))
    assert common.get_base_dir() == tmp_path / "a" / "b"
    assert common.get_base_dir().is_dir()


def test_base_folder_without_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("ZANGCHAT_BASE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.get_base_dir() == tmp_path / ".cache" / "zangchat"


def test_impossible_base_folder_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(UserError, match="cannot be made .*: set ZANGCHAT_BASE_DIR"):
        common.get_base_dir()


def test_unknown_home_is_reported(monkeypatch):
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", "~nobody-of-that-name/base")
    with pytest.raises(
        UserError, match="~nobody-of-that-name/base cannot be made .*: set ZANGCHAT_BASE_DIR"
    ):
        common.get_base_dir()
    with pytest.raises(
        UserError, match="~nobody-of-that-name/text leads nowhere .*: write the path without ~"
    ):
        expand_home("~nobody-of-that-name/text")


def test_atomic_write_creates_and_replaces_files(tmp_path):
    path = tmp_path / "new" / "file.txt"
    atomic_write(path, "línea\n")
    assert path.read_bytes() == "línea\n".encode()
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_lone_surrogates_are_written_like_in_json(tmp_path):
    atomic_write(tmp_path / "path.json", json.dumps({"path": "n\udcff"}, ensure_ascii=False))
    assert json.loads((tmp_path / "path.json").read_text(encoding="utf-8")) == {"path": "n\udcff"}


def test_failed_write_keeps_the_old_file_and_leaves_no_rubbish(tmp_path):
    path = tmp_path / "file.txt"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError, match="disk"), atomic_file(path) as file:
        file.write(b"half of the n")
        raise RuntimeError("disk full")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        status = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        sync(descriptor)

    def renaming(source: str, target: str) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    atomic_write(tmp_path / "a", "text")
    assert done == ["4 bytes", "rename", "folder"]


def test_atomic_files_have_ordinary_permissions(tmp_path):
    atomic_write(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


# -- downloads -------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Responds with each of `answers` in order, and with the file afterwards."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[str] = []
        self.requests = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests += 1
            answer = self.server.answers.pop(0) if self.server.answers else "file"
        if answer.isdigit():
            self.send_error(int(answer))
            return
        body = {"file": CONTENT, "truncated": CONTENT, "wrong": CONTENT[::-1]}[answer]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if answer == "truncated" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def rubbish(base: Path) -> list[str]:
    return [
        p.name
        for p in base.rglob("*")
        if p.is_file() and p.name != "file.bin" and not p.name.endswith(".lock")
    ]


def test_download_is_complete_and_happens_once(server, base_dir):
    for _ in range(2):
        path = common.download_file_with_lock(server.url, "sub/file.bin", sha256=DIGEST)
        assert path == base_dir / "sub" / "file.bin"
        assert path.read_bytes() == CONTENT
    assert server.requests == 1
    assert rubbish(base_dir) == []


@pytest.mark.parametrize(
    "answers", [["500"], ["503", "429"], ["truncated"], ["wrong", "truncated", "500", "408"]]
)
def test_temporary_download_errors_are_retried(server, base_dir, answers):
    server.answers = list(answers)
    path = common.download_file_with_lock(server.url, "file.bin", sha256=DIGEST)
    assert path.read_bytes() == CONTENT
    assert server.requests == len(answers) + 1


@pytest.mark.parametrize(
    ("answers", "problem", "requests"),
    [
        (["404"] * 9, "answered 404", 1),
        (["503"] * 9, "answered 503", DOWNLOAD_TRIES),
        (["wrong"] * 9, "sha256", DOWNLOAD_TRIES),
        (["truncated"] * 9, "bytes", DOWNLOAD_TRIES),
    ],
)
def test_permanent_download_errors_are_reported_and_leave_nothing(
    server, base_dir, answers, problem, requests
):
    server.answers = answers
    with pytest.raises(UserError, match=problem) as caught:
        common.download_file_with_lock(server.url, "file.bin", sha256=DIGEST)
    assert server.url in str(caught.value) and str(base_dir / "file.bin") in str(caught.value)
    assert server.requests == requests
    assert not (base_dir / "file.bin").exists()
    assert rubbish(base_dir) == []


def test_a_download_needs_an_address(base_dir):
    for url in ("mirror.example/file.bin", "/data/file.bin"):
        with pytest.raises(UserError, match=f"{url} .*: an address begins with https://"):
            common.download_file_with_lock(url, "file.bin")


def test_a_full_disk_ends_a_download(server, base_dir, monkeypatch):
    def sync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="No space left"):
        common.download_file_with_lock(server.url, "file.bin")
    assert server.requests == 1 and rubbish(base_dir) == []


def test_download_without_a_server(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        with pytest.raises(UserError, match="could not download"):
            common.download_file_with_lock(
                f"http://127.0.0.1:{taken.getsockname()[1]}/x", "file.bin"
            )


def test_damaged_file_is_downloaded_again(server, base_dir):
    (base_dir / "file.bin").write_bytes(b"damaged")
    assert (
        common.download_file_with_lock(server.url, "file.bin", sha256=DIGEST).read_bytes()
        == CONTENT
    )


def test_file_gets_its_name_after_postprocessing(server, base_dir):
    seen = []

    def process(path: Path) -> None:
        assert not (base_dir / "file.bin").exists()
        seen.append(path.read_bytes())
        if len(seen) == 1:
            raise ValueError("not a zip file")

    with pytest.raises(ValueError, match="zip"):
        common.download_file_with_lock(server.url, "file.bin", process)
    assert not (base_dir / "file.bin").exists()
    common.download_file_with_lock(server.url, "file.bin", process)
    common.download_file_with_lock(server.url, "file.bin", process)
    assert seen == [CONTENT, CONTENT]


def test_concurrent_calls_download_once(server, base_dir):
    threads = [
        threading.Thread(target=common.download_file_with_lock, args=(server.url, "file.bin"))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == 1
    assert (base_dir / "file.bin").read_bytes() == CONTENT


# -- seeds -----------------------------------------------------------------------------------------


def test_seeds_are_stable():
    assert derive_seed(42, "shuffle", 0, 1) == 4056893683753119832
    assert derive_seed() == 724655455495936113


def test_seeds_differ_and_have_63_bits():
    parts = [(seed, purpose, i) for seed in (0, 1, -1) for purpose in ("a", "b") for i in range(50)]
    seeds = {derive_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    torch.Generator().manual_seed(max(seeds))


def test_seeds_distinguish_types_and_boundaries():
    assert derive_seed("1") != derive_seed(1)
    assert derive_seed("a", "b") != derive_seed("ab")
    assert derive_seed(1, 0) != derive_seed(10)
    assert derive_seed(1.0) != derive_seed(1)


def test_seeds_accept_numpy_integers_and_refuse_values_without_stable_text():
    assert derive_seed(np.int64(7), (np.int32(1), "x")) == derive_seed(7, (1, "x"))
    with pytest.raises(TypeError, match="set"):
        derive_seed({1, 2})


# -- logs and terminal -----------------------------------------------------------------------------


def record(level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("zangchat.x", level, "x.py", 1, "loss is %d", (7,), None)


def test_colours_are_used_only_on_terminals():
    painted, plain = (
        common.ColoredFormatter(color=True).format(record()),
        common.ColoredFormatter(color=False).format(record()),
    )
    assert "\x1b[33mWARNING\x1b[0m" in painted
    assert "\x1b" not in plain
    assert plain.endswith("WARNING zangchat.x: loss is 7")


def test_colouring_does_not_change_the_record():
    r = record()
    common.ColoredFormatter(color=True).format(r)
    assert r.levelname == "WARNING"


@pytest.fixture
def fresh_logging():
    root = logging.getLogger()
    handlers = list(root.handlers)
    for handler in handlers:
        if isinstance(handler.formatter, common.ColoredFormatter):
            root.removeHandler(handler)
    yield root
    root.handlers[:] = handlers


def test_default_logging_is_set_up_once_and_only_for_our_loggers(fresh_logging, capsys):
    before = len(fresh_logging.handlers)
    common.setup_default_logging()
    common.setup_default_logging()
    assert len(fresh_logging.handlers) == before + 1
    logging.getLogger("zangchat.training.trainer").info("ours")
    logging.getLogger("httpx").info("theirs")
    err = capsys.readouterr().err
    assert err.count("ours") == 1 and "theirs" not in err


def test_other_ranks_are_quiet(fresh_logging, capsys, monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    common.setup_default_logging()
    logging.getLogger("zangchat.training.trainer").info("progress")
    logging.getLogger("zangchat.training.trainer").warning("trouble")
    common.print0("hello")
    common.print_banner()
    captured = capsys.readouterr()
    assert captured.out == "" and "trouble" in captured.err and "progress" not in captured.err


def test_log0_logs_on_rank_0_only(fresh_logging, capsys, monkeypatch):
    common.setup_default_logging()
    log0("saving")
    log0("slow disk", logging.WARNING)
    err = capsys.readouterr().err
    assert "INFO zangchat: saving" in err and "WARNING zangchat: slow disk" in err
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    log0("saving")
    log0("slow disk", logging.WARNING)
    assert capsys.readouterr().err == ""
    assert checkpoint_manager.log0 is log0  # nanochat's place for it


def test_banner_fits_any_terminal(capsys):
    common.print_banner()
    out = capsys.readouterr().out
    assert out.isascii() and max(map(len, out.splitlines())) <= 79


# -- processes and devices -------------------------------------------------------------------------


def test_rank_variable_does_not_make_a_process_group(monkeypatch):
    assert common.get_dist_info() == (False, 0, 0, 1)
    monkeypatch.setenv("RANK", "3")  # as some clusters set it
    assert not common.is_ddp()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert common.get_dist_info() == (True, 3, 1, 4)


# variables left by Slurm, Azure, Kubeflow etc. -> the error; None: the command runs as one process
LEFTOVERS = {
    "RANK= LOCAL_RANK= WORLD_SIZE=": None,
    "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1": None,
    "RANK=unknown": None,
    "RANK=0 LOCAL_RANK= WORLD_SIZE=4": None,
    "LOCAL_WORLD_SIZE=": None,
    "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2": "RANK, LOCAL_RANK, WORLD_SIZE are set and MASTER_ADDR is "
    "not: start with torchrun, or unset these",
    "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1": "are set and MASTER_PORT is not",
    "RANK=1 WORLD_SIZE=2 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500": "RANK and WORLD_SIZE=2 are set "
    "and LOCAL_RANK is not: start with torchrun, or unset RANK",
    "RANK=0 WORLD_SIZE=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500": None,
    "RANK=x LOCAL_RANK=0 WORLD_SIZE=2": "the environment has RANK=x, which is not a number of "
    "processes",
    "RANK=-1 LOCAL_RANK=0 WORLD_SIZE=2": "the environment has RANK=-1",
}


@pytest.mark.parametrize("leftovers", LEFTOVERS)
def test_leftover_cluster_variables(leftovers, monkeypatch, capsys):
    for setting in leftovers.split():
        monkeypatch.setenv(*setting.split("="))

    def command(config):
        assert common.compute_init("cpu")[3] == 1 and device_memory("cpu") > 0
        common.compute_cleanup()
        raise UserError("the end")

    assert configurator.run(RunConfig, command, []) == 2
    problem = LEFTOVERS[leftovers]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and (problem or "error: the end") in error


def test_compute_init_on_a_cpu_seeds_and_cleans_up():
    assert common.compute_init("cpu", seed=3) == (False, 0, 0, 1, torch.device("cpu"))
    first = torch.rand(3)
    common.compute_init("cpu", seed=3)
    assert torch.equal(torch.rand(3), first)
    common.compute_cleanup()
    common.compute_cleanup()


def test_cleaning_up_after_an_interrupted_import_does_not_import_again(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")  # the state after an interrupted import
    common.compute_cleanup()
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("users", "setting"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:256"}, "max_split_size_mb:256"),
    ],
)
def test_cuda_memory_is_mapped_piece_by_piece_unless_the_user_has_a_setting(users, setting):
    """torch is imported before the setting is made, as in every command; its own allocator says
    what it has read."""
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATOR],
        env={**{k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}, **users},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == setting, done.stderr


ALLOCATOR = """
import torch
from zangchat.runtime import devices
devices._check_device = devices.check_kernels = lambda *_: None
torch.cuda.set_device = torch.cuda.manual_seed = lambda *_: None
devices.compute_init("cuda")
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.parametrize("device_type", ["gpu", "cuda:0", "tpu"])
def test_unknown_device_names_the_choices(device_type):
    with pytest.raises(
        UserError, match=f"--device_type={device_type} is not known: choose cuda, mps, cpu"
    ):
        common.compute_init(device_type)


def test_gpu_that_this_torch_has_no_kernels_for_is_named(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution")

    monkeypatch.setattr(devices, "_check_device", lambda *_: None)
    stand_ins = {
        "set_device": lambda _: None,
        "get_device_name": lambda _: "Tesla V100",
        "get_device_capability": lambda _: (7, 0),
        "get_arch_list": lambda: ["sm_75", "sm_120"],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    problem = (
        r"no kernels for Tesla V100 \(compute capability 7.0\), only for sm_75, sm_120: install"
    )
    with pytest.raises(UserError, match=problem):
        common.compute_init("cuda")


@pytest.fixture
def pieces_fail(monkeypatch):
    """A driver that cannot map memory piece by piece; returns the settings that the allocator
    gets."""
    settings = []

    def ones(*_: object, device: torch.device) -> torch.Tensor:
        if not settings:
            raise RuntimeError("CUDA driver error: unknown error\nmore of it")
        return torch.zeros(1)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append, False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    return settings


def test_memory_comes_in_blocks_where_the_driver_cannot_map_pieces(pieces_fail, caplog):
    for number in range(2):
        devices.expand_segments()
        devices.check_kernels(torch.device("cuda", number))
    assert pieces_fail == ["expandable_segments:False"]
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:False", "for child processes"
    [message] = caplog.messages
    assert "(CUDA driver error: unknown error)" in message


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_users_setting_of_the_allocator_stays(pieces_fail, monkeypatch, name):
    monkeypatch.setenv(name, "expandable_segments:True,max_split_size_mb:512")
    devices.expand_segments()
    with pytest.raises(RuntimeError, match="CUDA driver error"):
        devices.check_kernels(torch.device("cuda", 0))
    assert pieces_fail == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_reported():
    with pytest.raises(UserError, match="--device_type=cuda, but torch .* finds no CUDA device"):
        common.compute_init("cuda")


WORKER = """
import torch
from zangchat import common
ddp, rank, local_rank, world_size, device = common.compute_init("cpu")
total = torch.tensor([rank + 1.0])
torch.distributed.all_reduce(total)
assert torch.distributed.get_backend() == "gloo"
common.compute_cleanup()
assert not torch.distributed.is_initialized()
common.compute_cleanup()
print(ddp, rank, local_rank, world_size, device, total.item(), torch.get_num_threads())
"""


def test_two_ranks_meet_and_share_the_cores():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    environment.pop("OMP_NUM_THREADS", None)
    ranks = []
    for rank in ("0", "1"):
        env = {**environment, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER], env=env, stdout=subprocess.PIPE, text=True
            )
        )
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank, process in enumerate(ranks):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert out.split() == ["True", str(rank), str(rank), "2", "cpu", "3.0", str(share)]


def test_dtypes_by_name():
    assert resolve_dtype("bfloat16", "cpu") is torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) is torch.float16
    assert resolve_dtype("float32", "cpu") is torch.float32
    with pytest.raises(
        UserError, match="--dtype=bf16 is not known: choose bfloat16, float16, float32"
    ):
        resolve_dtype("bf16", "cpu")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, torch.float32), ({"avx512_bf16"}, torch.bfloat16), ({"amx_bf16"}, torch.bfloat16)],
)
def test_cpu_uses_its_fastest_dtype(monkeypatch, flags, expected):
    monkeypatch.setattr(
        torch.cpu,
        "get_capabilities",
        lambda: {name: name in flags for name in ("avx2", "avx512_bf16", "amx_bf16")},
        raising=False,
    )
    assert resolve_dtype("", "cpu") is expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)],
)
def test_gpu_uses_its_fastest_dtype(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("", "cuda") is expected


def test_metal_uses_fp32():
    assert resolve_dtype("", "mps") is torch.float32


def test_memory_and_synchronisation_of_a_cpu():
    device_synchronize("cpu")
    assert 2**24 < peak_memory_bytes(torch.device("cpu")) < 2**40


def test_free_memory_of_a_gpu_is_what_tensors_do_not_hold(monkeypatch):
    """The driver's free memory, and what torch keeps of freed tensors."""
    counts = {"mem_get_info": (5, 80), "memory_reserved": 60, "memory_allocated": 20}
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, count=count: count)
    assert free_memory("cuda") == 5 + 60 - 20 and device_memory("cuda") == 5 + 60


def test_free_memory_of_a_cpu_is_this_ranks_share(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    assert free_memory("cpu") == 250


# -- wandb -----------------------------------------------------------------------------------------


def test_wandb_is_a_dummy_by_default():
    run = get_wandb("dummy", to_dict(RunConfig()), "zangchat")
    run.log({"loss": 1.0}, step=3)
    run.summary["best"] = 1.0
    run.finish()
    assert isinstance(run, common.DummyWandb)


def test_an_empty_name_of_a_wandb_run_is_none(monkeypatch):
    monkeypatch.setenv("WANDB_RUN", "")
    assert isinstance(get_wandb("dummy", {}, "zangchat"), common.DummyWandb)
    assert isinstance(get_wandb("", {}, "zangchat"), common.DummyWandb)


def test_wandb_gets_name_and_settings(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    sys.modules["wandb"].init = lambda **kwargs: calls.append(kwargs)
    get_wandb("first", to_dict(RunConfig(seed=7)), "zangchat")
    monkeypatch.setenv("WANDB_RUN", "second")
    get_wandb("dummy", {"a": 1}, "zangchat-sft")
    assert [(c["project"], c["name"]) for c in calls] == [
        ("zangchat", "first"),
        ("zangchat-sft", "second"),
    ]
    assert calls[0]["config"]["seed"] == 7 and calls[1]["config"] == {"a": 1}


def test_wandb_runs_only_on_rank_0(monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert isinstance(get_wandb("first", to_dict(RunConfig()), "zangchat"), common.DummyWandb)


def test_wandb_that_is_missing_or_has_no_key_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--run=first needs wandb .*--run=dummy"):
        get_wandb("first", {}, "zangchat")
    program = "from zangchat.runtime.logs import get_wandb; get_wandb('first', {}, 'zangchat')"
    home = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**env, **home},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    error = done.stderr.splitlines()[-1]
    assert "UserError: --run=first: wandb did not start" in error and "`wandb login`" in error


@pytest.mark.parametrize("known", [0, 12], ids=["offline", "online"])
def test_a_continued_wandb_run_logs_no_step_twice(monkeypatch, known):
    logged, calls = [], []
    run = types.SimpleNamespace(step=known, log=lambda values, step: logged.append(step))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    sys.modules["wandb"].init = lambda **kwargs: calls.append(kwargs) or run
    continued = get_wandb("first", {}, "zangchat", run_id="abc", last_step=7)
    for step in range(5, 15):
        continued.log({"loss": 1.0}, step=step)
    assert (calls[0]["id"], calls[0]["resume"]) == ("abc", "allow")
    assert logged == list(range(max(known, 8), 15))


def test_offline_wandb_stores_the_metrics(tmp_path, monkeypatch):
    """The real library, without a network."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)
    run = get_wandb("first", to_dict(RunConfig(seed=7)), "zangchat")
    run.log({"loss_of_a_step": 1.25}, step=3)
    run.finish()
    (record,) = tmp_path.rglob("*.wandb")
    deadline = time.monotonic() + 60  # on a busy machine wandb's process writes with a delay
    while b"loss_of_a_step" not in record.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    content = record.read_bytes()
    assert b"loss_of_a_step" in content and b"first" in content and b"seed" in content


# -- a GPU that torch cannot use -------------------------------------------------------------------


@pytest.fixture
def gpu_machine(tmp_path, monkeypatch):
    """`gpu_machine(text)` puts a stand-in for nvidia-smi on the PATH, for a torch without a usable
    GPU.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def install(text: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return install


@pytest.mark.parametrize(
    "cuda, driver, visible, problem",
    [
        (
            "13.0",
            "550.54.14",
            None,
            r"torch \S+ is built for CUDA 13.0, which needs driver 580 or newer: update the "
            r"driver, or",
        ),
        (
            None,
            "580.65.06",
            None,
            r"torch \S+ is a build without CUDA: run `bash dev/setup.sh`, or",
        ),
        (
            "13.0",
            "580.65.06",
            None,
            r"torch \S+, built for CUDA 13.0, cannot use it: see `python -c",
        ),
        (
            "13.0",
            "580.65.06",
            "7",
            r"CUDA_VISIBLE_DEVICES=7 leaves torch \S+ none: correct or unset it, or",
        ),
    ],
)
def test_unusable_gpu_is_an_error_instead_of_a_cpu_fallback(
    gpu_machine, monkeypatch, cuda, driver, visible, problem
):
    gpu_machine(nvidia_smi(gpus(0), driver=driver))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    way_out = r"compute on the CPU with --device_type=cpu \(in front of a script: CUDA_VISIBLE_DEVICES=-1\)$"
    with pytest.raises(
        UserError, match=rf"^nvidia-smi finds a GPU \(driver {driver}\), but {problem}.* {way_out}"
    ):
        common.compute_init("")
    assert common.compute_init("cpu")[-1].type == "cpu"


@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_hidden_gpu_is_ignored(gpu_machine, monkeypatch, tmp_path, visible):
    gpu_machine(f"touch {tmp_path}/asked; echo 580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert common.autodetect_device_type() == "cpu"
    assert not (tmp_path / "asked").exists()


def test_failing_driver_is_reported(gpu_machine, caplog):
    gpu_machine("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert common.autodetect_device_type() == "cpu"
    assert (
        "computing on the CPU: nvidia-smi says: Failed to initialize NVML: Driver/library version "
        "mismatch" in caplog.text
    )


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU"
)
def test_base_train_stops_at_an_old_driver(gpu_machine, tmp_path):
    """The command itself, with an nvidia-smi and a torch that finds no GPU."""
    gpu_machine(nvidia_smi(gpus(0), driver="470.82.01"))
    command = [sys.executable, "-m", "scripts.base_train", "--depth=20", "--dataset=none"]
    done = subprocess.run(
        command,
        env={**os.environ, "ZANGCHAT_BASE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "nvidia-smi finds a GPU (driver 470.82.01), but torch" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_mps_is_chosen_for_one_process_and_reported(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.autodetect_device_type() == "mps"
    assert (
        "computing on Apple's GPU (MPS), untested on real hardware; --device_type=cpu computes on "
        "the CPU" in caplog.text
    )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    assert common.autodetect_device_type() == "cpu", "several processes cannot share it"


@pytest.mark.parametrize(
    ("membership", "groups", "expected"),
    [
        (
            "0::/job/step",
            {"job": "2000000000 500000000 inactive_file 100000000"},
            1_600_000_000,
        ),  # set by the parent
        (
            "0::/job/step",
            {"job": "max 5 inactive_file 0", "job/step": "1000000000 999999999 inactive_file 0"},
            1,
        ),
        ("0::/", {"": "1000000000 2000000000 inactive_file 0"}, 0),
        (
            "5:cpu,memory:/docker/a",
            {"memory/docker/a": "1500000000 1000000000 total_inactive_file 250000000"},
            750_000_000,
        ),
        (
            "5:memory:/docker/a",
            {"memory": "1500000000 1000000000 total_inactive_file 0"},
            500_000_000,
        ),  # as in a container
        ("5:cpu:/a\n0::/", {}, None),
        ("", {}, None),
    ],
)
def test_container_memory_is_its_limit(tmp_path, membership, groups, expected):
    psutil = pytest.importorskip("psutil")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(membership)
    for name, values in groups.items():
        group = tmp_path / "sys" / "fs" / "cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        limit, usage, key, cached = values.split()
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if name.startswith("memory")
            else ("memory.max", "memory.current")
        )
        for file, value in zip(
            (*names, "memory.stat"), (limit, usage, f"anon 7\n{key} {cached}"), strict=True
        ):
            (group / file).write_text(f"{value}\n")
    found = available_memory(tmp_path)
    assert (
        found == expected
        if expected is not None
        else found > 0.5 * psutil.virtual_memory().available
    )
