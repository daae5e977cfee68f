"""Measure inference: prefill, decoding, continuous batching, share of the memory bandwidth. JSON.

    python -m dev.bench_infer --depth=6 --max_seq_len=512 --vocab_size=8192
    python -m dev.bench_infer ... --peer=PATH      the same model in the nanochat checkout at PATH,
                                                   in turns with ours
    python -m dev.bench_infer ... --peer=llama.cpp   the same model in llama.cpp, see bench_llama
    python -m dev.bench_infer ... --peer=ctranslate2   or in CTranslate2, see bench_ctranslate2
    python -m dev.bench_infer ... --quantize=int8 --batches=1,8

The weights are random, so greedy decoding never ends early. Each repetition is a separate process;
every figure is the median over repetitions.
"""

import dataclasses
import importlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dev.bench_common import check_peer, machine, middle, repetition
from zangchat import configurator, flops
from zangchat.config import Architecture, GPTConfig
from zangchat.runtime.devices import compute_init, device_synchronize, resolve_dtype
from zangchat.runtime.memory import peak_memory_bytes
from zangchat.runtime.processes import restore_threads
from zangchat.training import planning

# other programs, on the model that we export, and the modules that measure them
PROGRAMS = {"llama.cpp": "dev.bench_llama", "ctranslate2": "dev.bench_ctranslate2"}
WARM = 16  # tokens that they generate before the timed ones


@dataclass
class Config:
    depth: int = 20
    n_embd: int = 0  # width, a multiple of --head_dim; 0 = from --depth
    head_dim: int = 128
    arch: Architecture = "nanochat"
    n_kv_head: int = 0
    max_seq_len: int = 2048
    vocab_size: int = 65536
    batches: str = "1,8,64"  # rows
    contexts: str = "64,256"  # tokens of a prompt
    steps: int = 64  # timed decoding steps
    repeats: int = 3
    quantize: str = ""  # int8: weights of the products, only ours
    device_type: str = ""  # cuda | mps | cpu; empty = the best one present
    dtype: str = ""  # bfloat16 | float16 | float32; empty = the fastest the device supports
    peer: str = ""  # folder of a nanochat checkout to compare with, or llama.cpp, or ctranslate2
    busy: bool = False  # measure even if the machine is busy; the output records it
    worker: str = ""  # internal: the side that a repetition measures

    @property
    def sides(self) -> list[str]:
        """Ours, and the peer."""
        peer = self.peer if self.peer in PROGRAMS else "nanochat"
        return ["zangchat", peer] if self.peer else ["zangchat"]

    def model(self) -> GPTConfig:
        return planning.model_config(self, self.vocab_size)

    def sweep(self) -> list[tuple[int, int]]:
        """(rows, tokens of a prompt). Raises UserError for a malformed list or too long a
        context.
        """
        try:
            batches, contexts = (
                [int(number) for number in text.split(",")]
                for text in (self.batches, self.contexts)
            )
        except ValueError:
            raise configurator.UserError(
                "--batches and --contexts are numbers with commas between, as in --batches=1,8,64"
            ) from None
        if min(batches + contexts) < 1 or max(contexts) + self.steps >= self.max_seq_len:
            raise configurator.UserError(
                f"--contexts and --steps={self.steps} do not fit into "
                f"--max_seq_len={self.max_seq_len}"
            )
        return [(batch, context) for context in contexts for batch in batches]


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> int:
    config.sweep()
    check_peer(config)
    if config.worker:
        print(json.dumps(work(config)))
        return 0
    result: dict[str, Any] = {
        "machine": machine(config.busy),
        "model": dataclasses.asdict(config.model()),
        "repeats": config.repeats,
    }
    runs: dict[str, list[Any]] = {name: [] for name in config.sides}
    for _ in range(config.repeats):
        for name, done in runs.items():
            done.append(repetition("dev.bench_infer", dataclasses.replace(config, worker=name)))
    result.update({name: middle(done) for name, done in runs.items()})
    if config.peer:
        ours, peers = (result[name]["decode"] for name in runs)
        result["speedup"] = {
            f"{a['batch']} rows, {a['context']}": a["tok_per_sec"] / b["tok_per_sec"]
            for a, b in zip(ours, peers, strict=True)
        }
    print(json.dumps(rounded(result), indent=1))
    return 0


