"""The parts of the check. Each runs in a process of its own and yields rows: name, value, unit,
and beside it what was expected, or whether it is as it should be (`ok`)."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dev.gpu_check import ours
from dev.gpu_check.arithmetic import milliseconds
from tests.reference import gpt as slow_gpt
from tests.reference.loss import softcapped_cross_entropy as slow_loss
from zangchat import flops, schedule
from zangchat.config import GPTConfig
from zangchat.nn import fp8
from zangchat.runtime.devices import device_synchronize
from zangchat.runtime.memory import device_memory, peak_memory_bytes

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
UNUSABLE = (RuntimeError, ImportError, AttributeError, ValueError)  # backends raise these
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Sizes:
    depth: int = 20
    head_dim: int = 128
    vocab_size: int = 65536
    sequence_len: int = 2048
    rows: int = 32  # of a pass
    decode_rows: tuple[int, ...] = (1, 16, 64, 256)
    prompt: int = 512
    steps: int = 32  # decoded
    copied: int = 2**30  # bytes
    repeats: int = 10

    def model(self, depth: int | None = None) -> GPTConfig:
        return schedule.model_config_for_depth(
            depth or self.depth,
            self.head_dim,
            vocab_size=self.vocab_size,
            sequence_len=self.sequence_len,
        )


TINY = Sizes(2, 32, 512, 64, 4, (1, 4), 8, 4, 2**20, 2)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median; the first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        device_synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def data_sheet(device: torch.device) -> flops.Device | None:
    return flops.find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


# ---- the machine and its ceilings ----------------------------------------------------------------


def machine(_: Sizes, device: torch.device) -> Iterator[Row]:
    found = {
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "GPUs": torch.cuda.device_count(),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", ""),
    }
    if device.type == "cuda":
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["device"] = torch.cuda.get_device_name(device)
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        found["driver"] = _first_line(driver)
    found["commit"] = _first_line(["git", "describe", "--always", "--dirty"])
    yield from ({"name": name, "value": value} for name, value in found.items())
    yield {"name": "free memory", "value": device_memory(device) / flops.GIB, "unit": "GiB"}


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return (done.stdout or done.stderr).partition("\n")[0]


def ceilings(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Products at the model's shapes, forward and both backward ones, and a copy."""
    gpt, sheet = sizes.model(), data_sheet(device)
    width, tokens = gpt.n_embd, sizes.rows * sizes.sequence_len
    for outputs, inputs in (
        (3 * width, width),
        (width, width),
        (4 * width, width),
        (width, 4 * width),
        (gpt.vocab_size, width),
    ):
        M = min(tokens, 2**29 // outputs)  # the head's in chunks, as in the loss
        x, w, g = (
            torch.randn(shape, device=device).to(BF16)
            for shape in ((M, inputs), (outputs, inputs), (M, outputs))
        )
        products = {
            "x W^T": partial(torch.matmul, x, w.T),
            "g W": partial(torch.matmul, g, w),
            "g^T x": partial(torch.matmul, g.T, x),
        }
        for name, product in products.items():
            rate = 2 * M * inputs * outputs / seconds(product, device, sizes.repeats)
            yield _rate(f"bf16 {name}, {M} x {inputs} -> {outputs}", rate, sheet and sheet.half)
        if fp8.unusable(device) is None:
            (x8, sx), (w8, sw) = (fp8.quantise(t, fp8.E4M3) for t in (x, w))
            product = partial(fp8.scaled_product, x8, w8, sx, sw, BF16)
            rate = 2 * M * inputs * outputs / seconds(product, device, sizes.repeats)
            yield _rate(f"fp8 x W^T, {M} x {inputs} -> {outputs}", rate, sheet and sheet.fp8)
        del x, w, g
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * sizes.copied / seconds(lambda: target.copy_(source), device, sizes.repeats)
    yield _rate("copy, read and written", rate / 1e9, sheet and sheet.bandwidth, "GB/s", 1)


def _rate(
    name: str, value: float, peak: float | None, unit: str = "TFLOP/s", scale: float = 1e12
) -> Row:
    row: Row = {"name": name, "value": value / scale, "unit": unit}
    return {**row, "expected": peak, "share": value / scale / peak} if peak else row


def attention(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Forward and backward of each backend at the shape of a pass, and the one that is chosen."""
    gpt = sizes.model()
    shape = (sizes.rows, gpt.n_head, sizes.sequence_len, gpt.head_dim)
    sheet = data_sheet(device)
    # causal, 2 products forward and 5 backward
    work = 7 * math.prod(shape) * sizes.sequence_len
    for dtype in (BF16, FP16):
        for backend in ours.attention_backends(device, dtype):
            q, k, v = ours.attention_problem(device, dtype, shape)

            def both(backend: str = backend, q: Any = q, k: Any = k, v: Any = v) -> None:
                out = ours.attend(backend, q, k, v)
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

            name = f"{backend}, {ours.dtype_name(dtype)}"
            try:
                time_taken = seconds(both, device, sizes.repeats)
            except UNUSABLE as error:
                yield {"name": name, "note": f"not usable: {str(error).splitlines()[0]}"}
                continue
            row: Row = {"name": name, "value": 1e3 * time_taken, "unit": "ms"}
            peak = sheet and sheet.half * 1e12
            yield {**row, "share": work / time_taken / peak} if peak else row


# ---- training ------------------------------------------------------------------------------------


def train_bf16(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    yield from _train(sizes, device, BF16, fp8_products=False)


def train_fp8(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    yield from _train(sizes, device, BF16, fp8_products=True)


def train_fp16(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    yield from _train(sizes, device, FP16, fp8_products=False)


def _train(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, fp8_products: bool
) -> Iterator[Row]:
    """A step of one pass, complete: forward, backward, clipping, optimizer."""
    gpt, sheet, name = sizes.model(), data_sheet(device), ours.dtype_name(dtype)
    planner: dict[str, Any] = {"dtype": name, "device_type": device.type}
    rows = flops.fitting_batch(gpt, sizes.rows, device_memory(device), **planner)
    if not rows:
        yield {"name": "rows", "ok": False, "note": "not one row of this model fits the memory"}
        return
    start = time.perf_counter()
    trainer, chosen = ours.make_trainer(
        gpt, device, dtype, rows, fp8_products=fp8_products, compile=device.type == "cuda"
    )
    for what, reason in chosen.items():
        if reason:
            yield {"name": what, "note": reason}
    batch = ours.make_batch(gpt, rows)
    first = trainer.train_step(batch)
    device_synchronize(device)
    yield {"name": "first step", "value": time.perf_counter() - start, "unit": "s"}
    taken = seconds(lambda: trainer.train_step(batch), device, max(2, sizes.repeats // 3))
    last = trainer.train_step(batch)
    yield {
        "name": "loss of the same batch, first and last",
        "value": last["loss"],
        "expected": first["loss"],
        "ok": math.isfinite(last["loss"]) and last["loss"] < first["loss"],
    }
    tokens = rows * sizes.sequence_len
    expected = arithmetic(gpt, tokens, sheet, fp8_products) if sheet else {}
    whole = expected.get("the pass")  # the optimizer's step comes on top
    yield {"name": f"step of {rows} rows", "value": 1e3 * taken, "unit": "ms", "expected": whole}
    rate: Row = {"name": "pace", "value": tokens / taken, "unit": "tok/s"}
    work = flops.flops_per_token(gpt) * tokens / taken
    yield {**rate, "share": work / (sheet.half * 1e12)} if sheet else rate
    planned = flops.memory_estimate(gpt, rows, **planner)["total"]
    used = peak_memory_bytes(device)
    memory: Row = {"name": "peak memory", "value": used / flops.GIB, "unit": "GiB"}
    if device.type == "cuda":  # elsewhere of the whole process
        memory |= {"expected": planned / flops.GIB, "share": used / planned}
    yield memory
    yield from shares(lambda: trainer.train_step(batch), device, 1e3 * taken, expected)


def arithmetic(
    gpt: GPTConfig, tokens: int, sheet: flops.Device, fp8_products: bool
) -> dict[str, float]:
    """Milliseconds expected of each kind of kernel, between the best and the cautious figure."""
    pairs = milliseconds(gpt, tokens, sheet, fp8_products)
    middle = {name: (best + cautious) / 2 for name, (best, cautious) in pairs.items()}
    return {
        "products": middle["block products"] + middle["head and loss"],
        "attention": middle["attention"],
        OTHERS: middle["element-wise"] + middle["embedding, casts, adds"],
        "the pass": middle["the pass"],
    }


OTHERS = "element-wise, others"
KINDS = {  # a part of a kernel's or operation's name -> its share of the step; the first that fits
    "nccl": "communication",
    "attention": "attention",
    "flash": "attention",
    "fmha": "attention",
    "sdpa": "attention",
    "triton": OTHERS,
    "gemm": "products",
    "nvjet": "products",
    "cutlass": "products",
    "xmma": "products",
    "scaled_mm": "products",
    "::mm": "products",
    "::addmm": "products",
    "baddbmm": "products",
    "::bmm": "products",
    "memcpy": "copies",
    "memset": "copies",
    "copy_": "copies",
}


def shares(
    step: Callable[[], Any], device: torch.device, wall: float, expected: dict[str, float]
) -> Iterator[Row]:
    """Milliseconds of one step by kind of kernel, and when the device was idle."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA] if on_gpu else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        device_synchronize(device)
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for part, kind in KINDS.items() if part in name), OTHERS)
        found[kind] = found.get(kind, 0.0) + spent / 1e3
    found["idle"] = max(0.0, wall - sum(found.values()))
    for kind, spent in sorted(found.items(), key=lambda item: -item[1]):
        row = {"name": f"of it {kind}", "value": spent, "unit": "ms", "share": spent / wall}
        yield {**row, "expected": expected.get(kind)}


