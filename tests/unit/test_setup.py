"""The shell scripts on machines that lack something, with only stand-ins on the PATH."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dev import gpus as count_gpus
from tests.documents import READMES, ROOT, text_of
from tests.machines import Machine, gpus, no_path, nvidia_smi

TORCH = "2.13.0"
PIP_MISSING = "this Python has no pip: `sudo apt install python3-pip` (Debian, Ubuntu), or install uv, then run this again"
PYTHON = """case "$*" in
    *"import sys, pip"*) {pip} ;;
    "-m pip install "*)
        [ "${{PIP_USER:-0}}${{PIP_REQUIRE_VIRTUALENV:-0}}" = 00 ] || exit 1
        echo "pip $*" >> "$RECORD"; mkdir -p .uv/bin; cp "$UV" .uv/bin/uv ;;
    *version_info*) echo {version} ;;
esac"""
# Of torch there is a real module, which setup.sh asks about its build; other modules are only claimed.
VENV_PYTHON = f"""#!/bin/bash
[ -z "${{PYTHONHOME:-}}${{PYTHONDONTWRITEBYTECODE:-}}" ] || exit 1
case "$#$*" in
    *version_info*) [ -z "${{OLD:-}}" ] ;;
    *--version) echo Python 3.9.19 ;;
    "5- "* | *importlib.metadata*) PYTHONPATH=.venv/modules exec {sys.executable} -S "$@" ;;
    *) [ -e .venv/modules/torch.py -a -z "${{PYTHONPATH:-}}" ] || [ "$1" != - ] ;;
esac"""
UV = """echo "uv $* timeout=${UV_HTTP_TIMEOUT:-default}" >> "$RECORD"
case "$1:${UV_SYSTEM_PYTHON:-}${UV_PYTHON:-}${UV_WORKING_DIR:-}" in
    pip:?*) echo "this is another Python" >&2; exit 2 ;;
