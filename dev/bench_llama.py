"""The peer "llama.cpp" of dev/bench_infer.py, in this process, on the same model.

The model is exported as GGUF and decodes greedily, like ours; both sides draw. If llama-cpp-python
is installed, which compiles for this machine, its functions are called for each step; else it is
the server of xllamacpp, which dev/setup.sh --dev installs: then a request's time for n + 16 tokens
less that for 16 is that of n steps, without the prompt.
"""

import importlib.util
import json
import random
import string
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from zangchat.errors import UserError

QUANTISED = {"": "", "int8": "q8_0"}


def measure(config: Any, dtype: str, threads: int) -> dict[str, Any]:
    """The `decode` part of bench_infer's output. Raises UserError if neither is installed."""
    from dev.bench_infer import decoding
    from zangchat.hf.gguf import MODEL_FILE

    if not (compiled() or importlib.util.find_spec("xllamacpp")):
        raise UserError("--peer=llama.cpp needs xllamacpp: run `bash dev/setup.sh --dev`")
    points = []
    with tempfile.TemporaryDirectory() as folder:
        dtype = QUANTISED[config.quantize] or dtype
        path = export(config, dtype, Path(folder) / "gguf", "gguf") / MODEL_FILE
        for rows, context in config.sweep():
            prompts = prompts_of(config, rows, context)
            sizes = (config.max_seq_len, config.steps, threads)
            times = steps(path, prompts, *sizes) if compiled() else served(path, prompts, *sizes)
            points.append(decoding(rows, context, times))
    how = "llama-cpp-python" if compiled() else "xllamacpp's server"
    return {"decode": points, "llama.cpp": how}


def compiled() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def steps(
    path: Path, prompts: list[list[int]], length: int, count: int, threads: int
) -> list[float]:
    """Seconds of each step, by the functions of llama.h."""
    import llama_cpp as lib

    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max = len(prompts) * length, 512, len(prompts)
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    sampler = lib.llama_sampler_init_greedy()
    batch = lib.llama_batch_init(512, 0, 1)

    def decode(entries: list[tuple[int, int, int]]) -> None:
        """(token, position, row) of each; logits for all."""
        batch.n_tokens = len(entries)
        for i, (token, position, row) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, True
        if lib.llama_decode(context, batch):
            raise UserError("llama.cpp could not decode")

    tokens = []
    for row, prompt in enumerate(prompts):
        decode([(token, i, row) for i, token in enumerate(prompt)])
        tokens.append(lib.llama_sampler_sample(sampler, context, len(prompt) - 1))
    times = []
    for step in range(count):
        start = time.perf_counter()
        decode([(token, len(prompts[0]) + step, row) for row, token in enumerate(tokens)])
        tokens = [lib.llama_sampler_sample(sampler, context, i) for i in range(len(tokens))]
        times.append(time.perf_counter() - start)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return times


def served(
    path: Path, prompts: list[list[int]], length: int, count: int, threads: int
) -> list[float]:
    """The mean seconds of a step, `count` times, of the server."""
    import xllamacpp

    from dev.bench_infer import steps_alone

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel = str(path), len(prompts)
    params.n_ctx, params.n_batch = len(prompts) * length, max(512, len(prompts))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    return steps_alone(lambda tokens: ask_all(server, prompts, tokens), count)


def ask_all(server: Any, prompts: list[list[int]], tokens: int) -> None:
    """That many tokens for all prompts at once."""

    def ask(prompt: list[int]) -> None:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            server.listening_address + "/completion",
            json.dumps({**body, "cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            answer.read()

    clients = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def prompts_of(config: Any, rows: int, context: int) -> list[list[int]]:
    number = random.Random(1)
    return [[number.randrange(config.vocab_size - 16) for _ in range(context)] for _ in range(rows)]


def export(config: Any, dtype: str, folder: Path, form: str) -> Path:
    """The folder of the benchmark's model in that format, with a tokenizer of as many tokens, of
    invented words.
    """
    from dev.bench_infer import randomise
    from zangchat.gpt import GPT
    from zangchat.hf.exporting import export as export_model
    from zangchat.tokenizer import SPLIT_PATTERN, RustBPETokenizer

    number = random.Random(1)
    words = (
        "".join(number.choices(string.ascii_lowercase, k=number.randint(2, 9)))
        for _ in range(20 * config.vocab_size)
    )
    pattern = SPLIT_PATTERN.replace("{1,2}", "")
    tokenizer = RustBPETokenizer.train_from_iterator(words, config.vocab_size, pattern)
    model = GPT(config.model())
    randomise(model)
    meta = {"stage": "sft", "user_config": {"model_tag": "bench"}, "step": 0, "val_bpb": None}
    export_model(model.eval(), tokenizer, meta, folder, dtype, form)
    return folder
