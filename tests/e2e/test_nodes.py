"""torchrun on two hosts: a rank dies on one of them, and the run continues to the same result.

The hosts are two network namespaces joined by a virtual cable if this machine allows that (root on
Linux), else two addresses of the loopback device. The test prints which.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
import torch.multiprocessing as mp

from scripts import base_train
from tests.faults import ROOT, differences, result_of
from tests.unit.test_train_scripts import base, base_flags, folder  # noqa: F401 (a fixture)
from tests.unit.test_trainer import free_port, join_ranks
from zangchat import checkpoint_manager

STEPS, SAVE_EVERY = 300, 20


class Host(NamedTuple):
    address: str
    prefix: list[str]  # words that run a command on this host
    environment: dict[str, str]


@pytest.fixture
def hosts() -> Iterator[tuple[str, list[Host]]]:
    """(description, two hosts)"""
    names = [f"zangchat{os.getpid()}{letter}" for letter in "ab"]
    cables = [f"zc{os.getpid()}{letter}"[-15:] for letter in "ab"]
    addresses = ["10.213.77.1", "10.213.77.2"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            cables[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            cables[1],
            "netns",
            names[1],
        )
        for name, cable, address in zip(names, cables, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            for device in (cable, "lo"):
                ip("-n", name, "link", "set", device, "up")
        prefixes = [["ip", "netns", "exec", name] for name in names]
        for prefix in prefixes:
            subprocess.run([*prefix, "true"], check=True, capture_output=True)
        description = "two network namespaces"
    except (OSError, subprocess.CalledProcessError) as error:
        description, addresses, prefixes, cables = (
            f"127.0.0.1 and 127.0.0.2 ({error})",
            ["127.0.0.1", "127.0.0.2"],
            [[], []],
            ["lo", "lo"],
        )
    yield (
        description,
        [
            Host(a, p, {"GLOO_SOCKET_IFNAME": c})
            for a, p, c in zip(addresses, prefixes, cables, strict=True)
        ],
    )
    for name in names:
        with contextlib.suppress(OSError):
            # also deletes the cable
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def flags(root: Path) -> list[str]:
    return [
        *base_flags(root),
        f"--num_iterations={STEPS}",
        "--eval_every=-1",
        f"--save_every={SAVE_EVERY}",
        "--resume=latest",
    ]


def rank_main(rank: int, port: int, root: str) -> None:
    os.environ.update(ZANGCHAT_BASE_DIR=root)
    join_ranks(rank, 2, port)
    assert base_train.main(flags(Path(root))) == 0


def workers(agent: subprocess.Popen) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(agent.pid).children()
        if "scripts.base_train" in child.cmdline()
    ]


@pytest.mark.slow
def test_rank_dies_on_one_of_two_hosts(base, hosts, tmp_path, capsys):  # noqa: F811
    roots = [shutil.copytree(base, tmp_path / name) for name in ("expected", "killed")]
    for root in roots:
        shutil.rmtree(folder(root, "base"))
    mp.start_processes(
        rank_main, args=(free_port(), str(roots[0])), nprocs=2, start_method="forkserver"
    )

    description, (first, second) = hosts
    launch = f"--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint={first.address}:29511 --rdzv_id=1 --max-restarts=5"
    agents = []
    for host in (first, second):
        # neither name is in the name service
        place = f"--local-addr={host.address} --rdzv-conf=is_host={int(host is first)}".split()
        command = [sys.executable, "-m", "torch.distributed.run", *launch.split(), *place]
        environment = {
            **os.environ,
            **host.environment,
            "PYTHONPATH": str(ROOT),
            "ZANGCHAT_BASE_DIR": str(roots[1]),
            "OMP_NUM_THREADS": "1",
        }
        with open(tmp_path / host.address, "wb") as log:
            arguments = [*host.prefix, *command, "-m", "scripts.base_train", *flags(roots[1])]
            agents.append(
                subprocess.Popen(
                    arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        deadline = time.monotonic() + 120
        while not (folder(roots[1], "base") / f"meta_{2 * SAVE_EVERY:06d}.json").exists():
            assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents), (
                logs(tmp_path, first, second)
            )
            time.sleep(0.02)
        (victim,) = workers(agents[1])
        victim.send_signal(signal.SIGKILL)
        codes = [agent.wait(180) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.kill()
    output = logs(tmp_path, first, second)
    assert codes == [0, 0], output
    assert "exitcode: -9" in output and "continuing from step" in output, output
    assert checkpoint_manager.find_last_step(folder(roots[1], "base")) == STEPS
    assert differences(result_of(roots[0], "base"), result_of(roots[1], "base")) == []
    with capsys.disabled():
        print(f"\n[two hosts: {description}; torch {torch.__version__}, gloo]")


def logs(tmp_path: Path, *hosts: Host) -> str:
    return "\n".join(
        (tmp_path / host.address).read_text(encoding="utf-8", errors="replace") for host in hosts
    )