esac
case "$*" in
    --version) echo "uv 0.13.9" ;;
    "cache dir") echo "$HOME/.cache/uv" ;;
    venv*)
        [[ "$*" != *"--python 3."* || -z "${NO_PYTHON:-}" ]] || { echo "error: dns" >&2; exit 2; }
        rm -rf .venv
        mkdir -p .venv/bin
        printf '%s\\n' VENV_PYTHON > .venv/bin/python
        printf '#!/bin/bash\\n[ -z "${CONDA_PREFIX:-}" ] || exit 1\\necho maturin >> "$RECORD"\\n' > .venv/bin/maturin
        chmod +x .venv/bin/* ;;
    *--dry-run*) case "${INDEX:-there}" in
        there) ;;
        old) echo "  x No solution found when resolving dependencies" >&2; exit 1 ;;
        *) echo "error: Failed to fetch: dns" >&2; exit 2 ;;
    esac ;;
    *uninstall*) rm -rf .venv/modules ;;
    *torch==*)
        [ -z "${SLOW:-}" ] || { echo "error: the download broke off" >&2; exit 2; }
        build="" cuda=13.0 last=${!#}
        case "$*" in
            *=auto) build=+${AUTO:-cu130} ;;
            *--torch-backend=*) build=+${last#*=} ;;
        esac
        [ "$build" != +cpu ] || cuda=""
        info=.venv/modules/torch-2.13.0.dist-info
        mkdir -p $info
        printf 'Name: torch\\nVersion: 2.13.0%s\\n' "$build" > $info/METADATA
        printf 'class version:\\n    cuda = "%s"\\n' "$cuda" > .venv/modules/torch.py ;;
esac""".replace("VENV_PYTHON", shlex.quote(VENV_PYTHON))

SCRIPTS = sorted(
    {
        "speedrun.sh",
        "run1000.sh",
        ".ci/run",
        "dev/slurm.sbatch",
        *(str(path.relative_to(ROOT)) for path in (ROOT / "dev").glob("*.sh")),
    }
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of the repository that setup.sh reads."""
    folder = tmp_path / "checkout"
    for name in (
        "dev/setup.sh",
        "dev/machine.sh",
        "pyproject.toml",
        "requirements.lock",
        "rustbpe/Cargo.toml",
        "rustbpe/pyproject.toml",
        "ruststep/Cargo.toml",
        "ruststep/pyproject.toml",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for crate in ("rustbpe", "ruststep"):
        (folder / crate / "src").mkdir()
    return folder


class Setup:
    """A machine with Python 3.11 and pip but no uv; `run` returns (exit code, stderr, calls)."""

    def __init__(self, folder: Path, checkout: Path, system: str = "Linux") -> None:
        self.machine, self.checkout = Machine(folder / "machine", system), checkout
        self.record, self.uv = folder / "record", folder / "uv"
        self.uv.write_text(f"#!/bin/bash\n{UV}\n", encoding="utf-8")
        self.uv.chmod(0o755)
        self.python("python3")

    def python(self, name: str, version: str = "3.11", pip: bool = True) -> None:
        self.machine.install(name, PYTHON.format(version=version, pip="true" if pip else "exit 1"))

    def with_uv(self) -> None:
        self.machine.install("uv", UV)

    def run(self, *flags: str, **variables: str) -> tuple[int, str, list[str]]:
        self.record.write_text("", encoding="utf-8")
        done = self.machine.run(
            "bash",
            "dev/setup.sh",
            *flags,
            cwd=self.checkout,
            RECORD=str(self.record),
            UV=str(self.uv),
            **variables,
        )
        return (
            done.returncode,
            done.stderr.replace("\x1b[1m[setup]\x1b[0m ", ""),
            self.record.read_text(encoding="utf-8").splitlines(),
        )


@pytest.fixture(params=["Linux", "Darwin"])
def setup(request, tmp_path, checkout):
    return Setup(tmp_path, checkout, request.param)


@pytest.fixture
def linux(tmp_path, checkout):
    return Setup(tmp_path, checkout)


def torch_installs(calls: list[str]) -> list[str]:
    return [call for call in calls if f"torch=={TORCH}" in call and "--dry-run" not in call]


def test_bare_machine_is_set_up_once(setup):
    code, errors, calls = setup.run()
    assert code == 0 and "ready: source .venv/bin/activate" in errors, errors
    assert any(call.startswith("pip") and "--target .uv uv" in call for call in calls)
    assert len(torch_installs(calls)) == 1
    assert (
        any("--extra norust" in call and "--no-sources" in call for call in calls)
        and "no cargo on the PATH" in errors
    )
    assert setup.run()[::2] == (0, [])


def test_missing_pip(setup):
    setup.python("python3", pip=False)
    code, errors, calls = setup.run()
    assert (code, errors.strip(), calls) == (1, PIP_MISSING, [])
    setup.with_uv()
    assert setup.run()[0] == 0


def test_unreachable_pip_index(linux):
    linux.machine.install(
        "python3",
        PYTHON.format(version="3.11", pip="true").replace('echo "pip', 'exit 1; echo "pip'),
    )
    code, errors, _ = linux.run()
    assert (
        code == 1
        and "pip could not install uv: check the network (PIP_INDEX_URL names a mirror)" in errors
    )


@pytest.mark.parametrize("version", ["3.8", "3.15"])
def test_unsupported_python_is_replaced_by_uv(setup, version):
    setup.python("python3", version)
    code, errors, calls = setup.run()
    assert (
        code == 0
        and f"Python {version} here, and zangchat needs 3.10 to 3.14: uv fetches Python 3.11"
        in errors
    )
    assert any("venv" in call and "--python 3.11 .venv" in call for call in calls)
    shutil.rmtree(setup.checkout / ".venv")
    code, errors, _ = setup.run(NO_PYTHON="1")
    assert (
        code == 1
        and "uv could not fetch Python 3.11: check the network (UV_PYTHON_INSTALL_MIRROR names a "
        "mirror)"
        in errors
    )
    assert "or install Python 3.10 to 3.14, then run this again" in errors


def test_missing_python(setup):
    (setup.machine.bin / "python3").unlink()
    code, errors, calls = setup.run()
    assert code == 1 and "no Python runs here: install Python 3.11" in errors and not calls
    setup.with_uv()
    code, errors, calls = setup.run()
    assert code == 0 and "no Python here, and zangchat needs" in errors


def test_environment_of_an_unsupported_python_is_an_error(linux):
    assert linux.run()[0] == 0
    (linux.checkout / ".venv/setup-stamp").unlink()
    code, errors, calls = linux.run(OLD="1")
    assert code == 1 and not torch_installs(calls)
    assert ".venv has Python 3.9.19, and zangchat needs 3.10 to 3.14: remove .venv" in errors


def test_unsupported_python_version_is_ignored(setup):
    """The official images of Python set the variable to their own version."""
    setup.python("python3", "3.9")
    code, errors, calls = setup.run(PYTHON_VERSION="3.9.19")
    assert code == 0 and "PYTHON_VERSION=3.9.19 is ignored: zangchat needs 3.10" in errors
    assert any("venv" in call and "--python 3.11 .venv" in call for call in calls)


@pytest.mark.parametrize(
    "name",
    ["UV_SYSTEM_PYTHON", "UV_PYTHON", "UV_WORKING_DIR", "PYTHONHOME", "CONDA_PREFIX"]
    + ["PYTHONDONTWRITEBYTECODE", "PIP_USER", "PIP_REQUIRE_VIRTUALENV", "CDPATH"],
)
def test_variables_of_the_user_lead_nowhere_else(linux, tmp_path, name):
    linux.machine.install("cargo", "echo 'cargo 1.99.0'")
    (tmp_path / "elsewhere/dev").mkdir(parents=True)
    code, errors, calls = linux.run(**{name: "1" if "PIP" in name else str(tmp_path / "elsewhere")})
    assert code == 0 and "could not be built" not in errors, errors
    assert "maturin" in calls


def test_broken_environment_names_pythonpath(linux):
    code, errors, _ = linux.run(PYTHONPATH="/opt/other")
    assert code == 1
    assert "broken: remove .venv, unset PYTHONPATH (/opt/other) and run this again" in errors


def test_broken_pyenv_shim_is_skipped(setup):
    setup.machine.install("python3.12", no_path("python3.12"))
    code, errors, calls = setup.run(PYTHON_VERSION="3.12")
    assert (
        code == 0
        and "/bin/python3.12 does not run (if it is pyenv's: `pyenv global 3.12`" in errors
    )
    assert any(re.search(r"venv .*--python \S*/python3 ", call) for call in calls)
    for name in ("python3", "python"):
        setup.machine.install(name, no_path(name))
    shutil.rmtree(setup.checkout / ".uv")
    shutil.rmtree(setup.checkout / ".venv")
    assert "no Python runs here" in setup.run(PYTHON_VERSION="3.12")[1]


