"""The directory of CTranslate2, a fast inference engine for CPUs and GPUs.

Its decoder holds everything that ours does, the cap included: a gated MLP with ReLU in which gate
and up-projection are the same matrix is relu(x)^2. The file holds that matrix once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zangchat.config import GPTConfig
from zangchat.hf.apertus import embedding, layer_weights
from zangchat.hf.directory import write_tokenizer
from zangchat.hf.tokenizer import token_strings

if TYPE_CHECKING:
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer


def write(
    model: "GPT", tokenizer: "RustBPETokenizer", meta: Mapping[str, Any], folder: Path, dtype: str
) -> dict[str, Any]:
    """model.bin, config.json and vocabulary.json for ctranslate2.Generator, and the tokenizer's
    files; returns nothing to report.
    """
    base = meta["stage"] == "base"
    spec = decoder(model)
    spec.register_vocabulary(token_strings(tokenizer))
    spec.config.bos_token = spec.config.unk_token = "<|bos|>"
    spec.config.eos_token = "<|bos|>" if base else "<|assistant_end|>"
    spec.config.layer_norm_epsilon = model.config.rms_norm_eps
    spec.validate()
    spec.optimize(quantization=dtype)
    spec.save(str(folder))
    write_tokenizer(model.config, tokenizer, base, folder)
    return {}


def decoder(model: "GPT") -> Any:
    """The specification of the model, with its weights."""
    from ctranslate2.specs import common_spec, transformer_spec

    config: GPTConfig = model.config
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.n_layer,
        config.n_head,
        activation=common_spec.Activation.RELU,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=config.n_embd // config.n_head,
        rotary_interleave=False,
        rotary_base=config.rope_theta,
        num_heads_kv=config.n_kv_head,
        qk_norm=True,
    )
    ours = spec.decoder
    ours.scale_embeddings = False
    ours.final_logit_softcapping = np.float32(config.logit_cap)
    ours.embeddings.weight = embedding(model)
    ours.layer_norm.gamma = torch.ones(config.n_embd)
    ours.projection.weight = model.lm_head.weight.detach()[: config.vocab_size]
    for i, layer in enumerate(ours.layer):
        weights = layer_weights(model, i)
        attention = layer.self_attention
        names = ("q_proj", "k_proj", "v_proj")
        fused = torch.cat([weights[f"self_attn.{name}.weight"] for name in names])
        attention.linear[0].weight = fused
        attention.linear[1].weight = weights["self_attn.o_proj.weight"]
        attention.q_norm.gamma = weights["self_attn.q_norm.weight"]
        attention.k_norm.gamma = weights["self_attn.k_norm.weight"]
        attention.layer_norm.gamma = weights["attention_layernorm.weight"]
        layer.ffn.layer_norm.gamma = weights["feedforward_layernorm.weight"]
        layer.ffn.linear_0.weight = weights["mlp.up_proj.weight"]
        layer.ffn.linear_0_noact.weight = weights["mlp.up_proj.weight"]
        layer.ffn.linear_1.weight = weights["mlp.down_proj.weight"]
    return spec
