"""Write a model for other programs: Hugging Face transformers, llama.cpp and Ollama, vLLM, MLX-LM,
CTranslate2.

    python -m scripts.export_hf -i sft -g d20 -o d20-sft                      for transformers 5
    python -m scripts.export_hf -i sft -g d20 -o d20-gguf --format=gguf --dtype=q8_0
    python -m scripts.export_hf -i base -g d20 -o d20-base --dtype=bfloat16

Formats: nanochat (transformers 5.0 and later), apertus (transformers, vLLM, SGLang), mlx (MLX-LM),
gguf (llama.cpp, Ollama, LM Studio), ctranslate2. None needs custom code. A directory for
transformers appears when it was loaded back and agrees with the model: logits, greedy text, token
ids, chat prompts.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from zangchat import configurator
from zangchat.hf.libraries import FORMATS, require_libraries
from zangchat.runtime.files import expand_home
from zangchat.runtime.logs import print0


@dataclass
class Config:
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]  # the directory to make
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"  # base | mid | sft | rl
    model_tag: Annotated[str | None, tyro.conf.arg(aliases=["-g"])] = None
    """default: the largest model"""
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None  # default: the last one
    format: Literal["nanochat", "apertus", "mlx", "gguf", "ctranslate2"] = "nanochat"
    """the program to write for; see above"""
    dtype: str = "float32"
    """of the numbers in the file: float32 | bfloat16; gguf also float16 | q8_0, ctranslate2 int8"""


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, export, argv)


def export(config: Config) -> int:
    require_libraries(*FORMATS[config.format].libraries)
    from zangchat import checkpoint_manager
    from zangchat.hf.exporting import export

    output = expand_home(config.output)
    model, tokenizer, meta = checkpoint_manager.load_model(
        config.source, "cpu", "eval", config.model_tag, config.step, dtype="float32"
    )
    manifest = export(model, tokenizer, meta, output, config.dtype, config.format)
    for what, value in manifest["checks"].items():
        print0(f"{what}: {value:.2g}" if isinstance(value, float) else f"{what}: {value}")
    size = sum(file["size"] for file in manifest["files"].values())
    print0(f"written to {output}: {len(manifest['files'])} files, {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