def test_later_pythons_on_the_path_are_tried(linux, tmp_path):
    """A shim before the system's Python, or an environment without pip that is active."""
    first = tmp_path / "first"
    first.mkdir()
    for text in (no_path("python3"), PYTHON.format(version="3.11", pip="exit 1")):
        shutil.rmtree(linux.checkout / ".uv", ignore_errors=True)
        shutil.rmtree(linux.checkout / ".venv", ignore_errors=True)
        (first / "python3").write_text(f"#!/bin/bash\n{text}\n")
        (first / "python3").chmod(0o755)
        code, errors, _ = linux.run(PATH=f"{first}:{linux.machine.bin}")
        assert code == 0, errors


def test_broken_environment_is_recreated(linux):
    assert linux.run()[0] == 0
    (linux.checkout / ".venv/bin/python").unlink()
    # its Python has been removed
    (linux.checkout / ".venv/bin/python").symlink_to("/nonexistent/python3.11")
    code, errors, calls = linux.run()
    assert code == 0 and any("venv --quiet --clear" in call for call in calls), errors


def test_old_or_broken_uv_is_not_used(linux):
    for text in ('[ "$1" != --version ] || echo "uv 0.4.30"; exit 0', no_path("uv")):
        shutil.rmtree(linux.checkout / ".uv", ignore_errors=True)
        shutil.rmtree(linux.checkout / ".venv", ignore_errors=True)
        linux.machine.install("uv", text)
        assert linux.run()[0] == 0
        assert (linux.checkout / ".uv/bin/uv").exists()


@pytest.mark.parametrize(
    "system, free, enough", [("Linux", 2, False), ("Darwin", 2, False), ("Linux", 5, True)]
)
def test_insufficient_disk_is_an_error_before_the_download(
    tmp_path, checkout, system, free, enough
):
    setup = Setup(tmp_path, checkout, system)
    line = f"/dev/disk 3 s1 100000000 1 {free * 10**9 // 1024} 99% /Volumes/My Disk"
    setup.machine.install(
        "df", f"echo Filesystem 1024-blocks Used Available Capacity Mounted on; echo '{line}'"
    )
    code, errors, calls = setup.run()
    if enough:  # enough for a CPU build
        assert code == 0
        shutil.rmtree(checkout / ".venv")
        code, errors, calls = setup.run(INDEX="silent")
        assert "needs 6 GB of disk" in errors
    else:
        assert re.search(
            r"needs 3 GB of disk, and \.venv has \d GB free: make room \(UV_CACHE_DIR moves", errors
        )
    assert code == 1 and not torch_installs(calls)


# -- which build of torch --------------------------------------------------------------------------


def test_torch_build_depends_on_the_machine(linux, tmp_path):
    _, _, calls = linux.run()
    assert "--torch-backend=cpu" in torch_installs(calls)[0]
    # with a new GPU a CPU build no longer suffices
    linux.machine.install("nvidia-smi", nvidia_smi(gpus(0)))
    _, _, calls = linux.run()
    assert "--torch-backend=auto" in torch_installs(calls)[0]
    assert any("pip uninstall" in call for call in calls), (
        "uv takes another build of the version for good enough"
    )
    assert not any("--reinstall" in call for call in calls), (
        "which downloads what uv has in its cache"
    )
    assert linux.run()[2] == []
    (linux.machine.bin / "nvidia-smi").unlink()
    assert linux.run()[2] == [], "a build for GPUs runs on a CPU"


def test_macos_installs_the_ordinary_build(tmp_path, checkout):
    _, _, calls = Setup(tmp_path, checkout, "Darwin").run()
    assert "--torch-backend" not in " ".join(calls)


