"""The model as an Apertus, an architecture that other programs have built in: transformers, vLLM,
SGLang, MLX-LM and, through GGUF, llama.cpp and the programs around it.

Apertus (arXiv:2509.14233) has an MLP without a gate, QK-norm and weights in its norms. With these
weights it computes the same function as ours, up to the cap on the logits, which it lacks:

    xIELU          alpha_p x^2 for x > 0 with softplus(alpha_p) = 1, and 0 below: relu(x)^2
    norms          their weights are 1; QK-norm may stand before the rotation, which keeps lengths
    rotation       it turns the other way: the halves of each query and key head change places
    embedding      its rows are normalized here, as ours are when they are read

The cap is monotone, so the likeliest token is the same; sampling differs, see the model card.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zangchat.config import GPTConfig
from zangchat.hf.check import check_export
from zangchat.hf.directory import UNCAPPED, write_json, write_tokenizer, write_weights
from zangchat.hf.format import DTYPES, LAYER_NAMES, hf_config

if TYPE_CHECKING:
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer

ARCHITECTURE = "ApertusForCausalLM"
ALPHA_P = math.log(math.e - 1)  # softplus(ALPHA_P) = 1
ALPHA_N = -100.0  # softplus(ALPHA_N) = 4e-44
BETA, EPS = 0.0, -1e-6
# of a logit; in bf16 the normalized embedding is rounded, and ours normalizes it after rounding
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
MLP_NAMES = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}


def write(
    model: "GPT", tokenizer: "RustBPETokenizer", meta: Mapping[str, Any], folder: Path, dtype: str
) -> dict[str, Any]:
    """A directory that transformers and mlx-lm load without custom code; returns the checks."""
    base = meta["stage"] == "base"
    write_weights(apertus_weights(model), folder, DTYPES[dtype])
    write_json(folder / "config.json", apertus_config(model.config, tokenizer, base, dtype))
    write_tokenizer(model.config, tokenizer, base, folder, UNCAPPED)
    return check_export(folder, model, tokenizer, ARCHITECTURE, TOLERANCES[dtype])


def apertus_config(
    config: GPTConfig, tokenizer: "RustBPETokenizer", base: bool, dtype: str
) -> dict[str, Any]:
    ours = hf_config(config, tokenizer, base, dtype)
    del ours["final_logit_softcapping"]
    of_mlx = {"mlp_bias": False, "post_norm": False, "qk_norm": True}
    return {
        **ours,
        "architectures": [ARCHITECTURE],
        "model_type": "apertus",
        "hidden_act": "xielu",
        "rope_theta": config.rope_theta,  # these two for transformers 4
        "rope_scaling": None,
        **of_mlx,
    }


def apertus_weights(model: "GPT") -> dict[str, Tensor]:
    """{Apertus's name: fp32 tensor}, 12 L + 3 and the 4 of each layer's xIELU."""
    layers = (
        (f"model.layers.{i}.", name, tensor)
        for i in range(model.config.n_layer)
        for name, tensor in layer_weights(model, i).items()
    )
    ones = torch.ones(model.config.n_embd)
    return {
        "model.embed_tokens.weight": embedding(model),
        **{f"{prefix}{name}": tensor for prefix, name, tensor in layers},
        "model.norm.weight": ones,
        "lm_head.weight": model.lm_head.weight.detach().float()[: model.config.vocab_size],
    }


def layer_weights(model: "GPT", layer: int) -> dict[str, Tensor]:
    config, weights = model.config, model.state_dict()
    head, width = torch.ones(config.n_embd // config.n_head), torch.ones(config.n_embd)
    tensors = {
        "attention_layernorm.weight": width,
        "feedforward_layernorm.weight": width,
        "self_attn.q_norm.weight": head,
        "self_attn.k_norm.weight": head,
        "mlp.act_fn.alpha_p": torch.tensor([ALPHA_P]),
        "mlp.act_fn.alpha_n": torch.tensor([ALPHA_N]),
        "mlp.act_fn.beta": torch.tensor(BETA),
        "mlp.act_fn.eps": torch.tensor(EPS),
    }
    for ours, theirs in LAYER_NAMES.items():
        tensor = weights[f"transformer.h.{layer}.{ours}.weight"].float()
        if ours in ("attn.c_q", "attn.c_k"):
            tensor = swap_halves(tensor, len(head))
        tensors[f"{MLP_NAMES.get(theirs, theirs)}.weight"] = tensor
    return tensors


def swap_halves(weight: Tensor, head_dim: int) -> Tensor:
    """(heads * head_dim, D): the two halves of each head's rows change places."""
    halves = weight.view(-1, 2, head_dim // 2, weight.size(1))
    return halves.flip(1).reshape(weight.shape)


def embedding(model: "GPT") -> Tensor:
    """(V, D) fp32: the rows of the embedding, normalized, without those that pad it."""
    rows = model.wte.weight.detach().float()[: model.config.vocab_size]
    return torch.nn.functional.rms_norm(rows, rows.shape[1:], eps=model.config.rms_norm_eps)
