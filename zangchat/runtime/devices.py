"""The device, its number format and the process group."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path

import torch

from zangchat.config import check_device_type, check_dtype
from zangchat.errors import UserError
from zangchat.runtime.processes import check_meeting_place, get_dist_info, is_ddp, ranks_here

logger = logging.getLogger(__name__)
# the longest wait of a rank for another: only rank 0 saves, samples and compiles
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS, with which its results are always the same
# The first driver for each CUDA: https://docs.nvidia.com/cuda/cuda-toolkit-release-notes
FIRST_DRIVER = {"11": 450, "12": 525, "13": 580}
PIECES, BLOCKS = "expandable_segments:True", "expandable_segments:False"  # how CUDA allocates


def autodetect_device_type() -> str:
    """cuda, else mps (for a single process), else cpu.

    Raises UserError if nvidia-smi finds a GPU that torch cannot use.
    """
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available() and not is_ddp():
        logger.warning(
            "computing on Apple's GPU (MPS), untested on real hardware; --device_type=cpu computes "
            "on the CPU"
        )
        return "mps"
    _check_driver()
    return "cpu"


def _check_driver() -> None:
    """Raise UserError if nvidia-smi finds a GPU that this torch cannot use.

    Otherwise a model for GPUs would train on the CPU, for months.
    """
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
        problem, remedy = (
            f"torch {torch.__version__} is a build without CUDA",
            "run `bash dev/setup.sh`",
        )
    elif int(driver.split(".")[0]) < (first := FIRST_DRIVER.get(cuda.split(".")[0], 0)):
        problem = (
            f"torch {torch.__version__} is built for CUDA {cuda}, "
            f"which needs driver {first} or newer"
        )
        remedy = "update the driver"
    elif visible:
        problem, remedy = (
            f"CUDA_VISIBLE_DEVICES={visible} leaves torch {torch.__version__} none",
            "correct or unset it",
        )
    else:
        problem = f"torch {torch.__version__}, built for CUDA {cuda}, cannot use it"
        remedy = 'see `python -c "import torch; torch.cuda.init()"` for the reason'
    raise UserError(
        f"nvidia-smi finds a GPU (driver {driver}), but {problem}: {remedy}, "
        "or compute on the CPU with --device_type=cpu (in front of a script: "
        "CUDA_VISIBLE_DEVICES=-1)"
    )


def compute_init(
    device_type: str = "", seed: int = 42, deterministic: bool = False
) -> tuple[bool, int, int, int, torch.device]:
    """Make this process ready to compute: device, seeds, matmul precision, CPU threads and, under
    torchrun, the process group.

    Returns (ddp, rank, local_rank, world_size, device). An empty device_type means the best one
    present; raises UserError for one that is absent. `deterministic` matters on CUDA, where sums
    otherwise take whichever order is fastest.
    """
    device_type = device_type or autodetect_device_type()
    ddp, rank, local_rank, world_size = get_dist_info()
    _check_device(device_type, local_rank, ddp)
    if not (ddp and torch.distributed.is_initialized()):
        check_meeting_place()
    # weights only: every later draw has a generator of its own, seeded by derive_seed
    torch.manual_seed(seed)
    device = (
        torch.device(device_type, local_rank)
        if device_type == "cuda"
        else torch.device(device_type)
    )
    if device_type == "cuda":
        expand_segments()
        if deterministic:
            if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACES[0]  # read when cuBLAS starts
            # stderr names operations without such a form
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.cuda.set_device(device)
        check_kernels(device)
        torch.cuda.manual_seed(seed)
        # fp32 products on tensor cores. By the older of torch's two settings: after the newer one
        # (`fp32_precision`), torch.compile stops with "mix of the legacy and new APIs", since parts
        # of it still read the older (seen in 2.9 to 2.13).
        torch.set_float32_matmul_precision("high")
    # Ranks that each take every core slow each other down. torchrun sets the variable to 1 if the
    # user did not set it.
    if device_type == "cpu" and not os.environ.get("OMP_NUM_THREADS") and ranks_here() > 1:
        torch.set_num_threads(max(1, _usable_cores() // ranks_here()))
    if ddp and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="nccl" if device_type == "cuda" else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device_type == "cuda" else None,
        )
        torch.distributed.barrier()
    return ddp, rank, local_rank, world_size, device


def expand_segments() -> None:
    """Let CUDA's allocator map memory piece by piece instead of in blocks that fragment, unless the
    user has set it up. It reads its settings when it is first used."""
    if not any(os.environ.get(f"PYTORCH_{name}ALLOC_CONF") for name in ("", "CUDA_")):
        os.environ["PYTORCH_ALLOC_CONF"] = PIECES


def _allocate_blocks() -> None:
    """Undo `expand_segments`, for this process and its children."""
    os.environ["PYTORCH_ALLOC_CONF"] = BLOCKS
    # older torches have the second only, newer ones deprecate it
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (configure or torch.cuda.memory._set_allocator_settings)(BLOCKS)


def _check_device(device_type: str, local_rank: int, ddp: bool) -> None:
    check_device_type(device_type)
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device_type=cuda, but torch {torch.__version__} finds no CUDA device: leave the "
            "flag out or use --device_type=cpu"
        )
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "--device_type=mps, but there is no Metal device here: leave the flag out or use "
            "--device_type=cpu"
        )
    if device_type == "mps" and ddp:
        raise UserError(
            "--device_type=mps works with a single process: start the command with plain python, "
            "or use --device_type=cpu"
        )
    if device_type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank + 1} of this machine finds {torch.cuda.device_count()} CUDA "
            "devices: lower --nproc_per_node"
        )


def check_kernels(device: torch.device) -> None:
    """Raise UserError for a GPU that is older or newer than those this torch is built for.

    Gives up `expand_segments` where the driver cannot map memory: on some vGPUs, and on WSL2.
    """
    try:
        torch.ones(1, device=device).add_(1)
    except RuntimeError as error:
        if "CUDA driver error" in str(error) and os.environ.get("PYTORCH_ALLOC_CONF") == PIECES:
            logger.warning(
                "this GPU's driver cannot map memory piece by piece (%s): allocating it in blocks",
                str(error).partition("\n")[0],
            )
            _allocate_blocks()
            return check_kernels(device)
        if "no kernel image" not in str(error):
            raise
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} "
            f"(compute capability {major}.{minor}), only for "
            f"{', '.join(torch.cuda.get_arch_list())}: install a torch that is built for this GPU, "
            "perhaps with another CUDA, or compute on the CPU with --device_type=cpu"
        ) from error


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_dtype(flag: str, device: torch.device | str) -> torch.dtype:
    """The dtype matmuls run in: the one `flag` names, or for an empty flag the one the device is
    really fast with.

    bfloat16 on CUDA from compute capability 8.0 and on CPUs with AVX512-BF16 or AMX, float16 on
    older CUDA, else float32. Raises UserError.
    """
    check_dtype(flag)
    if flag:
        return getattr(torch, flag)
    device = torch.device(device)
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware; without that bf16 is emulated, and slower than
    fp32.
    """
    flags = {"avx512_bf16", "amx_bf16"}
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(flag) for flag in flags)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not flags.isdisjoint(
        cpuinfo.read_text(encoding="utf-8", errors="replace").split()
    )


def device_synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished its queue; a CPU always has."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