def test_broken_driver_is_reported(linux):
    failed = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that it is running."
    linux.machine.install("nvidia-smi", nvidia_smi(failed, code=9))
    code, errors, calls = linux.run()
    assert code == 0 and f"no GPU: nvidia-smi failed: {failed}" in errors
    assert "--torch-backend=cpu" in torch_installs(calls)[0]


def test_silent_index_falls_back_to_the_ordinary_build(linux):
    code, errors, calls = linux.run(INDEX="silent")
    assert (
        code == 0
        and "PyTorch's index does not answer: taking the ordinary build from PyPI" in errors
    )
    assert "--torch-backend" not in torch_installs(calls)[0]


def test_slow_link_does_not_cause_a_larger_download(linux):
    code, errors, calls = linux.run(SLOW="1")
    assert code == 1 and "torch could not be installed: check the network" in errors
    assert len(torch_installs(calls)) == 1 and torch_installs(calls)[0].endswith("timeout=default")
    assert "--quiet" not in torch_installs(calls)[0], "uv shows how far it is"
    assert "the download broke off" in errors
    assert "timeout" not in re.sub(r"#.*", "", text_of("dev/setup.sh")).replace(
        "UV_HTTP_TIMEOUT", ""
    )


def test_driver_too_old_for_every_build_is_reported(linux):
    linux.machine.install("nvidia-smi", nvidia_smi(gpus(0), driver="470.82.01"))
    code, errors, calls = linux.run(INDEX="old")
    assert code == 1 and not torch_installs(calls)
    assert (
        f"no torch {TORCH} for 'auto' on this machine (driver 470.82.01): update the driver, or "
        "TORCH_BACKEND=cpu" in errors
    )


@pytest.mark.parametrize("backend", ["pypi", "cu128"])
def test_torch_build_can_be_chosen(linux, backend):
    linux.machine.install("nvidia-smi", nvidia_smi(gpus(0)))
    _, _, calls = linux.run(TORCH_BACKEND=backend)
    assert ("--torch-backend=cu128" in torch_installs(calls)[0]) == (backend == "cu128")


def test_a_backend_that_is_exported_for_good_costs_nothing(linux):
    for backend, there in (("auto", {}), ("cpu", {"INDEX": "silent"})):
        assert torch_installs(linux.run(TORCH_BACKEND=backend, **there)[2])
        assert linux.run(TORCH_BACKEND=backend, **there)[::2] == (0, [])


def test_torch_build_can_be_changed(linux):
    for backend in ("cpu", "cu128", "pypi", "cpu"):
        code, errors, calls = linux.run(TORCH_BACKEND=backend)
        assert code == 0 and len(torch_installs(calls)) == 1, errors
        assert not torch_installs(linux.run(TORCH_BACKEND=backend)[2]), "it is that build"
        assert linux.run()[2] == [], "a build that was chosen stays"


def test_driver_too_old_for_a_gpu_build_is_reported(linux):
    """For such a driver uv's auto takes the CPU build, without a word."""
    linux.machine.install("nvidia-smi", nvidia_smi(gpus(0), driver="470.82.01"))
    for _ in range(2):
        code, errors, _ = linux.run(AUTO="cpu")
        assert code == 1 and "ready" not in errors
        assert (
            f"torch {TORCH} for this machine's driver 470.82.01 only as a CPU build: update the "
            "driver, or TORCH_BACKEND=cpu bash dev/setup.sh" in errors
        )
    assert linux.run(TORCH_BACKEND="cpu")[0] == 0
    assert linux.run(AUTO="cpu")[::2] == (0, [])


# -- the crate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cargo, reason",
    [
        (
            "echo 'cargo 1.84.1 (66221abde 2024-11-19)'",
            "cargo 1.84.1 (66221abde 2024-11-19) is older than 1.85, which the crate needs:",
        ),
        (
            "echo 'error: no default toolchain'; exit 1",
            "cargo does not run: error: no default toolchain",
        ),
        ("echo 'cargo 1.85.0 (d73d2caf9 2024-12-31)'", ""),
        ("echo 'cargo 2.1.0'", ""),
    ],
)
def test_unsuitable_cargo_is_reported(setup, cargo, reason):
    setup.machine.install("cargo", cargo)
    code, errors, calls = setup.run()
    assert code == 0
    if reason:
        assert (
            reason in errors
            and any("--extra norust" in call for call in calls)
            and "maturin" not in calls
        )
    else:
        assert "maturin" in calls and "could not be built" not in errors
    setup.machine.install("cargo", "echo 'cargo 1.99.0'")  # rustup update
    assert bool(setup.run()[2]), "a newer cargo builds the crate"


