"""A run stopped at any moment, by any means, and resumed equals the uninterrupted run bit for bit.

The tests cover all four stages. The fast ones strike at the riskiest points, the slow one strikes
at random, 27 times in each stage.
"""

import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import EXIT_CODES, Fault, Range, differences, newest_step, result_of, start
from tests.unit.test_train_scripts import base, folder  # noqa: F401 (a fixture)
from zangchat import checkpoint_manager

SHOTS = 27  # in each stage


@pytest.fixture(scope="module")
def ranges(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Range]:  # noqa: F811
    """Ranges by stage, each made on first use."""

    class Ranges(dict[str, Range]):
        def __missing__(self, stage: str) -> Range:
            self[stage] = Range(base, tmp_path_factory.mktemp(stage), stage)
            return self[stage]

    return Ranges()


@pytest.mark.parametrize("stage", ["base", "rl"])
def test_kill_during_a_save(ranges, stage):
    """The later half of the calls that make saves: the writer, the renames, the meta, the purge."""
    calls = ranges[stage].calls[True]
    struck = ranges[stage].shoot(Fault("kill", calls // 2, True), Fault("kill", calls // 3, True))
    assert len(struck) == 2


@pytest.mark.parametrize("kind", [kind for kind in EXIT_CODES if kind != "kill"])
def test_stop_by_other_faults(ranges, kind):
    one = ranges["base"]
    assert one.shoot(
        Fault(kind, one.calls[True] * 2 // 3, True, lasts=one.calls[True] // 5, room=2000)
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes, if this machine allows mounting one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(
            f"no tmpfs can be mounted here ({mounted.stderr.strip()}); the tests above limit the "
            "size of files instead"
        )
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_file_system(ranges, small_disk, tmp_path):
    """All saves of the first attempt fail; with space again the run is like an undisturbed one."""
    one = ranges["base"]
    root = one._fresh("disk full")
    directory = folder(root, "base")
    directory.parent.mkdir(exist_ok=True)
    directory.symlink_to(small_disk)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        file.write(bytes((4 << 20) - 3 * 4096))
    code, _ = start("base", root, tmp_path / "log")
    output = (tmp_path / "log").read_text(encoding="utf-8")
    assert (
        code == 2
        and "No space left on device" in output.splitlines()[-1]
        and "--resume=latest" in output.splitlines()[-1]
    )
    assert (
        "could not save step 3" in output
        and "training continues" in output
        and newest_step(root, "base") == 0
    )
    ballast.unlink()
    code, _ = start("base", root, tmp_path / "log")
    assert code == 0 and checkpoint_manager.find_last_step(directory) == 10
    assert differences(one.expected, result_of(root, "base")) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", ["base", "mid", "sft", "rl"])
def test_stop_at_random_moments(ranges, stage):
    one, rng, seen = ranges[stage], random.Random(f"faults of {stage}"), Counter[str]()
    for _ in range(SHOTS):
        faults = [one.random_fault(rng) for _ in range(1 + (rng.random() < 0.3))]
        seen.update(one.shoot(*faults))
    kinds = Counter(struck.partition(",")[0] for struck in seen.elements())
    print(
        f"{stage}: {dict(kinds)}, in {len(seen)} places, "
        f"{sum('zangchat-save' in place for place in seen.elements())} times in the writer"
    )
    assert sum(kinds.values()) >= SHOTS * 0.8
