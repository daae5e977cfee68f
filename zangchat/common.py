"""What every command needs: where files live, logging, the device and its number format, the process group, safe writes and downloads.

torch is imported inside the functions that use it, so that importing this module costs nothing and changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

from zangchat.configurator import UserError, to_dict

if TYPE_CHECKING:
    import filelock
    import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # the longest a rank may wait for another: rank 0 alone saves, samples and compiles
MAX_RETRY_AFTER = 300.0  # seconds that a server may ask us to stay away
DOWNLOAD_TRIES = 5
DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 20
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
# The first driver for each CUDA: https://docs.nvidia.com/cuda/cuda-toolkit-release-notes
FIRST_DRIVER = {"11": 450, "12": 525, "13": 580}

BANNER = r"""
 #####   ###   #   #   ####   ####  #   #   ###   #####
    #   #   #  ##  #  #      #      #   #  #   #    #
   #    #####  # # #  #  ##  #      #####  #####    #
  #     #   #  #  ##  #   #  #      #   #  #   #    #
 #####  #   #  #   #   ####   ####  #   #  #   #    #
"""


# ---- files ----------------------------------------------------------------------------------------------------------


def get_base_dir() -> Path:
    """Where everything a run makes is kept: $ZANGCHAT_BASE_DIR, else ~/.cache/zangchat. Created when missing; UserError if it cannot be."""
    base = Path(os.environ.get("ZANGCHAT_BASE_DIR") or "~/.cache/zangchat")
    try:
        base = base.expanduser()
        base.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home, as in a container without HOME
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the folder {base} cannot be made ({reason}): set ZANGCHAT_BASE_DIR to one you can write to") from error
    return base


def expand_home(path: str | Path) -> Path:
    """`~/x` as the x of one's home. Raises UserError for a home that nobody has."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} leads nowhere ({error}): write the path without ~") from error


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when the block ends without an exception: whole, and on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replace a file whole or not at all, whenever the process or the machine stops."""
    with atomic_file(path) as file:
        # half a character, as a path may hold, becomes what JSON writes for it
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some file systems (CIFS, some FUSE mounts, Windows) cannot sync a folder:
    then the file, which is synced itself, is all that can be had.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        _warn_once(
            f"{folder} is on a file system that cannot sync folders ({error.strerror}): after a power cut the last files may be missing"
        )
    finally:
        os.close(descriptor)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def file_lock(path: str | Path) -> filelock.FileLock:
    """A lock between processes, on the file `path`. Acquiring it raises UserError on a file system
    without locks, and filelock.Timeout if a timeout is set and another process holds it.
    """
    return _lock_class()(path)


@functools.cache
def _lock_class() -> type[filelock.FileLock]:
    import filelock

    class Lock(filelock.FileLock):  # type: ignore[misc, valid-type]
        def _acquire(self) -> None:
            try:
                super()._acquire()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                raise UserError(
                    f"{self.lock_file} cannot be locked ({error.strerror}): set ZANGCHAT_BASE_DIR to a folder on a disk with locks"
                ) from error

    return Lock


def download_file_with_lock(
    url: str, filename: str, postprocess_fn: Callable[[Path], None] | None = None, sha256: str | None = None
) -> Path:
    """Fetch `url` to <base>/filename once, however many processes ask for it; returns the path.

    `postprocess_fn(path)` sees the complete download before it gets its name, so that a file which is present was also processed.
    Raises UserError when the server refuses, or when DOWNLOAD_TRIES attempts gave no complete file with that sha256.
    """
    path = get_base_dir() / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_intact(path, sha256):
        return path
    with file_lock(f"{path}.lock"):
        if _is_intact(path, sha256):  # another process fetched it while this one waited
            return path
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
        try:
            _download(url, temporary, path, sha256)
            if postprocess_fn is not None:
                postprocess_fn(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _is_intact(path: Path, sha256: str | None) -> bool:
    if not path.exists():
        return False
    if sha256 is None or file_sha256(path) == sha256.lower():
        return True
    logger.warning("%s is not the expected file (its sha256 differs): fetching it again", path)
    return False


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


class Failure(NamedTuple):
    """One failed attempt: the reason in words, whether another attempt is pointless, and the wait that the server asked for (seconds)."""

    reason: str
    final: bool
    wait: float


def asked_wait(headers: Any) -> float:
    """The seconds of a Retry-After header, at most MAX_RETRY_AFTER; 0 without one."""
    value = headers.get("Retry-After", "")
    return min(float(value), MAX_RETRY_AFTER) if value.isdecimal() else 0.0


def is_refusal(status: int) -> bool:
    """Whether this HTTP status says no, rather than not now."""
    return 400 <= status < 500 and status not in (408, 429)


def with_retries(label: str, attempt: Callable[[], T], judge: Callable[[Exception], Failure], *, tries: int, first_wait: float) -> T:
    """attempt(), repeated after failures that may pass, with waits that double. Raises the last error, or one that `judge` calls final."""
    for number in range(1, tries):
        try:
            return attempt()
        except Exception as error:
            failure = judge(error)
            if failure.final:
                raise
            wait = max(first_wait * 2 ** (number - 1), failure.wait)
            logger.warning("%s: %s; trying again in %.0f s (%d of %d)", label, failure.reason, wait, number + 1, tries)
            time.sleep(wait)
    return attempt()


def _download(url: str, temporary: Path, path: Path, sha256: str | None) -> None:
    def attempt() -> None:
        if problem := _download_once(url, temporary, sha256):
            raise OSError(problem)

    try:
        with_retries(url, attempt, _judge_download, tries=DOWNLOAD_TRIES, first_wait=1.0)
    except (OSError, HTTPException) as error:  # URLError, timeouts and broken connections are OSErrors
        problem = _judge_download(error).reason
        raise UserError(
            f"could not download {url}: {problem}; check the network and run this again, or put the file at {path} yourself"
        ) from error


def _judge_download(error: Exception) -> Failure:
    if isinstance(error, urllib.error.HTTPError):
        return Failure(f"the server answered {error.code} {error.reason}", is_refusal(error.code), asked_wait(error.headers))
    return Failure(str(error) or type(error).__name__, not isinstance(error, (OSError, HTTPException)), 0.0)


def _download_once(url: str, temporary: Path, sha256: str | None) -> str:
    """One attempt; returns what is wrong with the bytes that came, or "" when they are whole."""
    digest, length = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "zangchat"})
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response, open(temporary, "wb") as file:
        announced = response.headers.get("Content-Length")
        while block := response.read(CHUNK):
            file.write(block)
            digest.update(block)
            length += len(block)
        file.flush()
        os.fsync(file.fileno())
    if announced is not None and length != int(announced):
        return f"{length} bytes came of {announced}"
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        return f"the sha256 of what came is {digest.hexdigest()}, not {sha256.lower()}"
    return ""


def read_jsonl(path: Path, kinds: tuple[type, ...] = (dict,)) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of every line that is not blank. Raises UserError naming a line that is no JSON, or none of these kinds."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number} is not JSON ({error.msg}); each line must be one JSON object") from error
                if not isinstance(value, kinds):
                    raise UserError(f"{path}:{number} is a JSON {type(value).__name__}; each line must be one JSON object")
                yield f"{path}:{number}", value


# ---- randomness -----------------------------------------------------------------------------------------------------


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on `parts` alone, e.g. (seed, "shuffle", epoch, index): the one source of randomness after initialisation.

    Parts are str, int, float, bool, None or tuples of these; raises TypeError for others, whose repr may not be the same elsewhere.
    """
    text = "\x1f".join(_stable(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") >> 1


def _stable(part: Any) -> str:
    if part is None or isinstance(part, (bool, str)):
        return repr(part)
    if isinstance(part, (tuple, list)):
        return "(" + ",".join(_stable(item) for item in part) + ")"
    if isinstance(part, float):
        return repr(float(part))
    if hasattr(part, "__index__"):  # numpy's integers print differently, and differ by version
        return repr(operator.index(part))
    raise TypeError(f"a seed cannot be derived from {type(part).__name__}")


# ---- terminal and logs ----------------------------------------------------------------------------------------------


class ColoredFormatter(logging.Formatter):
    """Time, level, logger and message; the level in colour where `color` is true."""

    COLORS = {
        logging.DEBUG: "\x1b[36m",
        logging.INFO: "\x1b[32m",
        logging.WARNING: "\x1b[33m",
        logging.ERROR: "\x1b[31m",
        logging.CRITICAL: "\x1b[1;31m",
    }
    RESET = "\x1b[0m"

    def __init__(self, color: bool = True):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        if not self.color or record.levelno not in self.COLORS:
            return super().format(record)
        painted = logging.makeLogRecord(record.__dict__)  # other handlers see the record unpainted
        painted.levelname = f"{self.COLORS[record.levelno]}{record.levelname}{self.RESET}"
        return super().format(painted)


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever sys.stderr is when the message comes."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_default_logging() -> None:
    """Log to stderr: our own modules from INFO (rank 0; from WARNING elsewhere), others from WARNING. A second call changes nothing."""
    root = logging.getLogger()
    if any(isinstance(handler.formatter, ColoredFormatter) for handler in root.handlers):
        return
    handler = _StderrHandler()
    handler.setFormatter(ColoredFormatter(color=sys.stderr.isatty() and "NO_COLOR" not in os.environ))
    root.addHandler(handler)
    for name in ("zangchat", "scripts", "tasks", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if get_dist_info()[1] == 0 else logging.WARNING)


class _SteadyStream:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Inside the block no output ends the program: the terminal may be closed, `| tee` may have died of
    the same Ctrl-C, the disk of a log may be full. What cannot be written is dropped.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_SteadyStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except OSError:  # Python would try again at its end, and fail with exit code 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print0(*values: Any, **kwargs: Any) -> None:
    """print() on rank 0 only."""
    if get_dist_info()[1] == 0:
        print(*values, **{"flush": True, **kwargs})


def log0(message: str, level: int = logging.INFO) -> None:
    """Log on rank 0 only, under the name `zangchat`.

    In a program of your own, call setup_default_logging() first: without it INFO is not shown.
    """
    if get_dist_info()[1] == 0:
        logging.getLogger("zangchat").log(level, message, stacklevel=2)


def print_banner() -> None:
    print0(BANNER)


# ---- processes and devices ------------------------------------------------------------------------------------------


def is_ddp() -> bool:
    """Whether torchrun started this process. RANK alone, as some clusters set it, does not count."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def get_dist_info() -> tuple[bool, int, int, int]:
    """(ddp, rank, local_rank, world_size); (False, 0, 0, 1) without torchrun."""
    if not is_ddp():
        return False, 0, 0, 1
    return True, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


def autodetect_device_type() -> str:
    """cuda, else mps (for a single process), else cpu.

    Raises UserError if nvidia-smi finds a GPU that torch cannot use.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available() and not is_ddp():
        logger.warning("computing on Apple's GPU (MPS), untested on real hardware; --device_type=cpu computes on the CPU")
        return "mps"
    _check_driver()
    return "cpu"


def _check_driver() -> None:
    """Raise UserError if nvidia-smi finds a GPU that this torch cannot use.

    Otherwise a model for GPUs would train on the CPU, for months.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and (not visible.strip() or visible.strip().startswith("-"))
    if hidden or not (program := shutil.which("nvidia-smi")):
        return
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("computing on the CPU: nvidia-smi did not answer (%s)", error)
        return
    answer = " ".join((done.stdout + done.stderr).split())
    if done.returncode or not re.match(r"\d+\.\d+", answer):
        logger.warning("computing on the CPU: nvidia-smi says: %s", answer)
        return
    driver, cuda = answer.split()[0], torch.version.cuda
    if not cuda:
        problem, remedy = f"torch {torch.__version__} is a build without CUDA", "run `bash dev/setup.sh`"
    elif int(driver.split(".")[0]) < (first := FIRST_DRIVER.get(cuda.split(".")[0], 0)):
        problem = f"torch {torch.__version__} is built for CUDA {cuda}, which needs driver {first} or newer"
        remedy = "update the driver"
    elif visible:
        problem, remedy = f"CUDA_VISIBLE_DEVICES={visible} leaves torch {torch.__version__} none", "correct or unset it"
    else:
        problem = f"torch {torch.__version__}, built for CUDA {cuda}, cannot use it"
        remedy = 'see `python -c "import torch; torch.cuda.init()"` for the reason'
    raise UserError(
        f"nvidia-smi finds a GPU (driver {driver}), but {problem}: {remedy}, "
        "or compute on the CPU with --device_type=cpu (in front of a script: CUDA_VISIBLE_DEVICES=-1)"
    )


def compute_init(device_type: str = "", seed: int = 42, deterministic: bool = False) -> tuple[bool, int, int, int, torch.device]:
    """Make this process ready to compute: device, seeds, matmul precision, CPU threads and, under torchrun, the process group.

    Returns (ddp, rank, local_rank, world_size, device). An empty device_type means the best one present; raises UserError for one that is
    absent. `deterministic` matters on CUDA, where sums otherwise take whichever order is fastest.
    """
    import torch

    device_type = device_type or autodetect_device_type()
    ddp, rank, local_rank, world_size = get_dist_info()
    _check_device(device_type, local_rank, ddp)
    torch.manual_seed(seed)  # weights only: every later draw has a generator of its own, seeded by derive_seed
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
            torch.use_deterministic_algorithms(True, warn_only=True)  # names on stderr whatever has no such form
        torch.cuda.set_device(device)
        torch.cuda.manual_seed(seed)
        # fp32 products on tensor cores. By the older of torch's two settings: after the newer one (`fp32_precision`), torch.compile
        # stops with "mix of the legacy and new APIs", since parts of it still read the older (seen in 2.9 to 2.13).
        torch.set_float32_matmul_precision("high")
    if device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1 where the user did not
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        if local_world_size > 1:  # ranks that each take every core slow each other down
            torch.set_num_threads(max(1, _usable_cores() // local_world_size))
    if ddp and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="nccl" if device_type == "cuda" else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device_type == "cuda" else None,
        )
        torch.distributed.barrier()
    return ddp, rank, local_rank, world_size, device


def compute_cleanup() -> None:
    """Leave the process group, where there is one. Whoever stopped the import of torch gets no second one, which would fail."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_device(device_type: str, local_rank: int, ddp: bool) -> None:
    import torch

    if device_type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device_type={device_type} is not known: choose cuda, mps or cpu, or leave the flag out for the best one")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device_type=cuda, but torch {torch.__version__} finds no CUDA device: leave the flag out or use --device_type=cpu"
        )
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device_type=mps, but there is no Metal device here: leave the flag out or use --device_type=cpu")
    if device_type == "mps" and ddp:
        raise UserError("--device_type=mps works with a single process: start the command with plain python, or use --device_type=cpu")
    if device_type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank + 1} of this machine finds {torch.cuda.device_count()} CUDA devices: lower --nproc_per_node")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """On a CPU with glibc: memory that is freed stays with the process, for the next tensor.

    By default each tensor of some megabytes is fetched from the system and given back, page by page: some hundredths of a training step.
    """
    import ctypes

    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing apart from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back its end


def resolve_dtype(flag: str, device: torch.device | str) -> torch.dtype:
    """The dtype matmuls run in: the one `flag` names, or for an empty flag the one the device is really fast with.

    bfloat16 on CUDA from compute capability 8.0 and on CPUs with AVX512-BF16 or AMX, float16 on older CUDA, else float32. Raises UserError.
    """
    import torch

    choices = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if flag:
        if flag not in choices:
            raise UserError(f"--dtype={flag} is not known: choose {', '.join(choices)}, or leave the flag out for what suits the device")
        return choices[flag]
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware; without that bf16 is emulated, and slower than fp32."""
    import torch

    flags = {"avx512_bf16", "amx_bf16"}
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(flag) for flag in flags)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not flags.isdisjoint(cpuinfo.read_text(encoding="utf-8", errors="replace").split())


