"""The formats of an export, and whether the libraries that each needs are installed, found out
without importing them.
"""

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from zangchat.errors import UserError

LEAST = {  # versions, as in pyproject.toml
    "transformers": "5.0",
    "safetensors": "0.4",
    "tokenizers": "0.20",
    "gguf": "0.18",  # has Apertus's activation
    "ctranslate2": "4.7.2",  # caps the logits
}
TRANSFORMERS = ("transformers", "safetensors", "tokenizers")


class Format(NamedTuple):
    module: str  # of zangchat/hf, whose `write` makes the files
    libraries: tuple[str, ...]
    dtypes: tuple[str, ...]  # of the numbers in the files
    capped: bool = False  # whether the programs cap the logits as we do


FORMATS = {
    "nanochat": Format("directory", TRANSFORMERS, ("float32", "bfloat16"), capped=True),
    "apertus": Format("apertus", TRANSFORMERS, ("float32", "bfloat16")),
    "mlx": Format("apertus", TRANSFORMERS, ("float32", "bfloat16")),
    "gguf": Format("gguf", (*TRANSFORMERS, "gguf"), ("float32", "bfloat16", "float16", "q8_0")),
    "ctranslate2": Format(
        "ctranslate2",
        (*TRANSFORMERS, "ctranslate2"),
        ("float32", "bfloat16", "int8"),
        capped=True,
    ),
}


def require_libraries(*names: str) -> None:
    """Raises UserError, with the command that installs them, if one is missing or too old."""
    if missing := [f"{name}>={LEAST[name]}" for name in names if not _is_installed(name)]:
        needed = f"{' and '.join(missing)} must be installed to exchange models in this format"
        # by the Python that runs: a plain `pip` may be another's
        command = shlex.join([sys.executable, "-m", "pip", "install", *missing])
        raise UserError(f"{needed}: run `{command}`")


def _is_installed(name: str) -> bool:
    try:
        found = version(name)
    except PackageNotFoundError:  # any folder of that name is a package to find_spec
        return False
    return _numbers(found) >= _numbers(LEAST[name]) and find_spec(name) is not None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
