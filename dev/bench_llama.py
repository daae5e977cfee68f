"""The peer "llama.cpp" of dev/bench_infer.py: its own server, in this process, on the same model.

The model is exported as GGUF and decodes greedily, like ours; both sides draw. A request's time
for n + 16 tokens less that for 16 is that of n steps, without the prompt.
"""

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

WARM = 16  # tokens before the timed ones
QUANTISED = {"": "", "int8": "q8_0"}


def measure(config: Any, dtype: str, threads: int) -> dict[str, Any]:
    """The `decode` part of bench_infer's output. Raises UserError if xllamacpp is missing."""
    from dev.bench_infer import summary

    try:
        import xllamacpp
    except ImportError:
        raise UserError("--peer=llama.cpp needs xllamacpp: run `bash dev/setup.sh --dev`") from None
    points = []
    with tempfile.TemporaryDirectory() as folder:
        path = export(config, QUANTISED[config.quantize] or dtype, Path(folder) / "gguf")
        for rows, context in config.sweep():
            params = xllamacpp.CommonParams()
            params.model.path, params.n_parallel = str(path), rows
            params.n_ctx, params.n_batch = rows * config.max_seq_len, max(512, rows)
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
            server = xllamacpp.Server(params)
            number = random.Random(1)
            prompts = [
                [number.randrange(config.vocab_size - 16) for _ in range(context)]
                for _ in range(rows)
            ]
            few, many = (seconds(server, prompts, n) for n in (WARM, WARM + config.steps))
            step = (many - few) / config.steps
            points.append(summary(rows, context, {"read": [few], "write": [step] * config.steps}))
            del server
    return {"decode": [write for _, write in points]}


def seconds(server: Any, prompts: list[list[int]], tokens: int) -> float:
    """Of the fastest of three times that all prompts at once get that many tokens."""

    def ask(prompt: list[int]) -> None:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            server.listening_address + "/completion",
            json.dumps({**body, "cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            answer.read()

    times = []
    for _ in range(3):
        clients = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
        start = time.perf_counter()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        times.append(time.perf_counter() - start)
    return min(times)


def export(config: Any, dtype: str, folder: Path) -> Path:
    """The GGUF of the benchmark's model, with a tokenizer of as many tokens, of invented words."""
    from dev.bench_infer import randomise
    from zangchat.gpt import GPT
    from zangchat.hf.exporting import export as export_model
    from zangchat.hf.gguf import MODEL_FILE
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
    export_model(model.eval(), tokenizer, meta, folder, dtype, "gguf")
    return folder / MODEL_FILE
