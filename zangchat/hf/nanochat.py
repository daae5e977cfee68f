"""Checkpoints of nanochat, read as data: tensors, JSON, and a tokenizer that is a pickle, by a
reader that runs none of it.
"""

import io
import math
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zangchat import checkpoint_manager
from zangchat.bpe import by_rank
from zangchat.config import SOURCES, GPTConfig
from zangchat.errors import UserError, explain
from zangchat.hf.format import SIZES, read_json
from zangchat.hf.importing import Imported, fit
from zangchat.tokenizer import RustBPETokenizer

# nanochat normalizes by F.rms_norm(x, shape) with eps=None. For fp32 and bf16 alike torch then
# takes float32's epsilon, although its documentation says finfo(x.dtype): the sum is in fp32,
# compiled or not.
NANOCHAT_EPS = 2.0**-23
# Parts of nanochat's later architectures: a piece of their tensors' names -> a description
LATER_PARTS = {
    "value_embeds": "value embeddings",
    "ve_gate": "their gates",
    "resid_lambdas": "scales of the residual stream",
    "x0_lambdas": "the embedding added in each layer",
    "smear": "smear, the previous token's embedding",
    "backout": "backout, a layer that is subtracted at the end",
}


def read_checkpoint(
    base: Path, source: str, from_tag: str | None = None, step: int | None = None
) -> Imported:
    """A checkpoint of nanochat, of the architecture that it had in 2025.

    `base` is its base directory, a model's folder there, or one folder with model_*.pt,
    meta_*.json and tokenizer.pkl. Raises UserError.
    """
    folder, tokenizer_folder = _find_folders(base, source, from_tag)
    step = _find_step(folder, step)
    meta_path = folder / checkpoint_manager.meta_name(step)
    model_path = folder / checkpoint_manager.model_name(step)
    meta = read_json(meta_path)
    problem, remedy = (
        f"{meta_path} describes an unknown model",
        "take the files of a whole checkpoint",
    )
    with explain(problem, remedy, KeyError, TypeError, ValueError):
        settings = dict(meta["model_config"])
        sizes = {name: settings.pop(name) for name in SIZES}
        config = GPTConfig(**sizes, rms_norm_eps=NANOCHAT_EPS)
    tokenizer = read_tokenizer(tokenizer_folder / "tokenizer.pkl")
    tensors = checkpoint_manager.strip_prefix(checkpoint_manager.read_tensors(model_path, "cpu"))
    unplaced = later_parts(tensors) + [f"{name}={value}" for name, value in settings.items()]
    if unplaced:
        problem = f"{model_path} is of a later architecture of nanochat's"
        unknown = f"this program has no place for its {'; '.join(unplaced)}"
        raise UserError(f"{problem}, {unknown}: import a model of 2025, whose architecture is ours")
    weights = fit(tensors, config, model_path)
    bpb = meta.get("val_bpb")
    bpb = bpb if isinstance(bpb, (int, float)) and math.isfinite(bpb) else None
    return Imported(weights, config, tokenizer, step, bpb, f"nanochat checkpoint {folder.name}")


