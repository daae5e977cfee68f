"""Checkpoint -> a Hugging Face directory that stock transformers (5.0 and later) loads as NanoChatForCausalLM, without custom code.

It holds model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja README.md and
manifest.json (sizes and hashes of the others, the source, the checks). The weights are 6 L + 2 tensors (L layers): the norms have no
weights, and the rows that pad the vocabulary are cut. The directory appears under its name only after it was loaded back and gave our
logits, greedy tokens, token ids and chat prompts.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zangchat.config import GPTConfig
from zangchat.errors import UserError
from zangchat.hf.check import check_export
from zangchat.hf.format import (
    ARCHITECTURE,
    CARRIED,
    DTYPES,
    FORMAT,
    MANIFEST,
    VOCAB_ROWS,
    hf_config,
    require_libraries,
    special_ids,
    weight_names,
)
from zangchat.hf.tokenizer import tokenizer_config, tokenizer_json
from zangchat.runtime.files import atomic_write, file_sha256

if TYPE_CHECKING:
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer


CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
SHARD_BYTES = 5 * 10**9
SETTINGS = {"do_sample": True, "temperature": 0.6, "top_k": 50, "max_new_tokens": 512}  # as in the terminal chat


def export(model: "GPT", tokenizer: "RustBPETokenizer", meta: Mapping[str, Any], folder: Path, dtype: str) -> dict[str, Any]:
    """Write `model` (in fp32, as load_model(..., dtype="float32") gives it) to a new directory; returns the manifest.

    The model's weights are rounded to `dtype` on the way. Raises UserError for what the format cannot carry, and if the directory, loaded
    back, differs in anything; then there is no directory.
    """
    require_libraries()
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not possible: choose one of {', '.join(DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output={folder} is there already: delete it, or choose another folder")
    check_exportable(model, tokenizer)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).float()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_weights(model, partial, DTYPES[dtype])
        base = meta["stage"] == "base"
        for name, data in {
            "config.json": hf_config(model.config, tokenizer, base, dtype),
            "generation_config.json": {**special_ids(tokenizer, base), **SETTINGS},
            "tokenizer.json": tokenizer_json(tokenizer),
            "tokenizer_config.json": tokenizer_config(model.config, tokenizer, base),
        }.items():
            atomic_write(partial / name, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        atomic_write(partial / CHAT_TEMPLATE.name, CHAT_TEMPLATE.read_bytes())
        checks = check_export(partial, model, tokenizer)
        atomic_write(partial / "README.md", model_card(model.config, meta, dtype, checks))
        manifest = make_manifest(partial, model.config, tokenizer, meta, dtype, checks)
        atomic_write(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"--output={folder} cannot be written ({error}): choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check_exportable(model: "GPT", tokenizer: "RustBPETokenizer") -> None:
    """Raises UserError naming what the format has no place for."""
    config = model.config
    names = weight_names(config)
    beyond = sorted(set(config.to_dict()) - CARRIED) + sorted(set(model.state_dict()) - set(names))
    if beyond:
        raise UserError(
            f"{ARCHITECTURE} does not know {', '.join(beyond)}: this model cannot be exported, other programs would run another"
        )
    if config.vocab_size != tokenizer.get_vocab_size():
        raise UserError(
            f"the model has {config.vocab_size} tokens and its tokenizer {tokenizer.get_vocab_size()}: put the tokenizer that it was "
            "trained with beside the checkpoint"
        )
    broken = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(f"{broken[0]} holds values that are no numbers: choose an earlier --step")


def write_weights(model: "GPT", folder: Path, dtype: torch.dtype) -> None:
    """model.safetensors, or numbered shards and model.safetensors.index.json where it would be larger than SHARD_BYTES."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    rows, weights = model.config.vocab_size, model.state_dict()
    tensors = {
        theirs: (weights[ours][:rows] if ours in VOCAB_ROWS else weights[ours]).to("cpu", dtype).contiguous().clone()
        for ours, theirs in weight_names(model.config).items()
    }
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for name, members in split.filename_to_tensors.items():
        save_file({member: tensors[member] for member in members}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        atomic_write(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def make_manifest(
    folder: Path, config: GPTConfig, tokenizer: "RustBPETokenizer", meta: Mapping[str, Any], dtype: str, checks: Mapping[str, Any]
) -> dict[str, Any]:
    from zangchat.report import software

    files = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())}
    return {
        "format": FORMAT,
        "version": 1,
        "source": origin(meta),
        "git": software().get("git"),
        "dtype": dtype,
        "model_config": config.to_dict(),
        "tokenizer": tokenizer.fingerprint,
        "checks": dict(checks),
        "files": files,
    }


def origin(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {"stage": meta["stage"], "model_tag": meta["user_config"].get("model_tag"), "step": meta["step"]}


def model_card(config: GPTConfig, meta: Mapping[str, Any], dtype: str, checks: Mapping[str, Any]) -> str:
    """README.md of an export: how to use it, what was measured, what it cannot do."""
    from zangchat.flops import count_params

    source = origin(meta)
    name = f"{source['model_tag'] or 'zangchat'}-{source['stage']}"
    chat = source["stage"] != "base"
    ask = (
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Why is the sky blue?"}],\n'
        '                                       add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        if chat
        else 'inputs = tokenizer("The capital of France is", return_tensors="pt")'
    )
    facts = {
        "parameters": f"{count_params(config)['total'] / 1e6:,.1f}M, stored as {dtype}",
        "layers, width": f"{config.n_layer}, {config.n_embd}",
        "query heads, key/value heads": f"{config.n_head}, {config.n_kv_head}",
        "context": f"{config.sequence_len:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "stage, step": f"{source['stage']}, {source['step']:,}",
    }
    scores = measured(meta)
    table = "| measured | |\n|---|---|\n" + "\n".join(f"| {key} | {value:.4f} |" for key, value in scores.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [zangchat, nanochat]
---
# {name}

A small language model, trained from nothing with zangchat. It is of the architecture `{ARCHITECTURE}`, which transformers 5.0 and later
has built in: no custom code is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
{ask}
print(tokenizer.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in facts.items())}

{table if scores else "No evaluation of this checkpoint was in the report when it was exported."}

When it was written, this directory was loaded by transformers and compared with the model it comes from, both in fp32: the largest
difference of a logit was {checks["largest logit difference"]:.1e}, {checks["equal greedy tokens"]} greedy tokens were equal,
and so were the token ids of {checks["texts with equal token ids"]} texts. `{MANIFEST}` has the hashes of all files.

## What to know

- It is small, and makes things up. Check what it says.
- Special tokens are written as text in this format, so whoever can write `<|assistant_start|>` into a prompt can forge a turn. For text of
  strangers load the tokenizer with `split_special_tokens=True` and put the special tokens around it by their ids.
- Tool calls (`<|python_start|>` to `<|python_end|>`) are only written, not carried out, outside of zangchat.
- In fp16 its activations overflow: use bf16 or fp32.
"""


def measured(meta: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of this very checkpoint: its validation loss, and the scores on report cards that name it."""
    from zangchat.report import checkpoint_name, get_report, summary_table

    name = checkpoint_name(meta)
    cards = [card for card in get_report().cards() if any(isinstance(item, dict) and item.get("model") == name for item in card.data)]
    table = {metric: value for metric, stages in summary_table(cards, ()).items() for value in stages.values()}
    return {"validation bits per byte": meta["val_bpb"], **table} if meta.get("val_bpb") is not None else table