def device_synchronize(device: torch.device | str) -> None:
    """Wait until the device has done what was asked of it; a CPU always has."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: torch's CUDA error, Python's, or the RuntimeError of torch's CPU allocator."""
    import torch

    told = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in told for words in ("can't allocate memory", "not enough memory", "bad_alloc"))
    )


def device_memory(device: torch.device | str) -> int:
    """Bytes that this process may count on: of the device on CUDA and MPS; on a CPU its share, among the ranks of this machine, of what
    is free, and what it has already."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    import psutil

    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + psutil.Process().memory_info().rss


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that can still be taken: of the machine or, if that is less, of the container or job (Linux's cgroups)."""
    import psutil

    available = float(psutil.virtual_memory().available)
    try:
        memberships = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return int(available)
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers == "":  # version 2
            home, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            home, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = home / path.lstrip("/")
        for group in (inside, *inside.parents):  # a limit holds for all groups below it
            if not group.is_relative_to(home):
                break
            available = min(available, _left_in(group, *names))
    return int(available)


def _left_in(group: Path, limit: str, usage: str, cached: str) -> float:
    """Bytes that a cgroup has left, its file cache included, which is given up on demand; infinity if it has no limit."""
    try:
        limit_bytes = float((group / limit).read_text(encoding="utf-8").strip().replace("max", "inf"))
        used = int((group / usage).read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):  # the root has no such files, a container may not see those above it
        return float("inf")
    return max(0.0, limit_bytes - used + int(stat.get(cached, 0)))


def peak_memory_bytes(device: torch.device | str) -> int:
    """The most memory used so far: of the device by tensors on CUDA, of the driver on MPS (now), of this process on a CPU."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))  # in the class of Windows alone

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- experiment tracking --------------------------------------------------------------------------------------------


class DummyWandb:
    """Takes what a wandb run takes and keeps nothing."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def finish(self, *args: Any, **kwargs: Any) -> None:
        pass


def get_wandb(run: str, config: Any, project: str) -> Any:
    """A wandb run named `run` (else $WANDB_RUN) on rank 0; a DummyWandb for "dummy" and on other ranks. `config`: dataclass or dict."""
    if run == "dummy":
        run = os.environ.get("WANDB_RUN", "dummy")
    if run == "dummy" or get_dist_info()[1] != 0:
        return DummyWandb()
    import wandb

    return wandb.init(project=project, name=run, config=config if isinstance(config, dict) else to_dict(config))