def resume(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Four steps, and two, saved, loaded and two more: the same weights, bit for bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    gpt = sizes.model(depth=min(sizes.depth, 4))
    results = []
    for stop in (4, 2):
        trainer, _ = ours.make_trainer(gpt, device, BF16, 2)
        for step in range(stop):
            trainer.train_step(ours.make_batch(gpt, 4, seed=step))
        if stop == 2:
            with tempfile.TemporaryDirectory() as folder:
                ours.save(trainer, folder)
                trainer, _ = ours.make_trainer(gpt, device, BF16, 2)
                ours.load(trainer, folder)
            for step in range(2, 4):
                trainer.train_step(ours.make_batch(gpt, 4, seed=step))
        results.append(ours.weights(trainer))
    whole, resumed = results
    differing = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    yield {"name": "parameters that differ", "value": len(differing), "ok": not differing}


# ---- numerics ------------------------------------------------------------------------------------


def numerics(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The largest error of each fast path, relative to the largest value of its slow twin."""
    dtypes = {FP32: 5e-3, BF16: 5e-2}  # tolerances; fp32 products may run in TF32
    for dtype, tolerance in dtypes.items():
        q, k, v = ours.attention_problem(device, dtype, (2, 4, 256, sizes.head_dim))
        scores = q.double() @ k.double().mT / math.sqrt(sizes.head_dim)
        later = torch.ones(256, 256, dtype=torch.bool, device=device).triu(1)
        slow = scores.masked_fill(later, -math.inf).softmax(-1) @ v.double()
        for backend in ours.attention_backends(device, dtype):
            name = f"attention by {backend}, {ours.dtype_name(dtype)}"
            try:
                yield _compared(name, ours.attend(backend, q, k, v), slow, tolerance)
            except UNUSABLE as error:
                yield {"name": name, "note": f"not usable: {str(error).splitlines()[0]}"}
        yield from _loss_numerics(device, dtype, tolerance)
        yield _model_numerics(device, dtype, tolerance)
    matrices = torch.randn(2, 128, 384, device=device)
    orthogonalise = ours.orthogonalise()
    fast, slow = orthogonalise(matrices, BF16), orthogonalise(matrices, FP32)
    likeness = float(torch.cosine_similarity(fast.float().flatten(), slow.flatten(), dim=0))
    yield {"name": "Muon in bf16: cosine to fp32", "value": likeness, "ok": likeness > 0.99}
    problem = fp8.unusable(device)
    yield {
        "name": "fp8 product",
        "note": problem or "equals its emulation",
        "ok": not problem if _has_fp8(device) else None,
    }
    if device.type == "cuda":
        yield _compiled(device)
    else:
        yield {"name": "compiled step", "note": f"not tried on {device.type}"}


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= fp8.CAPABILITY


def _compared(name: str, fast: Tensor, slow: Tensor, tolerance: float) -> Row:
    fast, slow = fast.detach().double(), slow.detach().to(fast.device).double()
    error = float((fast - slow).abs().max() / slow.abs().max())
    return {"name": name, "value": error, "expected": tolerance, "ok": error <= tolerance}


def _loss_numerics(device: torch.device, dtype: torch.dtype, tolerance: float) -> Iterator[Row]:
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    x, weight = draw(512, 256).to(dtype).requires_grad_(), draw(1000, 256).requires_grad_()
    targets = torch.randint(1000, (512,), generator=generator, device=device)
    leaves = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    slow = torch.autograd.grad(slow_loss(*leaves, targets, 1000, 15.0), leaves)
    for compile in (False, True) if device.type == "cuda" else (False,):
        fast = torch.autograd.grad(ours.loss(x, weight, targets, compile), (x, weight))
        for part, got, expected in zip(("x", "the head"), fast, slow, strict=True):
            how = "compiled loss" if compile else "loss"
            name = f"{how}, gradient of {part}, {ours.dtype_name(dtype)}"
            yield _compared(name, got, expected, tolerance)


def _model_numerics(device: torch.device, dtype: torch.dtype, tolerance: float) -> Row:
    """The training model against the formulas in fp64."""
    gpt = TINY.model()
    model = ours.make_model(gpt, device, dtype)
    tokens = [number % gpt.vocab_size for number in range(3, 600, 31)]
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    expected = slow_gpt.logits(weights, gpt, tokens)
    name = f"logits of the model, {ours.dtype_name(dtype)}"
    return _compared(name, ours.logits(model, tokens), expected, tolerance)


def _compiled(device: torch.device) -> Row:
    gpt = schedule.model_config_for_depth(4, 128, 0, vocab_size=4096, sequence_len=512)
    losses = []
    for compile in (False, True):
        trainer, _ = ours.make_trainer(gpt, device, BF16, 4, compile=compile)
        batches = [ours.make_batch(gpt, 4, seed) for seed in range(3)]
        losses.append([trainer.train_step(batch)["loss"] for batch in batches][-1])
    eager, compiled = losses
    error = abs(compiled - eager) / eager
    return {"name": "compiled step", "value": error, "expected": 2e-3, "ok": error <= 2e-3}


# ---- decoding ------------------------------------------------------------------------------------


def decode(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Tokens per second of all rows, beside the roofline of the memory."""
    gpt, sheet = sizes.model(), data_sheet(device)
    engine = ours.make_engine(gpt, device, BF16)
    number = ours.kv_size(BF16, device)
    prompt = [token % gpt.vocab_size for token in range(7, 7 + sizes.prompt)]
    for rows in sizes.decode_rows:
        length = sizes.prompt + 2 * sizes.steps
        needed = rows * length * flops.kv_bytes_per_token(gpt, number)
        if 2 * needed > device_memory(device):
            yield {"name": f"{rows} rows", "note": f"{needed / flops.GIB:.1f} GiB do not fit"}
            continue
        run = ours.Decoding(engine, [prompt] * rows, 2 * sizes.steps)
        run.begin()
        steps = run.steps()
        for _ in range(sizes.steps // 2):  # captures the graphs
            next(steps)
        device_synchronize(device)
        start = time.perf_counter()
        for _ in range(sizes.steps):
            next(steps)
        device_synchronize(device)
        taken = (time.perf_counter() - start) / sizes.steps
        row: Row = {"name": f"{rows} rows", "value": rows / taken, "unit": "tok/s"}
        if sheet:
            context = sizes.prompt + sizes.steps
            size = {"weight_bytes": 2, "kv_bytes": number}
            limit = flops.decode_roofline(gpt, sheet.bandwidth * 1e9, context, rows, **size)
            row |= {"expected": limit, "share": rows / taken / limit}
        yield row


def graphs(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The same greedy text with CUDA graphs as without, of prompts of different lengths."""
    gpt = sizes.model(depth=min(sizes.depth, 4))
    lengths = [1 + i * sizes.prompt // 5 for i in range(5)]
    prompts = [
        [(3 * i + n) % gpt.vocab_size for n in range(size)] for i, size in enumerate(lengths)
    ]
    torch.set_float32_matmul_precision("highest")  # TF32 would decide between close tokens
    for dtype in (FP32, BF16):
        engine = ours.make_engine(gpt, device, dtype)
        fast = ours.Decoding(engine, prompts, sizes.steps)
        used = fast.has_graphs
        texts = fast.tokens(), ours.Decoding(engine, prompts, sizes.steps, graphs=False).tokens()
        pairs = [pair for both in zip(*texts, strict=True) for pair in zip(*both, strict=True)]
        same = sum(a == b for a, b in pairs)
        yield {
            "name": f"equal tokens of {len(pairs)}, {ours.dtype_name(dtype)}",
            "value": same,
            "expected": len(pairs),
            "ok": same == len(pairs) if dtype == FP32 else None,
            "note": "" if used else f"no CUDA graphs on {device.type}: both eager",
        }


# ---- several processes ---------------------------------------------------------------------------


def nccl(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Sums and broadcasts between as many processes as there are GPUs."""
    count = _processes(device)
    code, output, _ = _torchrun("nccl_rank", count, sizes, device)
    rows = [line for line in output.splitlines() if line.startswith("{")]
    yield from map(json.loads, rows)
    yield {"name": "processes", "value": count, "ok": code == 0 and bool(rows)}
    if code:
        yield {"name": "problem", "ok": False, "note": output.strip()[-500:]}


def nccl_rank(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One of the processes of `nccl`; rank 0 reports."""
    gpt = sizes.model()
    rank, count = dist.get_rank(), dist.get_world_size()
    gradient = torch.full((flops.scaling_params(gpt) // 8,), float(rank + 1), device=device)
    for name, work, moved in (
        ("all-reduce", lambda: dist.all_reduce(gradient), 2 * (count - 1) / count),
        ("broadcast", lambda: dist.broadcast(gradient, 0), 1.0),
    ):
        gradient.fill_(rank + 1.0)
        work()
        correct = float(gradient[0]) == (count * (count + 1) / 2 if name == "all-reduce" else 1.0)
        rate = moved * gradient.nbytes / seconds(work, device, sizes.repeats) / 1e9
        if rank == 0:
            yield {"name": f"{name} in fp32", "value": rate, "unit": "GB/s", "ok": correct}


def failing(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One rank raises in its backward pass: all end, and the output ends with its traceback."""
    count = _processes(device)
    code, output, taken = _torchrun("failing_rank", count, sizes, device)
    last = output.rpartition("Traceback (most recent call last)")[2]
    ended = code == 1 and "ZeroDivisionError: on purpose" in last
    row: Row = {"name": f"end of {count} processes, start included", "value": taken, "unit": "s"}
    yield {**row, "ok": ended, "note": "" if ended else output.strip()[-500:]}
    if count == 1:
        yield {"name": "ranks", "note": "only one GPU: nobody had to wait for the failing rank"}


def failing_rank(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError("on purpose")

    gpt = sizes.model(depth=min(sizes.depth, 4))
    rank, count = dist.get_rank(), dist.get_world_size()
    trainer, _ = ours.make_trainer(gpt, device, BF16, 2, rank=rank, world_size=count)
    trainer.train_step(ours.make_batch(gpt, 2, seed=rank))
    if rank == count - 1:
        next(iter(trainer.optimizer.names)).register_hook(fail)
    trainer.train_step(ours.make_batch(gpt, 2, seed=rank))
    yield from ()


def _processes(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else 2


def _torchrun(part: str, count: int, sizes: Sizes, device: torch.device) -> tuple[int, str, float]:
    """(exit code, output, seconds)"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={count}", "-m", "dev.gpu_check", "--", f"--part={part}"]
    command += [f"--device_type={device.type}", f"--rehearse={sizes is TINY}"]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout, time.perf_counter() - start


# in order; the seconds that each may take on an H100
PARTS: dict[str, tuple[Callable[[Sizes, torch.device], Iterator[Row]], int]] = {
    "machine": (machine, 30),
    "ceilings": (ceilings, 45),
    "attention": (attention, 60),
    "train_bf16": (train_bf16, 150),
    "decode": (decode, 90),
    "numerics": (numerics, 120),
    "graphs": (graphs, 60),
    "train_fp8": (train_fp8, 150),
    "resume": (resume, 60),
    "failing": (failing, 90),
    "nccl": (nccl, 60),
    "train_fp16": (train_fp16, 150),
}
RANKS = {"nccl_rank": nccl_rank, "failing_rank": failing_rank}  # under torchrun