def rounded(value: Any) -> Any:
    """Four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ---- one repetition ------------------------------------------------------------------------------


def work(config: Config) -> dict[str, Any]:
    import torch

    from zangchat.engine import native

    if config.worker != "zangchat":
        restore_threads()  # of libraries that are loaded only now
    device = compute_init(config.device_type)[-1]
    dtype = resolve_dtype(config.dtype, device)
    bandwidth, source = memory_bandwidth(device)
    known = {
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    found = {
        **known,
        "quantize": config.quantize,
        "bandwidth_gb_per_sec": bandwidth / 1e9,
        "bandwidth": source,
    }
    if config.worker == "nanochat":
        parts = nanochat(config, device, dtype)
    elif config.worker in PROGRAMS:
        program = importlib.import_module(PROGRAMS[config.worker])
        parts = program.measure(config, known_name(dtype), torch.get_num_threads())
    else:
        parts = zangchat(config, device, dtype)
    weights = {"": dtype.itemsize, "fp16": 2, "int8": 1}[config.quantize]
    stored = {"nanochat": dtype, "llama.cpp": torch.float16}.get(
        config.worker, native.storage_dtype(dtype, device)
    )
    for point in parts["decode"]:
        middle_context = point["context"] + config.steps // 2
        size = flops.decode_bytes(
            config.model(),
            middle_context,
            point["batch"],
            weight_bytes=weights,
            kv_bytes=stored.itemsize,
        )
        point["bytes_per_step"] = size
        point["share_of_bandwidth"] = size / (point["p50_ms"] / 1e3) / bandwidth
    return {**found, **parts, "peak_memory_mib": peak_memory_bytes(device) / 2**20}


def zangchat(config: Config, device: Any, dtype: Any) -> dict[str, Any]:
    from zangchat import checkpoint_manager
    from zangchat.engine import Engine, Request, RunningBatch

    gpt = config.model()
    model = checkpoint_manager.empty_model(gpt, device, known_name(dtype))
    randomise(model)
    model.set_compute_dtype(dtype, keep_masters=False)
    engine = Engine(model, Tokenizer(), config.quantize)
    number = random.Random(1)

    def batch_of(prompts: Sequence[tuple[int, int]], rows: int) -> tuple[Any, list[Any]]:
        """A running batch with a request for each (prompt tokens, new tokens)."""
        batch = RunningBatch(engine.model, engine.tokenizer, rows)
        requests = [
            Request([number.randrange(gpt.vocab_size - 8) for _ in range(read)], new, temperature=0)
            for read, new in prompts
        ]
        return batch, [batch.submit(request) for request in requests]

    def point(rows: int, context: int) -> tuple[dict[str, Any], dict[str, Any]]:
        batch, live = batch_of([(context, config.steps + 1)] * rows, rows)
        times = {
            "read": timed(
                batch.step, device, until=lambda: all(generation.tokens for generation in live)
            )
        }
        times["write"] = timed(batch.step, device, until=lambda: not batch.busy)
        return summary(rows, context, times)

    point(1, 16)  # the first pass of a process allocates, and loads kernels
    points = [point(*where) for where in config.sweep()]

    # requests of one length, which join and leave together, against mixed lengths of the same mean
    rows, (read, new) = (
        max(rows for rows, _ in config.sweep()),
        (min(64, gpt.sequence_len // 4), min(64, gpt.sequence_len // 4)),
    )
    batch, live = batch_of([(read, new)] * rows, rows)
    static = rows * new / sum(timed(batch.step, device, until=lambda: not batch.busy))
    mixed = [
        (number.randint(read // 2, read * 3 // 2), number.randint(new // 2, new * 3 // 2))
        for _ in range(4 * rows)
    ]
    batch, live = batch_of(mixed, rows)
    # Time only while a request waits for each free row; at the start all begin at once, and prompts
    # take more than their usual share.
    timed(
        batch.step,
        device,
        until=lambda: sum(generation.stop_reason is not None for generation in live) >= rows,
    )
    before = sum(len(generation.tokens) for generation in live)
    times = timed(batch.step, device, until=lambda: not batch.waiting)
    rate = (sum(len(generation.tokens) for generation in live) - before) / sum(times)
    mixed_result = {
        "rows": rows,
        "static_tok_per_sec": static,
        "tok_per_sec": rate,
        "share_of_static": rate / static,
    }
    return {
        "prefill": [read for read, _ in points],
        "decode": [write for _, write in points],
        "continuous": {
            **mixed_result,
            "p50_ms": quantile(times, 0.5),
            "p99_ms": quantile(times, 0.99),
        },
    }


def nanochat(config: Config, device: Any, dtype: Any) -> dict[str, Any]:
    """nanochat's engine: one prompt, read once, continued in every row."""
    import contextlib

    import torch

    sys.path.insert(0, config.peer)
    from nanochat.engine import Engine  # type: ignore[import-not-found]
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    gpt = config.model()
    sizes = {
        name: getattr(gpt, name)
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    }
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    model.to_empty(device=device)
    model.init_weights()
    randomise(model)
    engine = Engine(model.eval(), Tokenizer())
    autocast = (
        contextlib.nullcontext()
        if dtype == torch.float32
        else torch.amp.autocast(device.type, dtype=dtype)
    )

    def point(rows: int, context: int) -> tuple[dict[str, Any], dict[str, Any]]:
        stream = engine.generate(
            [i % (gpt.vocab_size - 8) for i in range(context)],
            rows,
            max_tokens=config.steps + 1,
            temperature=0.0,
        )
        with autocast:
            times = {
                "read": timed(lambda: next(stream), device, 1),
                "write": timed(lambda: next(stream), device, config.steps),
            }
        return summary(rows, context, times)

    point(1, 16)
    points = [point(*where) for where in config.sweep()]
    return {
        "prefill": [read for read, _ in points if read["batch"] == 1],
        "decode": [write for _, write in points],
    }


