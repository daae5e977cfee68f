"""Tensor names and config.json of a Hugging Face directory, in both directions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zangchat.config import GPTConfig
from zangchat.errors import UserError, explain

if TYPE_CHECKING:
    from zangchat.tokenizer import RustBPETokenizer


FORMAT = "zangchat-export"
MANIFEST = "manifest.json"
MODEL_TYPE, ARCHITECTURE = "nanochat", "NanoChatForCausalLM"
# not float16: relu^2 reaches beyond its 65504
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
LAYER_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
VOCAB_ROWS = ("transformer.wte.weight", "lm_head.weight")
# The settings that config.json has. Another one cannot be exported: readers would not know of it.
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
CARRIED = {*SIZES, "rms_norm_eps", "rope_theta", "logit_cap"}


def weight_names(config: GPTConfig) -> dict[str, str]:
    """{our name: theirs} of all 6 L + 2 tensors."""
    layers = {
        f"transformer.h.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
        for i in range(config.n_layer)
        for ours, theirs in LAYER_NAMES.items()
    }
    return {
        "transformer.wte.weight": "model.embed_tokens.weight",
        **layers,
        "lm_head.weight": "lm_head.weight",
    }


def special_ids(tokenizer: "RustBPETokenizer", base: bool) -> dict[str, Any]:
    """A chat model's turn ends with <|assistant_end|>, any document with <|bos|>.

    Padding is <|bos|>, which is never part of an answer to learn.
    """
    bos = tokenizer.get_bos_token_id()
    ends = bos if base else [tokenizer.encode_special("<|assistant_end|>"), bos]
    return {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": bos}


def hf_config(
    config: GPTConfig, tokenizer: "RustBPETokenizer", base: bool, dtype: str
) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "attention_dropout": 0.0,
        "attention_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "final_logit_softcapping": config.logit_cap,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
        **special_ids(tokenizer, base),
    }


def read_json(path: Path) -> dict[str, Any]:
    with explain(f"{path} cannot be read", "copy it again", OSError, ValueError):
        data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object: copy it again")
    return data


def config_from_hf(data: Mapping[str, Any], path: Path) -> GPTConfig:
    """Raises UserError for another architecture."""
    # the older name wins, as in transformers
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    demanded = {
        "model_type": (data.get("model_type"), MODEL_TYPE),
        "hidden_act": (data.get("hidden_act", "relu2"), "relu2"),
        "attention_bias": (data.get("attention_bias", data.get("qkv_bias", False)), False),
        "tie_word_embeddings": (data.get("tie_word_embeddings", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for name, (found, wanted) in demanded.items():
        if found != wanted:
            raise UserError(
                f"{path}: {name} is {found!r}, this program knows only {wanted!r}: this model "
                "cannot be imported"
            )
    cap = (
        data["final_logit_softcapping"]
        if "final_logit_softcapping" in data
        else data.get("logits_soft_cap", 15.0)
    )
    problem, remedy = f"{path} describes an unknown model", "only this architecture can be imported"
    with explain(problem, remedy, KeyError, TypeError, ValueError):
        if data["intermediate_size"] != 4 * int(data["hidden_size"]):
            raise ValueError(
                f"intermediate_size is {data['intermediate_size']} and not four times hidden_size"
            )
        return GPTConfig(
            sequence_len=data["max_position_embeddings"],
            vocab_size=data["vocab_size"],
            n_layer=data["num_hidden_layers"],
            n_head=data["num_attention_heads"],
            n_kv_head=data.get("num_key_value_heads") or data["num_attention_heads"],
            n_embd=data["hidden_size"],
            rms_norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", data.get("rope_theta", 10000.0)),
            logit_cap=float(cap),
        )
