"""The model written out one position and one head at a time, from the formulas; the twin of
zangchat/gpt.py.
"""

import math

import torch
from torch import Tensor

from zangchat.config import GPTConfig


def _norm(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean() + eps)


def _rotate(x: Tensor, position: int, theta: float, spans: int = 1) -> Tensor:
    """Each pair (x[i], x[i + D/2]) turned by the angle -position * theta^(-2i/D); with two spans,
    pairs within each half: (x[i], x[i + D/4]), and the frequencies go on in the second half."""
    D, out = x.numel(), torch.empty_like(x)
    for pair in range(D // 2):
        span, i = divmod(pair, D // 2 // spans)
        a = span * (D // spans) + i
        b = a + D // spans // 2
        angle = -position * theta ** (-2 * pair / D)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


def logits(weights: dict[str, Tensor], config: GPTConfig, tokens: list[int]) -> Tensor:
    """(T, vocab_size) in fp64 from a state dict."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    eps, head_dim, spans = config.rms_norm_eps, config.head_dim, 1 + config.key_offset
    xs = [_norm(w["transformer.wte.weight"][token], eps) for token in tokens]
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}."
        normed = [_norm(x, eps) for x in xs]

        def heads(
            part: str, t: int, normed: list[Tensor] = normed, name: str = name
        ) -> list[Tensor]:
            projected = (w[f"{name}attn.{part}.weight"] @ normed[t]).split(head_dim)
            if part == "c_v":
                table = w.get(f"{name}attn.value_embed.weight")
                own = torch.zeros(()) if table is None else table[tokens[t]]
                return list((torch.cat(projected) + own).split(head_dim))
            return [_norm(_rotate(head, t, config.rope_theta, spans), eps) for head in projected]

        q, k, v = ([heads(part, t) for t in range(len(xs))] for part in ("c_q", "c_k", "c_v"))
        if config.key_offset:  # the second half of each key is that of the token before
            half = head_dim // 2
            k = [
                [torch.cat([key[:half], k[max(t - 1, 0)][g][half:]]) for g, key in enumerate(k[t])]
                for t in range(len(xs))
            ]
        for t in range(len(xs)):
            outputs = []
            for h in range(config.n_head):
                g = h // (config.n_head // config.n_kv_head)
                scores = torch.stack([q[t][h] @ k[s][g] for s in range(t + 1)]) / math.sqrt(
                    head_dim
                )
                outputs.append(sum(p * v[s][g] for s, p in enumerate(scores.softmax(0))))
            xs[t] = xs[t] + w[f"{name}attn.c_proj.weight"] @ torch.cat(outputs)
            hidden = (w[f"{name}mlp.c_fc.weight"] @ _norm(xs[t], eps)).clamp(min=0) ** 2
            xs[t] = xs[t] + w[f"{name}mlp.c_proj.weight"] @ hidden
    z = torch.stack([w["lm_head.weight"] @ _norm(x, eps) for x in xs])[:, : config.vocab_size]
    return config.logit_cap * torch.tanh(z / config.logit_cap)