def test_packages_removed_by_another_tool_are_reinstalled(linux):
    packages = linux.checkout / ".venv/lib/python3.11/site-packages"
    assert linux.run()[0] == 0 and linux.run()[2] == []
    (packages / "transformers-5.0.dist-info").mkdir(parents=True)
    assert linux.run()[2] and linux.run()[2] == []


# -- GPUs ------------------------------------------------------------------------------------------


def count(machine: Machine, **variables: str) -> list[str]:
    values = '"$gpus" "$gpu_first" "$gpu_mig" "$gpu_problem"'
    script = f"set -euo pipefail; source dev/machine.sh; find_gpus; printf '%s\\n' {values}"
    done = machine.run("bash", "-c", script, cwd=ROOT, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:4]


VISIBLE = [
    None,
    "",
    "-1",
    "0",
    "1,0",
    "0,1,2",
    "7",
    "0,7,1",
    "0,-1,1",
    "0,0",
    " 1 , 0",
    "1gpu2",
    "x",
]
VISIBLE += ["GPU-0a5", "GPU-1,GPU-0", "GPU-", "GPU-7", "GPU-1,0", "GPU-1a,GPU-1a5", "0,GPU-1"]


@pytest.mark.parametrize("visible", VISIBLE)
def test_gpus_are_counted_as_torch_counts_them(tmp_path, monkeypatch, visible):
    machine = Machine(tmp_path, "Darwin")  # its tools have fewer options
    machine.install("nvidia-smi", nvidia_smi(gpus(0, 0, 0)))
    uuids = re.findall(r"UUID: (\S+)\)", gpus(0, 0, 0))
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: 3)
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: uuids)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    number, _, _, problem = count(
        machine, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    )
    assert int(number) == torch.cuda._device_count_nvml()
    assert problem == ("" if int(number) else f"CUDA_VISIBLE_DEVICES={visible} hides them")


@pytest.mark.parametrize(
    "migs, visible, expected",
    [
        ((2,), None, ["1", "0", "40"]),  # a process sees only one instance
        ((0, 2), None, ["1", "1", "40"]),
        ((0, 2), "0", ["1", "0", ""]),
        ((0, 2), "1", ["1", "1", "40"]),
        ((2,), "MIG-01c0ffee", ["1", "0", "40"]),
        ((2,), "MIG-00c0ffee,MIG-01c0ffee", ["1", "0", "40"]),
        ((2,), "MIG-77", ["0", "", ""]),
        ((2,), "GPU-0a5", ["1", "0", "40"]),
        ((0,) * 8, None, ["8", "0", ""]),
        ((0,) * 8, "6,7", ["2", "6", ""]),
    ],
)
def test_mig_instances_are_not_counted_as_gpus(tmp_path, migs, visible, expected):
    machine = Machine(tmp_path)
    machine.install("nvidia-smi", nvidia_smi(gpus(*migs)))
    assert (
        count(machine, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))[:3]
        == expected
    )


@pytest.mark.parametrize(
    "profile, memory", [("1g.24gb+me.all", "24"), ("1c.2g.10gb", "10"), ("7g.80gb", "80")]
)
def test_memory_of_a_mig_instance(tmp_path, profile, memory):
    machine = Machine(tmp_path)
    machine.install("nvidia-smi", nvidia_smi(gpus(1).replace("3g.40gb", profile)))
    assert count(machine)[:3] == ["1", "0", memory]


def test_missing_gpu_has_a_reason(tmp_path):
    machine = Machine(tmp_path)
    assert count(machine)[::3] == ["0", "nvidia-smi is not installed"]
    machine.install("nvidia-smi", nvidia_smi("No devices were found", code=6))
    assert count(machine)[::3] == ["0", "nvidia-smi failed: No devices were found"]
    machine.install("nvidia-smi", nvidia_smi(""))
    assert count(machine)[::3] == ["0", "nvidia-smi lists none"]


@pytest.mark.parametrize(
    ("found", "mib", "warned"), [(8, 64, True), (8, 4096, False), (1, 64, False), (0, 64, False)]
)
def test_little_shared_memory_for_several_gpus_is_a_warning(
    monkeypatch, capsys, found, mib, warned
):
    usage = shutil.disk_usage("/")
    device = "cuda" if found else "cpu"
    monkeypatch.setattr(count_gpus, "SHARED", ROOT)
    monkeypatch.setattr(count_gpus, "autodetect_device_type", lambda: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=mib * 2**20))
    assert count_gpus.main([]) == 0
    out, err = capsys.readouterr()
    assert out == f"{found}\n" and ("has 64 MiB" in err and "--shm-size" in err) == warned


# -- macOS -----------------------------------------------------------------------------------------

