"""The time that a pass should take: arithmetic from data sheets, not measurements.

The shares of a data sheet's peak are those that well-tuned kernels reach on an H100.
dev/docs/en/scaling.md explains the formulas; a test holds its table to `milliseconds`.
"""

from zangchat import flops
from zangchat.config import GPTConfig

# (best, cautious) share of a peak
PRODUCTS = (0.70, 0.61)
ATTENTION = (0.43, 0.40)
MEMORY = (0.85, 0.75)
WIDTHS = 60  # read or written by a block's element-wise kernels per token, both passes
LOGITS = 5  # times that the logits are read or written
CASTS = 42  # bytes per multiplying parameter: casts, gradients added up, the embedding


def milliseconds(
    gpt: GPTConfig, tokens: int, device: flops.Device, fp8: bool = False
) -> dict[str, tuple[float, float]]:
    """(best, cautious) time of each share of one forward and backward pass in 16 bits."""
    params, half, bytes_per_second = (
        flops.count_params(gpt),
        device.half * 1e12,
        device.bandwidth * 1e9,
    )
    blocks = (device.fp8 or device.half) * 1e12 if fp8 else half
    # causal, 2 products forward and 5 backward, which computes the scores again
    attention = 14 / 2 * gpt.n_layer * gpt.n_head * gpt.head_dim * gpt.sequence_len * tokens
    elements = WIDTHS * 2 * gpt.n_layer * gpt.n_embd * tokens
    work = {  # FLOPs, their peak, the share of it, bytes
        "block products": (6.0 * params["matrices"] * tokens, blocks, PRODUCTS, 0.0),
        "attention": (attention, half, ATTENTION, 0.0),
        "element-wise": (0.0, half, PRODUCTS, elements),
        "head and loss": (
            6.0 * params["lm_head"] * tokens,
            half,
            PRODUCTS,
            LOGITS * 2.0 * tokens * gpt.vocab_size,
        ),
        "embedding, casts, adds": (
            0.0,
            half,
            PRODUCTS,
            float(CASTS * flops.scaling_params(gpt)),
        ),
    }
    times = {
        name: tuple(
            1e3 * (count / (peak * share[i]) + size / (bytes_per_second * MEMORY[i]))
            for i in range(2)
        )
        for name, (count, peak, share, size) in work.items()
    }
    total = tuple(sum(pair[i] for pair in times.values()) for i in range(2))
    return {name: (pair[0], pair[1]) for name, pair in {**times, "the pass": total}.items()}
