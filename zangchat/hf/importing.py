"""Hugging Face directory -> a checkpoint of ours, which chats, is evaluated and finetuned like any
other.

Everything is read as data: tensors and JSON.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zangchat import checkpoint_manager
from zangchat.config import GPTConfig, RunState
from zangchat.errors import UserError, explain
from zangchat.gpt import GPT
from zangchat.hf.format import (
    ARCHITECTURE,
    FORMAT,
    MANIFEST,
    VOCAB_ROWS,
    config_from_hf,
    read_json,
    weight_names,
)
from zangchat.hf.libraries import require_libraries
from zangchat.runtime.files import file_sha256

if TYPE_CHECKING:
    from zangchat.tokenizer import RustBPETokenizer

# transformers counts the rows that resize_token_embeddings(pad_to_multiple_of=...) adds as tokens
PADDINGS = (8, 16, 32, 64, 128, 256)


class Imported(NamedTuple):
    """A model from elsewhere, with our names and our padding."""

    weights: dict[str, Tensor]
    config: GPTConfig
    tokenizer: "RustBPETokenizer"
    step: int
    val_bpb: float | None
    origin: str


def read_hf(folder: Path) -> Imported:
    """A directory of safetensors with model_type nanochat; the hashes of our exports are verified.

    Raises UserError.
    """
    require_libraries("safetensors", "tokenizers")
    import safetensors.torch

    from zangchat.hf.tokenizer import read_tokenizer_json

    manifest: dict[str, Any] = {}
    path = folder / MANIFEST
    if path.is_file() and FORMAT.encode() in path.read_bytes():  # else it is another program's
        manifest = read_json(path)
        verify_files(folder, manifest)
    config = config_from_hf(read_json(folder / "config.json"), folder / "config.json")
    tokenizer = read_tokenizer_json(folder / "tokenizer.json")
    tokens = tokenizer.get_vocab_size()
    if config.vocab_size in (-(-tokens // multiple) * multiple for multiple in PADDINGS):
        config = replace(config, vocab_size=tokens)
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(read_json(index).get("weight_map", {}).values()))
        if index.is_file()
        else ["model.safetensors"]
    )
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / Path(name).name
        with explain(
            f"{path} cannot be read", "copy the model again", OSError, safetensors.SafetensorError
        ):
            tensors.update(safetensors.torch.load_file(path))
    ours = {theirs: ours for ours, theirs in weight_names(config).items()}
    weights = fit(
        {ours.get(name, name): tensor for name, tensor in tensors.items()}, config, folder
    )
    return Imported(
        weights,
        config,
        tokenizer,
        int(manifest.get("source", {}).get("step", 0)),
        None,
        f"{ARCHITECTURE} directory {folder.name}",
    )


def verify_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError naming a file that is missing or differs from the manifest."""
    for name, expected in manifest.get("files", {}).items():
        path = folder / Path(name).name
        if not path.is_file():
            raise UserError(f"{path} is missing: copy the export again")
        if path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
            raise UserError(
                f"{path} is not the file that {MANIFEST} describes: copy the export again, or "
                f"delete {MANIFEST} if you changed it"
            )


def fit(tensors: Mapping[str, Tensor], config: GPTConfig, where: Path) -> dict[str, Tensor]:
    """Check `tensors`, by our names, against the architecture, and pad the rows of the vocabulary.

    Raises UserError naming tensors that are missing, unknown, or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    foreign, missing = sorted(set(tensors) - set(shapes)), sorted(set(shapes) - set(tensors))
    if foreign:
        raise UserError(
            f"{where} is of another architecture: it also has "
            f"{', '.join(foreign[:8])}{' ...' if len(foreign) > 8 else ''}, "
            f"{len(foreign)} tensors that this program does not know and cannot leave out"
        )
    if missing:
        raise UserError(
            f"{where} lacks {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}: copy the "
            "model again"
        )
    weights = {}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if name in VOCAB_ROWS and tensor.dim() == 2 and tensor.size(0) >= config.vocab_size:
            tensor = torch.nn.functional.pad(
                tensor[: config.vocab_size], (0, 0, 0, config.padded_vocab_size - config.vocab_size)
            )
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise UserError(
                f"{where}: {name} is {tuple(tensor.shape)} of {tensor.dtype}, the model it belongs "
                f"to needs {shape}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} holds values that are not finite")
        weights[name] = tensor
    return weights


def save(imported: Imported, source: str, model_tag: str, overwrite: bool = False) -> Path:
    """Write the model as a checkpoint of stage `source`; returns its folder.

    Raises UserError for a tag that has checkpoints already.
    """
    if imported.config.vocab_size != imported.tokenizer.get_vocab_size():
        raise UserError(
            f"the model has {imported.config.vocab_size} tokens and its tokenizer "
            f"{imported.tokenizer.get_vocab_size()}: they do not "
            "belong together"
        )
    folder = checkpoint_manager.tag_folder(source, model_tag)
    if any(folder.glob("meta_*.json")) and not overwrite:
        raise UserError(
            f"{folder} has checkpoints already: choose another --model_tag, or give --overwrite"
        )
    checkpoint_manager.refuse_other_formats(folder)
    meta = {
        "stage": source,
        "val_bpb": imported.val_bpb,
        "model_config": imported.config.to_dict(),
        "user_config": {"model_tag": model_tag},
        "run_state": RunState(step=imported.step).to_dict(),
        "imported_from": imported.origin,
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        imported.tokenizer.save(partial)
        checkpoint_manager.save_checkpoint(partial, imported.step, imported.weights, None, meta)
        folder.mkdir(exist_ok=True)
        checkpoint_manager.discard_after(folder, -1)  # the old ones, now that the new is on disk
        for path in sorted(partial.iterdir(), key=lambda path: path.name.startswith("meta_")):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
