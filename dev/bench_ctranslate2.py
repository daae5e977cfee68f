"""The peer "ctranslate2" of dev/bench_infer.py, in this process, on the same model.

The model is exported in CTranslate2's format and decodes greedily, like ours; both sides draw. The
time for n + 16 tokens less that for 16 is that of n steps, without the prompt.
"""

import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from dev.bench_llama import export, prompts_of
from zangchat.errors import UserError


def measure(config: Any, dtype: str, threads: int) -> dict[str, Any]:
    """The `decode` part of bench_infer's output. Raises UserError if it is not installed."""
    from dev.bench_infer import decoding, steps_alone

    if not importlib.util.find_spec("ctranslate2"):
        raise UserError("--peer=ctranslate2 needs ctranslate2: run `bash dev/setup.sh --dev`")
    import ctranslate2

    points = []
    with tempfile.TemporaryDirectory() as base:
        folder = export(config, config.quantize or dtype, Path(base) / "model", "ctranslate2")
        names = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        generator = ctranslate2.Generator(str(folder), intra_threads=threads)
        for rows, context in config.sweep():
            prompts = [[names[i] for i in row] for row in prompts_of(config, rows, context)]
            times = steps_alone(partial(generate, generator, prompts), config.steps)
            points.append(decoding(rows, context, times))
        computed = generator.compute_type
    return {"decode": points, "compute_type": computed}


def generate(generator: Any, prompts: list[list[str]], count: int) -> None:
    """`count` tokens for each prompt."""
    lengths = {"min_length": count, "max_length": count}
    found = generator.generate_batch(prompts, include_prompt_in_result=False, **lengths)
    if any(len(each.sequences_ids[0]) != count for each in found):
        raise UserError("CTranslate2 ended a reply early")
