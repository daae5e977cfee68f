"""Checkpoint -> a directory of files in a format of other programs, see libraries.FORMATS.

Beside the files of the format it has README.md and manifest.json (sizes and hashes of the others,
the source, the checks). The directory gets its name only after everything is written and, for the
formats that transformers reads, was loaded back and gave our logits, greedy tokens, token ids and
chat prompts.
"""

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch

from zangchat.config import GPTConfig
from zangchat.errors import UserError, explain
from zangchat.flops import count_params
from zangchat.hf.format import CARRIED, DTYPES, FORMAT, MANIFEST, weight_names
from zangchat.hf.libraries import FORMATS
from zangchat.report import checkpoint_name, get_report, software, summary_table
from zangchat.runtime.files import atomic_write, file_sha256

if TYPE_CHECKING:
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer


MODEL_CARD = Path(__file__).with_name("model_card.jinja")


def export(
    model: "GPT",
    tokenizer: "RustBPETokenizer",
    meta: Mapping[str, Any],
    folder: Path,
    dtype: str,
    format: str = "nanochat",
) -> dict[str, Any]:
    """Write `model` to a new directory; returns the manifest.

    The model is in fp32, as load_model(..., dtype="float32") gives it; its weights are rounded to
    `dtype` on the way. Raises UserError for anything that the format cannot hold, and if the
    directory, loaded back, differs from the model; then there is no directory.
    """
    possible = FORMATS[format].dtypes
    if dtype not in possible:
        problem = f"--dtype={dtype} is not possible in --format={format}"
        raise UserError(f"{problem}: choose one of {', '.join(possible)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        remedy = "delete it, or choose another folder"
        raise UserError(f"--output={folder} is there already: {remedy}")
    check_exportable(model, tokenizer, format)
    if dtype in DTYPES:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype]).float()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain(f"--output={folder} cannot be written", "choose another folder", OSError):
            partial.mkdir(parents=True)
            manifest = _write(model, tokenizer, meta, partial, dtype, format)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write(
    model: "GPT",
    tokenizer: "RustBPETokenizer",
    meta: Mapping[str, Any],
    folder: Path,
    dtype: str,
    format: str,
) -> dict[str, Any]:
    module = importlib.import_module(f"zangchat.hf.{FORMATS[format].module}")
    checks = module.write(model, tokenizer, meta, folder, dtype)
    atomic_write(folder / "README.md", model_card(model.config, meta, dtype, checks, format))
    manifest = make_manifest(folder, model.config, tokenizer, meta, dtype, checks)
    manifest["written_for"] = format
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def check_exportable(model: "GPT", tokenizer: "RustBPETokenizer", format: str) -> None:
    """Raises UserError naming anything that the format has no place for."""
    config = model.config
    names = weight_names(config)
    extra = sorted(set(config.to_dict()) - CARRIED) + sorted(set(model.state_dict()) - set(names))
    if extra:
        problem = f"--format={format} has no place for {', '.join(extra)}"
        remedy = "this model cannot be exported, other programs would run another"
        raise UserError(f"{problem}: {remedy}")
    sizes = config.vocab_size, tokenizer.get_vocab_size()
    if sizes[0] != sizes[1]:
        remedy = "put the tokenizer that it was trained with beside the checkpoint"
        raise UserError(f"the model has {sizes[0]} tokens and its tokenizer {sizes[1]}: {remedy}")
    broken = [
        name
        for name, tensor in model.state_dict().items()
        if not bool(torch.isfinite(tensor).all())
    ]
    if broken:
        raise UserError(f"{broken[0]} holds values that are not finite: choose an earlier --step")


def make_manifest(
    folder: Path,
    config: GPTConfig,
    tokenizer: "RustBPETokenizer",
    meta: Mapping[str, Any],
    dtype: str,
    checks: Mapping[str, Any],
) -> dict[str, Any]:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }
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
    tag = meta["user_config"].get("model_tag")
    return {"stage": meta["stage"], "model_tag": tag, "step": meta["step"]}


def model_card(
    config: GPTConfig,
    meta: Mapping[str, Any],
    dtype: str,
    checks: Mapping[str, Any],
    format: str = "nanochat",
) -> str:
    """README.md of an export: how to use it, what was measured, what it cannot do."""
    source = origin(meta)
    template = jinja2.Template(
        MODEL_CARD.read_text(encoding="utf-8"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return template.render(
        name=f"{source['model_tag'] or 'zangchat'}-{source['stage']}",
        format=format,
        capped=FORMATS[format].capped,
        cap=f"{config.logit_cap:g}",
        chat=source["stage"] != "base",
        facts={
            "parameters": f"{count_params(config)['total'] / 1e6:,.1f}M, stored as {dtype}",
            "layers, width": f"{config.n_layer}, {config.n_embd}",
            "query heads, key/value heads": f"{config.n_head}, {config.n_kv_head}",
            "context": f"{config.sequence_len:,} tokens",
            "vocabulary": f"{config.vocab_size:,} tokens",
            "stage, step": f"{source['stage']}, {source['step']:,}",
        },
        scores=measured(meta),
        checks=checks,
        manifest=MANIFEST,
    )


def measured(meta: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of this checkpoint: its validation loss, and scores on report cards that name
    it.
    """
    name = checkpoint_name(meta)
    cards = [card for card in get_report().cards() if _is_about(card, name)]
    metrics = summary_table(cards, ()).items()
    scores = {metric: value for metric, stages in metrics for value in stages.values()}
    if meta.get("val_bpb") is None:
        return scores
    return {"validation bits per byte": meta["val_bpb"], **scores}


def _is_about(card: Any, name: str) -> bool:
    return any(isinstance(item, dict) and item.get("model") == name for item in card.data)