FAKE = """#!/bin/bash
echo "${0##*/} $* cuda=${CUDA_VISIBLE_DEVICES-}" >> "$RECORD"
case "$*" in
    "-m dev.gpus") echo "error: torch cannot use it" >&2; exit 2 ;;
    *zangchat.dataset*-n*)
        folder=$ZANGCHAT_BASE_DIR/base_data/climbmix; mkdir -p "$folder"
        for ((i = 0; i <= ${!#}; i++)); do
            printf '{"name": "shard_%05d.parquet"}\\n' "$i"
        done > "$folder/manifest.json" ;;
esac
"""


@pytest.fixture
def mac(tmp_path):
    """`mac(script, **variables) -> (CompletedProcess, calls)`; the script calls stand-ins."""
    folder = tmp_path / "checkout"
    for name in (*SCRIPTS, "pyproject.toml", "rustbpe/Cargo.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "dev/setup.sh").write_text(f"TORCH_VERSION={TORCH}\n")
    machine = Machine(tmp_path / "machine", "Darwin")
    for name in ("python", "torchrun", "ruff", "mypy", "lint-imports", "uv"):
        program = folder / ".venv/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(FAKE)
        program.chmod(0o755)

    def run(script: str, *arguments: str, **variables: str):
        record = tmp_path / "record"
        record.write_text("")
        variables = {
            "RECORD": str(record),
            "ZANGCHAT_BASE_DIR": str(tmp_path / "base"),
            **variables,
        }
        done = machine.run("bash", script, *arguments, cwd=folder, **variables)
        return done, record.read_text().splitlines()

    run.machine, run.folder, run.base = machine, folder, tmp_path / "base"
    return run


def plan_laptop(base: Path) -> None:
    base.mkdir()
    steps = "# a plan\nBASE_STEPS=1\nMID_STEPS=1\nSFT_STEPS=1\nRL_STEPS=1\n"
    for name in ("plan", "later"):
        (base / f"runcpu.{name}").write_text(steps)


@pytest.mark.parametrize(
    "script, variables, last",
    [
        ("speedrun.sh", {"NPROC_PER_NODE": "2"}, "zangchat.report generate"),
        ("run1000.sh", {"NPROC_PER_NODE": "1"}, "zangchat.report generate"),
        ("dev/rungpu.sh 24", {}, "zangchat.report generate"),
        ("dev/runcpu.sh", {}, "zangchat.report generate"),
        ("dev/test.sh", {}, "-m pytest -m not slow"),
        (".ci/run", {}, "-m pytest -m not slow"),
        ("dev/lock.sh", {"PATH": "uv"}, "pip compile"),
    ],
)
def test_every_script_runs_with_macos_tools(mac, tmp_path, script, variables, last):
    plan_laptop(mac.base)
    for name in ("dev", ".ci"):  # no script may end up there
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
    variables = {**variables, "CDPATH": str(tmp_path / "elsewhere")}
    if "PATH" in variables:
        variables["PATH"] = f"{mac.folder}/.venv/bin:{mac.machine.bin}"
    done, calls = mac(*script.split(), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        last in calls[-1]
        and "illegal option" not in done.stderr
        and "command not found" not in done.stderr
    )


def test_macos_without_a_gpu_is_pointed_to_runcpu(mac):
    for script in ("speedrun.sh", "run1000.sh", "dev/rungpu.sh"):
        done, calls = mac(script)
        assert (
            done.returncode == 2
            and "No GPU found (nvidia-smi is not installed)" in done.stderr
            and not calls
        )
    done, _ = mac("speedrun.sh", DRY_RUN="1")
    assert done.returncode == 0 and "python -m scripts.tok_eval\n" in done.stdout


def test_runcpu_uses_the_cpu_if_torch_cannot_use_the_gpu(mac):
    plan_laptop(mac.base)
    mac.machine.install("nvidia-smi", nvidia_smi(gpus(0), driver="470.82.01"))
    done, calls = mac("dev/runcpu.sh")
    assert (
        done.returncode == 0
        and "error: torch cannot use it\nThis run computes on the CPU.\n" in done.stderr
    )
    assert {call.rpartition("cuda=")[2] for call in calls[1:]} == {"-1"}


TALK = ["source .venv/bin/activate", "python -m scripts.chat_cli", "python -m scripts.chat_web"]


@pytest.mark.parametrize(
    "arguments, variables, first, closing, lang",
    [
        ([], {}, "Corpus: documentation", "Talk to the model:", "en"),
        ([], {"LANG": "de_DE.UTF-8"}, "Corpus: documentation", "Talk to the", "de"),
        ([], {"LANG": "zh_CN.UTF-8"}, "语料：", "与模型对话：", "zh"),
        ([], {"LANG": "C", "LC_ALL": "zh_TW.UTF-8"}, "语料：", "与模型对话：", "zh"),
        (["--lang=zh"], {"LANG": "C"}, "语料：", "与模型对话：", "zh"),
        (["--lang=en"], {"LANG": "zh_CN.UTF-8"}, "Corpus:", "Talk to the model:", "en"),
    ],
)
def test_runcpu_speaks_the_readers_language(mac, arguments, variables, first, closing, lang):
    plan_laptop(mac.base)
    done, calls = mac("dev/runcpu.sh", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    headings = re.findall(r"=== \[(\d+)/12\] (.*)\x1b", done.stdout)
    assert [int(number) for number, _ in headings] == list(range(1, 13))
    assert headings[0][1].startswith(first) and "%" not in done.stdout
    is_chinese = first.startswith("语")
    for _, title in headings:  # each in the one language or in the other
        assert bool(re.search("[一-鿿]", title)) is is_chinese, title
    end = done.stdout.partition(closing)[2]
    assert end and [line in end for line in TALK] == [True] * 3
    assert any(f"dev.talk --lang={lang}" in call for call in calls)


def test_runcpu_pretrains_on_the_stories_of_the_hub(mac):
    plan_laptop(mac.base)
    done, calls = mac("dev/runcpu.sh", "--source=tinystories")
    assert done.returncode == 0 and "Corpus: TinyStories" in done.stdout, done.stderr
    assert any("zangchat.dataset --source=tinystories" in call for call in calls)
    for script in ("tok_train", "base_train", "mid_train"):
        assert any(f"scripts.{script}" in c and "--dataset=tinystories" in c for c in calls), script


@pytest.mark.parametrize("flags, arch", [((), "nanochat"), (("--arch=modern",), "modern")])
def test_runcpu_trains_the_architecture_of_its_flag(mac, flags, arch):
    plan_laptop(mac.base)
    done, calls = mac("dev/runcpu.sh", *flags)
    assert done.returncode == 0, done.stderr
    assert [f"--arch={arch}" in call for call in calls if "scripts.base_train" in call] == [True]


def test_runcpu_names_an_unknown_flag_and_its_help_is_english(mac):
    done, calls = mac("dev/runcpu.sh", "--lang=fr", LANG="zh_CN.UTF-8")
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith("error: --lang=fr is not") and done.stderr.count("\n") == 1
    for script in ("dev/runcpu.sh", "../checkout/dev/runcpu.sh"):
        done, calls = mac(script, "--help", LANG="zh_CN.UTF-8")
        assert (done.returncode, calls) == (0, []), done.stderr
        assert "MINUTES=10 bash dev/runcpu.sh" in done.stdout
        assert done.stdout.isascii() and "set -" not in done.stdout


def test_runcpu_names_its_model_in_every_stage(mac):
    """By default a stage takes the largest model in the base directory."""
    plan_laptop(mac.base)
    (mac.base / "runcpu.later").unlink()
    done, calls = mac("dev/runcpu.sh")
    assert done.returncode == 0, done.stderr
    needed = "laptop_plan|base_train|base_loss|mid_train|chat_|dev.talk"
    stages = [call for call in calls if re.search(needed, call)]
    assert len(stages) == 10 and all("--model_tag=d4 " in call for call in stages), stages
    assert done.stdout.count(" --model_tag=d4  ") == 2, "the two ways to talk to it"


def test_runcpu_prints_commands_that_work_in_a_new_shell(mac):
    plan_laptop(mac.base)
    done, _ = mac("dev/runcpu.sh", ZANGCHAT_BASE_DIR=f"{mac.base}/a b", MINUTES="10", SEED="7")
    assert done.returncode == 1, "there is no folder for the plan"
    assert done.stderr.endswith(
        f"  export ZANGCHAT_BASE_DIR={mac.base}/a\\ b\n  MINUTES=10 SEED=7 bash dev/runcpu.sh\n"
    )
    done, _ = mac("dev/runcpu.sh")
    assert f"activate\n  export ZANGCHAT_BASE_DIR={mac.base}\n  python -m scripts" in done.stdout


def test_runcpu_says_in_chinese_that_a_stage_failed(mac):
    mac.base.mkdir()
    (mac.folder / ".venv/bin/python").write_text("#!/bin/bash\nexit 3\n")
    done, _ = mac("dev/runcpu.sh", "--lang=zh")
    assert done.returncode == 3 and "退出码 3" not in done.stdout
    (mac.base / "report").mkdir()
    (mac.base / "report/started.json").write_text("{}")
    done, _ = mac("dev/runcpu.sh", "--lang=zh")
    assert done.returncode == 3 and "没有完成（退出码 3）" in done.stderr


def test_runcpu_says_how_to_resume_if_the_plan_failed(mac):
    mac.base.mkdir()
    python = mac.folder / ".venv/bin/python"
    python.write_text("#!/bin/bash\ncase $* in *laptop_plan*) exit 4 ;; esac\n")
    done, _ = mac("dev/runcpu.sh", "--source=tinystories")
    assert done.returncode == 4 and "did not finish (exit code 4)" in done.stderr
    assert "\n  bash dev/runcpu.sh --source=tinystories\n" in done.stderr
    assert not (mac.base / "runcpu.plan").exists()


# -- bash 3.2 --------------------------------------------------------------------------------------

LATER = {  # features missing in macOS's bash 3.2 and in its tools
    r"\$\{\w+(\[[^]]*\])?(,,|\^\^|,|\^|@[A-Z])\}": "case modification",
    r"\b(mapfile|readarray|coproc)\b": "mapfile, coproc",
    r"\b(declare|local|typeset) -[A-Za-z]*[Ang]": "declare -A, -n, -g",
    r"\bwait -n\b": "wait -n",
    r"&>>|\|&|;;&|;&": "&>>, |&, ;;&",
    r"printf [^#]*%\([^)]*\)T": "printf %()T",
    r"\$\{\w+: -\d|\[-\d+\]": "negative indexes",
    r"\$\{?(EPOCHSECONDS|EPOCHREALTIME|SRANDOM|BASHPID)\b": "newer variables",
    r"\[\[? -v ": "test -v",
    r"\bshopt -s (globstar|lastpipe|inherit_errexit)": "newer options",
    r"\$\{\w+@": "parameter transformation",
    r"(?<![\w-])(timeout|flock|nproc|setsid|tac|stdbuf|realpath|sha256sum|readlink -f) ": "GNU tools",
    r"\bsed -i|\bgrep -\w*P|\bsort -V|\bdate -d|\bxargs -r|\bfind [^|]*-printf": "GNU options",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_on_bash_3_2(name):
    for number, line in enumerate(text_of(name).splitlines(), 1):
        code = re.sub(r"(^|\s)#.*", "", line)
        for pattern, feature in LATER.items():
            assert not re.search(pattern, code), f"{name}:{number} uses {feature}: {line}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_possibly_empty_arrays_are_guarded(name):
    """Under `set -u` bash 3.2 takes an empty array for an unset variable."""
    text = text_of(name)
    empty = set(re.findall(r"\b(\w+)=\(\)", text))
    for array in empty:
        for line in text.splitlines():
            bare = re.sub(rf'\$\{{{array}\[@\]\+"\$\{{{array}\[@\]\}}"\}}', "", line)
            guarded = f'"${{#{array}[@]}}" -gt 0' in text  # checked once, before the only use
            assert guarded or f"${{{array}[@]}}" not in bare, f"{name}: {line}"


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    done = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_checkout_on_windows_has_the_same_bytes(tmp_path):
    """Scripts run in WSL, and the files of the demo are checked by their hashes."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("no git checkout here")
    windows = ["git", "-c", "core.autocrlf=true", "-c", "core.eol=crlf"]
    names = ["dev/slurm.sbatch", "dev/setup.sh", ".ci/run", "zangchat/hf/chat_template.jinja"]
    names += [f"dev/demo/{path.name}" for path in (ROOT / "dev/demo").iterdir()]
    command = [*windows, "checkout-index", f"--prefix={tmp_path}/", "--", *names]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in names:
        assert b"\r" not in (tmp_path / name).read_bytes() or name.endswith("safetensors"), name


# -- uv sync ---------------------------------------------------------------------------------------


def test_uv_sync_installs_the_same_torch_and_the_crate():
    tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
    project = tomllib.loads(text_of("pyproject.toml"))
    assert f"\nTORCH_VERSION={TORCH}\n" in text_of("dev/setup.sh")
    for extra in ("gpu", "cpu"):
        assert f"torch=={TORCH}" in project["project"]["optional-dependencies"][extra]
    assert any(name.startswith("pip>") for name in project["project"]["dependencies"])
    assert "\npip==" in text_of("requirements.lock"), "uv's environments have none of their own"
    uv = project["tool"]["uv"]
    crates = project["dependency-groups"][uv["default-groups"][0]]
    assert crates == ["rustbpe", "ruststep"]
    for crate in crates:
        its = tomllib.loads(text_of(f"{uv['sources'][crate]['path']}/pyproject.toml"))
        assert its["project"]["name"] == crate
    assert "uv.lock" in text_of(".gitignore").split()


@pytest.mark.parametrize("name", READMES)
def test_readmes_name_the_mirrors_and_untested_platforms(name):
    text = text_of(name)
    assert any(
        all(word in line for word in ("UV_DEFAULT_INDEX", "PIP_INDEX_URL", "HF_ENDPOINT"))
        for line in text.splitlines()
    )
    assert "`uv sync --extra gpu`" in text
    assert any(
        "MPS" in line or "macOS" in line
        for line in text.split("\n\n")
        if "**untested on real hardware**" in line or "真机" in line
    )


def test_ci_has_a_job_on_macos():
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    assert any(
        str(job["os"]).startswith("macos-") for job in jobs["test"]["strategy"]["matrix"]["include"]
    )
