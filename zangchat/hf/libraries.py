"""The formats of an export, and whether the libraries that each needs are installed, found out
without importing them.
"""

from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

from zangchat.errors import UserError

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
    """Raises UserError, with the command that installs them, if one is missing.

    transformers, which is slow to import, must also be version 5 or later.
    """
    missing = [name for name in names if find_spec(name) is None]
    if not missing and "transformers" in names and int(version("transformers").split(".")[0]) < 5:
        missing = ["transformers"]
    if missing:
        wanted = " ".join('"transformers>=5"' if n == "transformers" else n for n in names)
        needed = f"{' and '.join(missing)} must be installed to exchange models in this format"
        raise UserError(f"{needed}: run `pip install {wanted}`")