class Tokenizer:
    """No text, and special tokens that random weights never produce: rows end only by their
    length.
    """

    def encode_special(self, name: str) -> int:
        return -1

    get_bos_token_id = lambda self: -1  # noqa: E731
    get_special_tokens = lambda self: ()  # noqa: E731


def known_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def randomise(model: Any) -> None:
    """Give both models the same small random weights; zeros could be faster or slower to
    multiply.
    """
    import torch

    generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)


def timed(
    step: Callable[[], Any], device: Any, count: int = 0, until: Callable[[], bool] = lambda: False
) -> list[float]:
    """Seconds of each call, `count` times or until something holds."""
    times: list[float] = []
    while not (until() or 0 < count == len(times)):
        start = time.perf_counter()
        step()
        device_synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def steps_alone(generate: Callable[[int], Any], count: int) -> list[float]:
    """The mean seconds of a step, `count` times, without the prompt: the time to generate WARM +
    count tokens less that for WARM, each the fastest of three.
    """
    import torch

    few, many = (
        min(timed(partial(generate, tokens), torch.device("cpu"), 3))
        for tokens in (WARM, WARM + count)
    )
    return [(many - few) / count] * count


def summary(
    rows: int, context: int, times: dict[str, list[float]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    where, read = {"batch": rows, "context": context}, sum(times["read"])
    prefill = {**where, "tok_per_sec": rows * context / read, "seconds_to_first_token": read}
    return prefill, decoding(rows, context, times["write"])


def decoding(rows: int, context: int, times: list[float]) -> dict[str, Any]:
    """Of steps that took so many seconds each."""
    rate = {"batch": rows, "context": context, "tok_per_sec": rows * len(times) / sum(times)}
    return {**rate, "p50_ms": quantile(times, 0.5), "p99_ms": quantile(times, 0.99)}


def quantile(times: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))] * 1e3


def memory_bandwidth(device: Any) -> tuple[float, str]:
    """(bytes per second, source): the data sheet of a known GPU, else measured by summing a
    tensor.
    """
    import torch

    if device.type == "cuda" and (
        known := flops.memory_bandwidth(torch.cuda.get_device_name(device))
    ):
        return known, "data sheet"
    large = torch.ones(2**26, device=device)
    return large.numel() * 4 / min(timed(large.sum, device, 8)), "measured: the sum of 256 MiB"


if __name__ == "__main__":
    sys.exit(main())
