r"""Measure training speed: tokens per second, share of matrix-product speed, first step, memory.
JSON.

    python -m dev.bench_train --depth=6 --head_dim=64 --max_seq_len=512 --vocab_size=8192 \
        --total_batch_size=16384 --device_batch_size=8
    python -m dev.bench_train ... --peer=PATH      the same model in the nanochat checkout at PATH,
                                                   in turns with ours
    python -m dev.bench_train ... --profile=trace.json      the time of one step: a table, and a
                                                            trace for chrome://tracing or perfetto

A step is complete, on random tokens: forward, backward, clipping, optimizer. Each side is one
process, so it compiles only once. Its time to the first step is taken before the other side starts
and includes all that a user waits for (imports, building, compiling). Repetitions take turns. A
machine that is busy with other work gives no result.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.bench_common import check_peer, environment, machine, middle
from scripts import base_train
from zangchat import configurator, flops
from zangchat.runtime.devices import compute_init, device_synchronize, resolve_dtype
from zangchat.runtime.memory import keep_freed_memory, peak_memory_bytes
from zangchat.training import planning


@dataclass
class Config(base_train.Config):
    vocab_size: int = 65536
    device_batch_size: int = 32  # rows in one pass; "auto" is not available here
    steps: int = 8  # timed steps of a repetition
    repeats: int = 3
    peer: str = ""  # folder of a nanochat checkout to compare with
    busy: bool = False  # measure even if the machine is busy; the output records it
    profile: str = ""  # write a trace of one step to this file, and print the costliest operations
    worker: str = ""  # internal: the side that a process measures, "zangchat" or "nanochat"
    launched: float = 0.0  # internal: start time of its process


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> int:
    check_peer(config)
    if config.worker or config.profile:
        return work(config)
    where = machine(config.busy)
    sides = {
        name: Side(config, name)
        for name in ("zangchat", "nanochat")
        if name == "zangchat" or config.peer
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(config.repeats):
        for name, side in sides.items():
            runs[name].append(side.repetition())
    gpt = planning.model_config(config, config.vocab_size)
    result: dict[str, Any] = {
        "model": dataclasses.asdict(gpt),
        "parameters": flops.count_params(gpt)["total"],
        "tokens_per_step": tokens_per_step(config),
        "device_batch_size": config.device_batch_size,
        "repeats": config.repeats,
        "machine": where,
    }
    for name, done in runs.items():
        result[name] = middle(done)
        result[name]["all_tok_per_sec"] = [run["tok_per_sec"] for run in done]
    if config.peer:
        result["speedup"] = result["zangchat"]["tok_per_sec"] / result["nanochat"]["tok_per_sec"]
    print(json.dumps(result, indent=1))
    return 0


class Side:
    """A process that takes its first step, reports it as a line of JSON, then measures on
    request.
    """

    def __init__(self, config: Config, name: str) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
        flags = configurator.as_flags(
            dataclasses.replace(config, worker=name, launched=time.time())
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dev.bench_train", *flags],
            env=environment(name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            cwd=Path(__file__).parents[1],
        )
        self._answer()

    def repetition(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # a peer's code may also print
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        raise configurator.UserError(
            f"{self.name} could not be measured:\n{self.errors.read()[-3000:]}"
        )


def tokens_per_step(config: Config) -> int:
    rows = config.device_batch_size * config.max_seq_len
    return config.total_batch_size if config.total_batch_size > 0 else rows


# ---- one side ------------------------------------------------------------------------------------


def work(config: Config) -> int:
    device = compute_init(config.device_type)[-1]
    make = nanochat if config.worker == "nanochat" else zangchat
    step, dtype, fp8_note = make(config, device)
    step()
    device_synchronize(device)
    first = time.time() - config.launched
    if config.profile:
        return profile(config, step, device)
    rate = gemm_rate(config, device, dtype)
    print("{}", flush=True)  # ready
    for _ in sys.stdin:
        print(
            json.dumps(
                {
                    "seconds_to_first_step": round(first, 2),
                    "fp8": fp8_note,
                    **timed_steps(config, step, device, dtype, rate),
                }
            ),
            flush=True,
        )
    return 0


def step_times(step: Callable[[], Any], device: Any, steps: int) -> list[float]:
    """Seconds of each of `steps` steps."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        device_synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def timed_steps(
    config: Config, step: Callable[[], Any], device: Any, dtype: Any, rate: float
) -> dict[str, Any]:
    import torch

    times = step_times(step, device, config.steps)
    pace = tokens_per_step(config) / statistics.median(times)
    gpt = planning.model_config(config, config.vocab_size)
    return {
        "tok_per_sec": round(pace, 1),
        "step_seconds": round(statistics.median(times), 4),
        "gemm_tflops": round(rate / 1e12, 4),
        "mfu_of_gemm": round(pace * flops.flops_per_token(gpt) / rate, 4),
        "peak_memory_mib": round(peak_memory_bytes(device) / 2**20),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def zangchat(config: Config, device: Any) -> tuple[Callable[[], Any], Any, str]:
    """(a step of the real Trainer on batches made beforehand, its dtype, what became of --fp8)"""
    from dev.gpu_check import ours

    if device.type == "cpu":
        keep_freed_memory()
    gpt = planning.model_config(config, config.vocab_size)
    dtype = resolve_dtype(config.dtype, device)
    trainer, chosen = ours.make_trainer(
        gpt,
        device,
        dtype,
        config.device_batch_size,
        fp8_products=config.fp8,
        grad_checkpoint=config.grad_checkpoint,
        compile=config.compile,
        weight_decay=config.weight_decay,
        kind=config.optimizer,
    )
    if device.type != "cpu":  # nothing to choose on a CPU
        print(f"attention: {chosen['attention']}", file=sys.stderr)
    batch = ours.make_batch(gpt, tokens_per_step(config) // gpt.sequence_len)
    return lambda: trainer.train_step(batch), dtype, chosen["fp8"]


def nanochat(config: Config, device: Any) -> tuple[Callable[[], Any], Any, str]:
    """A step of nanochat's pretraining: its model and optimizers, combined as in its own script."""
    import contextlib

    import torch

    sys.path.insert(0, config.peer)
    from nanochat import common as peer_common  # type: ignore[import-not-found]
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    gpt = planning.model_config(config, config.vocab_size)
    sizes = {
        name: getattr(gpt, name)
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    }
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    model.to_empty(device=device)
    model.init_weights()
    made = (
        model.setup_optimizers()
        if hasattr(model, "setup_optimizers")
        else [model.setup_optimizer()]
    )
    dtype = getattr(
        peer_common,
        "COMPUTE_DTYPE",
        torch.bfloat16 if device.type == "cuda" or config.dtype == "bfloat16" else torch.float32,
    )
    # newer versions cast by themselves, older ones use autocast on CUDA
    cast = hasattr(peer_common, "COMPUTE_DTYPE") or dtype == torch.float32
    autocast = contextlib.nullcontext() if cast else torch.amp.autocast(device.type, dtype=dtype)
    compiled = torch.compile(model, dynamic=False)
    rows = tokens_per_step(config) // gpt.sequence_len
    tokens = torch.randint(gpt.vocab_size, (rows, gpt.sequence_len + 1), device=device)
    passes = list(
        zip(
            tokens[:, :-1].split(config.device_batch_size),
            tokens[:, 1:].split(config.device_batch_size),
            strict=True,
        )
    )

    def step() -> float:
        total = 0.0
        for inputs, targets in passes:
            with autocast:
                loss = compiled(inputs.contiguous(), targets.contiguous())
            total = loss.detach().item()
            (loss / len(passes)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in made:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return total

    return step, dtype, ""


def gemm_rate(config: Config, device: Any, dtype: Any) -> float:
    """FLOP/s of a plain matrix product with the model's largest shape in `dtype`."""
    import torch

    gpt = planning.model_config(config, config.vocab_size)
    tokens = min(tokens_per_step(config), config.device_batch_size * gpt.sequence_len)
    a, b = (
        torch.randn(shape, device=device).to(dtype)
        for shape in ((tokens, gpt.n_embd), (4 * gpt.n_embd, gpt.n_embd))
    )
    times = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(10):
            a @ b.T
        device_synchronize(device)
        times.append((time.perf_counter() - start) / 10)
    return 2 * tokens * gpt.n_embd * 4 * gpt.n_embd / min(times)


def profile(config: Config, step: Callable[[], Any], device: Any) -> int:
    import torch

    kinds = [torch.profiler.ProfilerActivity.CPU] + (
        [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    )
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
    profiler.export_chrome_trace(config.profile)
    print(profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25))
    print(f"the trace: {config.profile}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
