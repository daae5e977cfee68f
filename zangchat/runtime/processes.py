"""The processes of one run, as torchrun starts them and tells them by the environment."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from types import FrameType

from zangchat.errors import UserError

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# The time that a rank, which fails because another did, leaves torchrun to see the other one first
GRACE_SECONDS = 5.0

INTERRUPTED = 130  # exit code, as a shell reports Ctrl-C

SPIN_COUNT = "2000"  # of threads at a barrier, some 40 microseconds; measured in dev/LOG.md


def is_stdout_closed() -> bool:
    """Whether stdout's reader has closed the pipe, as `| head` does; then buffered text is
    dropped.
    """
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def print_error(message: str) -> None:
    """Print on stderr, after pending output; a rank other than the first says its number."""
    rank = os.environ.get("RANK") or "0"
    sys.stdout.flush()
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def interruptible_imports() -> Iterator[None]:
    """Within the block, Ctrl-C during an import ends the process with one line and code 130.

    The exception would not do: an extension that imports others as it initialises may drop it.
    torch does so while it loads numpy, and then runs without numpy.
    """
    main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT)
    if not main or previous is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _on_interrupt(_number: int, frame: FrameType | None) -> None:
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            print_error("interrupted")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def prepare_streams() -> None:
    """Let no character stop a command.

    Windows gives files and pipes an encoding that lacks most of them (a terminal keeps its own),
    and half of a character may be typed or piped. Closed streams, as by `<&-`, are opened on
    os.devnull.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    )
    chosen = os.environ.get("PYTHONIOENCODING")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = None if chosen or stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # a caller has read from it already
            sys.stdin.reconfigure(errors="replace")


def prepare_threads(env: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait for each other on a CPU soon sleep; called before torch is loaded.

    By default they spin for milliseconds. If another program has one of the cores, the others spin
    through its turns; and in a step of decoding, which has its own threads, torch's would go on
    spinning after a prompt. Values of the user's own stay.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & env.keys():
        env["GOMP_SPINCOUNT"] = SPIN_COUNT


def prepare_hub(env: MutableMapping[str, str] = os.environ) -> None:
    """Unset an empty HF_ENDPOINT, which the hub's client takes for an address when it is loaded."""
    if not env.get("HF_ENDPOINT"):
        env.pop("HF_ENDPOINT", None)


def restore_threads(env: MutableMapping[str, str] = os.environ) -> None:
    """As they were, for a program of others that is measured beside ours."""
    if env.get("GOMP_SPINCOUNT") == SPIN_COUNT:
        del env["GOMP_SPINCOUNT"]


def is_ddp() -> bool:
    """Whether torchrun, or a cluster's launcher like it, started this process as one of several.

    RANK by itself, as some clusters set it, does not count. One process of one needs no others, so
    without MASTER_ADDR, where they would meet, it is an ordinary process.
    """
    ranks = [os.environ.get(name) for name in RANK_VARIABLES]
    return all(ranks) and not (ranks[2] == "1" and not os.environ.get("MASTER_ADDR"))


def get_dist_info() -> tuple[bool, int, int, int]:
    """(ddp, rank, local_rank, world_size); (False, 0, 0, 1) without torchrun.

    Raises UserError if the environment has something else than ranks.
    """
    if not is_ddp():
        return False, 0, 0, 1
    rank, local_rank, world_size = (_whole_number(name) for name in RANK_VARIABLES)
    return True, rank, local_rank, world_size


def check_meeting_place() -> None:
    """Raises UserError if the processes of the run do not know where to meet, or if this one, as in
    a pod of Kubeflow without torchrun, is one of several that would each run alone."""
    if not is_ddp():
        set_there = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
        if set_there and os.environ["WORLD_SIZE"] != "1":
            raise UserError(
                f"RANK and WORLD_SIZE={os.environ['WORLD_SIZE']} are set and LOCAL_RANK is not: "
                "start with torchrun, or unset RANK and WORLD_SIZE for a single process"
            )
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"{', '.join(RANK_VARIABLES)} are set and {name} is not: start with torchrun, or "
                "unset these three for a single process"
            )


def ranks_here() -> int:
    """How many processes of the run are on this machine."""
    ddp, _, _, world_size = get_dist_info()
    return (
        _whole_number("LOCAL_WORLD_SIZE")
        if ddp and os.environ.get("LOCAL_WORLD_SIZE")
        else world_size
    )


def _whole_number(name: str) -> int:
    if not os.environ[name].isdecimal():
        raise UserError(
            f"the environment has {name}={os.environ[name]}, which is not a number of processes: "
            "unset it, or start with torchrun"
        )
    return int(os.environ[name])


def compute_cleanup() -> None:
    """Leave the process group, if there is one.

    Only after success: NCCL waits here for the other ranks, and a rank that fails would wait until
    a collective's timeout. Does not import torch: an interrupted import cannot be retried.
    """
    if in_process_group():
        sys.modules["torch"].distributed.destroy_process_group()


def in_process_group() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())


def note_failure() -> bool:
    """Whether this rank is the first of the run to fail. The others then fail as well, since it
    leaves them."""
    if not in_process_group():
        return True
    store = sys.modules["torch"].distributed.distributed_c10d._get_default_store()
    try:
        return bool(store.add("zangchat/failed", 1) == 1)
    except RuntimeError:  # the rank that served the store has left
        return False


def report_failure(error: BaseException) -> bool:
    """Give the first failure of a run to torchrun, which ends its output with the traceback.

    On a rank that fails later: say so in one line, leave torchrun time to see the first one, and
    return False.
    """
    if not note_failure():
        rank = os.environ.get("RANK", "?")
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"[rank {rank}] {problem} (another rank failed first)", file=sys.stderr, flush=True)
        time.sleep(GRACE_SECONDS)
        return False
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    return True