def later_parts(tensors: Iterable[str]) -> list[str]:
    """The parts that our architecture lacks, each with all of its tensors; layers are listed in
    braces, as in value_embeds.{1,3}.weight.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in tensors:
        part = next((part for key, part in LATER_PARTS.items() if key in name), None)
        if part is not None:
            layer = re.search(r"\.(\d+)\.", name)
            stem = name.replace(layer[0], ".{}.") if layer else name
            found.setdefault(part, {}).setdefault(stem, []).extend([layer[1]] if layer else [])
    return [
        f"{part} ({', '.join(s.replace('{}', '{' + ','.join(n) + '}') for s, n in stems.items())})"
        for part, stems in found.items()
    ]


def _find_folders(base: Path, source: str, from_tag: str | None) -> tuple[Path, Path]:
    """The folders of (the checkpoints, the tokenizer)."""
    if any(base.glob("model_*.pt")):
        places = (base, base.resolve().parent.parent / "tokenizer")  # shared alone, or in its place
        return base, next((p for p in places if (p / "tokenizer.pkl").is_file()), base)
    stage = base / SOURCES[source]
    tags = sorted({path.parent.name for path in stage.glob("*/model_*.pt")})
    if not tags:
        expected = f"neither a config.json nor a checkpoint of nanochat in {stage.name}/"
        raise UserError(f"--path={base} holds {expected}")
    if from_tag not in tags and (from_tag or len(tags) > 1):
        choice = f"must name one of the models in {stage}: {', '.join(tags)}"
        raise UserError(f"--from_tag={from_tag or ''} {choice}")
    return stage / (from_tag or tags[0]), base / "tokenizer"


def _find_step(folder: Path, step: int | None) -> int:
    """The step to import: `step` if the folder has it, by default the last."""
    matches = (re.fullmatch(r"model_(\d+)\.pt", path.name) for path in folder.iterdir())
    steps = sorted(int(match[1]) for match in matches if match)
    if not steps:
        parts = "the parts that single ranks have saved cannot be imported"
        raise UserError(f"{folder} has no whole model_*.pt: {parts}")
    if step not in (None, *steps):
        choice = f"choose one of {', '.join(map(str, steps))}"
        raise UserError(f"--step={step} is not in {folder}: {choice}")
    return steps[-1] if step is None else step


# ---- the tokenizer -------------------------------------------------------------------------------


def read_tokenizer(path: Path) -> RustBPETokenizer:
    """tokenizer.pkl, a pickled tiktoken.Encoding, read as data: nothing that the file names is
    imported or called.

    Raises UserError naming the file if it is missing or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: copy nanochat's tokenizer.pkl there")
    problem, remedy = f"{path} is not a tokenizer.pkl of nanochat", "take an intact copy"
    with explain(problem, remedy, Exception):  # a damaged pickle raises anything at all
        state = _EncodingReader(io.BytesIO(path.read_bytes())).read()
        tokens, names = by_rank(state["mergeable_ranks"]), state["special_tokens"]
        if sorted(names.values()) != list(range(len(tokens), len(tokens) + len(names))):
            raise ValueError("the ids of its special tokens do not follow the ranks")
        ordered = sorted(names, key=names.__getitem__)
        facts = {"imported": "nanochat's tokenizer.pkl"}
        return RustBPETokenizer(tokens, state["pat_str"], ordered, facts)


class _PickledEncoding:
    """Takes the place of tiktoken.Encoding in a pickle, and only remembers."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _latin1(text: str, encoding: str) -> bytes:
    """The one use of _codecs.encode in pickles before protocol 3, which have no bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes in {encoding!r}")
    return text.encode("latin-1")


class _EncodingReader(pickle.Unpickler):
    """Reads a pickled tiktoken.Encoding and refuses any other name, so that nothing can be run."""

    ALLOWED = {("tiktoken.core", "Encoding"): _PickledEncoding, ("_codecs", "encode"): _latin1}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which a tokenizer does not need"
            )
        return self.ALLOWED[module, name]

    def read(self) -> dict[str, Any]:
        """{"pat_str": str, "mergeable_ranks": {bytes: rank}, "special_tokens": {name: id}, ...}"""
        encoding = self.load()
        state = encoding.state if isinstance(encoding, _PickledEncoding) else None
        if isinstance(state, str):
            raise ValueError(
                f"it is only the name of tiktoken's encoding {state!r}, without its ranks"
            )
        if not isinstance(state, dict):
            raise ValueError("it holds no tiktoken.Encoding")
        pattern, ranks, names = (
            state.get(key) for key in ("pat_str", "mergeable_ranks", "special_tokens")
        )
        if not (
            isinstance(pattern, str)
            and isinstance(ranks, dict)
            and isinstance(names, dict)
            and all(type(token) is bytes and type(rank) is int for token, rank in ranks.items())
            and all(type(name) is str and type(id) is int for name, id in names.items())
        ):
            raise ValueError(
                "its pattern, ranks or special tokens are missing or of the wrong type"
            )
        return state
