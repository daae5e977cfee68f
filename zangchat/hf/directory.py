"""The files of a directory that transformers loads without custom code, and `nanochat`, the format
that it knows by our architecture's name: NanoChatForCausalLM, in transformers 5.0 and later.

model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json
chat_template.jinja. The weights are 6 L + 2 tensors (L layers): the norms have no weights, and the
rows that pad the vocabulary are cut.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from zangchat.config import GPTConfig
from zangchat.hf.check import check_export
from zangchat.hf.format import (
    DTYPES,
    VOCAB_ROWS,
    hf_config,
    special_ids,
    weight_names,
)
from zangchat.hf.tokenizer import tokenizer_config, tokenizer_json
from zangchat.runtime.files import atomic_write

if TYPE_CHECKING:
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
SHARD_BYTES = 5 * 10**9
# as in the terminal chat
SETTINGS = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 50,
    "max_new_tokens": 512,
}
# without the cap on the logits likely tokens are likelier; 5 to 10 % more takes most of that back
UNCAPPED = SETTINGS | {"temperature": 0.65}


def write(
    model: "GPT", tokenizer: "RustBPETokenizer", meta: Mapping[str, Any], folder: Path, dtype: str
) -> dict[str, Any]:
    """The format `nanochat`; returns the checks."""
    rows, weights = model.config.vocab_size, model.state_dict()
    tensors = {
        theirs: weights[ours][:rows] if ours in VOCAB_ROWS else weights[ours]
        for ours, theirs in weight_names(model.config).items()
    }
    base = meta["stage"] == "base"
    write_weights(tensors, folder, DTYPES[dtype])
    write_json(folder / "config.json", hf_config(model.config, tokenizer, base, dtype))
    write_tokenizer(model.config, tokenizer, base, folder)
    return check_export(folder, model, tokenizer)


def write_weights(tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """model.safetensors; if that exceeds SHARD_BYTES, numbered shards and an index. Tensors of one
    number or none keep their own dtype.
    """
    tensors = {
        name: tensor.to("cpu", dtype if tensor.numel() > 1 else tensor.dtype).contiguous().clone()
        for name, tensor in tensors.items()
    }
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for name, members in split.filename_to_tensors.items():
        path = folder / name
        path.touch()
        rights = path.stat().st_mode  # of any new file; safetensors lets only its owner read it
        save_file({member: tensors[member] for member in members}, path, metadata={"format": "pt"})
        path.chmod(rights)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(
    config: GPTConfig,
    tokenizer: "RustBPETokenizer",
    base: bool,
    folder: Path,
    settings: Mapping[str, Any] = SETTINGS,
) -> None:
    """The tokenizer, the chat template and the settings of `generate`."""
    write_json(folder / "generation_config.json", {**special_ids(tokenizer, base), **settings})
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(folder / "tokenizer_config.json", tokenizer_config(config, tokenizer, base))
    atomic_write(folder / CHAT_TEMPLATE.name, CHAT_TEMPLATE.read_bytes())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    atomic_write(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
