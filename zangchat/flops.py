"""What a model costs, from its GPTConfig alone: parameters, FLOPs, bytes moved, memory, and the limits of known devices.

Layer 0: nothing here imports torch. FLOPs count a multiplication and an addition as two; bytes are bytes.
"""

from typing import Any, NamedTuple

from zangchat.config import GPTConfig

# ---- the model ------------------------------------------------------------------------------------------------------


def count_params(config: GPTConfig) -> dict[str, int]:
    """Parameters as stored (padding rows of the vocabulary included): wte, lm_head, matrices (of all blocks), total."""
    kv_width = config.n_kv_head * config.head_dim
    attention = 2 * config.n_embd * config.n_embd + 2 * config.n_embd * kv_width  # q and output; k and v
    mlp = 2 * config.n_embd * 4 * config.n_embd
    table = config.padded_vocab_size * config.n_embd
    matrices = config.n_layer * (attention + mlp)
    return {"wte": table, "lm_head": table, "matrices": matrices, "total": 2 * table + matrices}


def scaling_params(config: GPTConfig) -> int:
    """The parameters that scaling laws count here: those that multiply, so matrices and lm_head, without the embedding table."""
    params = count_params(config)
    return params["matrices"] + params["lm_head"]


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token, forward and backward, at full context: 6 per multiplying parameter, plus attention's two products.

    Attention is counted without the saving of causality, as PaLM (arXiv:2204.02311, appendix B) does.
    """
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.sequence_len
    return 6 * scaling_params(config) + attention


def decode_flops_per_token(config: GPTConfig, context: int) -> int:
    """FLOPs to generate one token behind `context` others."""
    return 2 * scaling_params(config) + 4 * config.n_layer * config.n_head * config.head_dim * context


def kv_bytes_per_token(config: GPTConfig, kv_bytes: int = 2) -> int:
    """Key/value storage of one token of one row."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * kv_bytes


def decode_bytes(config: GPTConfig, context: int, batch_size: int = 1, weight_bytes: float = 2, kv_bytes: int = 2) -> int:
    """Bytes that one decoding step of `batch_size` rows must read: every multiplying weight once, and each row's stored keys and values."""
    return round(scaling_params(config) * weight_bytes) + batch_size * context * kv_bytes_per_token(config, kv_bytes)


def decode_roofline(config: GPTConfig, bandwidth: float, context: int, batch_size: int = 1, **sizes: Any) -> float:
    """The most tokens per second, all rows together, that a memory bandwidth (bytes/s) allows; `sizes` as in decode_bytes."""
    return batch_size * bandwidth / decode_bytes(config, context, batch_size, **sizes)


# ---- memory of a training step --------------------------------------------------------------------------------------

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def weight_bytes(config: GPTConfig, dtype: str = "bfloat16") -> int:
    """The weights as trained and saved: fp32, but for the embedding, which is bf16 when computing in bf16."""
    params = count_params(config)
    return 4 * scaling_params(config) + (2 if str(dtype).endswith("bfloat16") else 4) * params["wte"]


def optimizer_bytes(config: GPTConfig, kind: str = "muon", dtype: str = "bfloat16") -> int:
    """State of the optimizers, all ranks together: two moments of a parameter for AdamW, one for Muon, and the fp32 master of a bf16
    embedding; SGD has none."""
    if kind == "sgd":
        return 0
    params = count_params(config)
    master = 4 * params["wte"] if str(dtype).endswith("bfloat16") else 0
    return (4 if kind == "muon" else 8) * params["matrices"] + 8 * (params["lm_head"] + params["wte"]) + master


def checkpoint_bytes(config: GPTConfig, kind: str = "muon", dtype: str = "bfloat16") -> int:
    """One saved step."""
    return weight_bytes(config, dtype) + optimizer_bytes(config, kind, dtype)


def memory_estimate(
    config: GPTConfig,
    device_batch_size: int,
    *,
    dtype: str = "bfloat16",
    world_size: int = 1,
    device_type: str = "cuda",
    optimizer: str = "muon",
) -> dict[str, int]:
    """Bytes one rank needs to train with `device_batch_size` rows: weights, gradients, optimizer, activations, logits, total.

    For the uncompiled model; the optimizer's state is sharded over ranks. An estimate:
    the allocator's waste and the libraries' workspaces come on top (leave 10 %). `dtype` is that of the products.
    """
    size = BYTES[str(dtype).removeprefix("torch.")]
    weights = weight_bytes(config, dtype)
    casts = 0 if size == 4 else size * scaling_params(config)  # kept from the forward pass for the backward pass
    parts = {
        "weights": weights + casts,
        "gradients": weights,
        "optimizer": optimizer_bytes(config, optimizer, dtype) // world_size,
        "activations": device_batch_size * config.sequence_len * activation_bytes_per_token(config, size, device_type),
        "logits": logits_bytes(config, device_batch_size * config.sequence_len, size, device_type),
    }
    return {**parts, "total": sum(parts.values())}


def activation_bytes_per_token(config: GPTConfig, size: int = 2, device_type: str = "cuda") -> int:
    """Bytes that the forward pass keeps for the backward pass, per token, with `size` bytes a number.

    Per block, in widths: inputs of its norms (x twice, q; and k), x normed twice, q normed, attention's output as computed and in rows,
    relu and its square (4 each), k normed and v. On a CPU the norm of functional.py keeps its output alone, that of 16-bit numbers fp32
    copies of its input. Row statistics are fp32: one number for each norm of x, and per head those of q, k and softmax.
    """
    width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
    norm_size = 4 if device_type == "cpu" else size
    inputs = 0 if device_type == "cpu" and size == 4 else norm_size * (3 * width + kv_width)
    statistics = 4 * (2 + 2 * config.n_head + config.n_kv_head)
    block = inputs + size * (13 * width + 2 * kv_width) + statistics
    ends = norm_size * 2 * width + size * width + 8  # of the first and the last norm; the loss's gradient
    return config.n_layer * block + ends


def logits_bytes(config: GPTConfig, tokens: int, size: int = 2, device_type: str = "cuda") -> int:
    """Bytes of the loss: three fp32 copies of one chunk of logits, the gradient product in the compute dtype, and the head's cast."""
    elements = 2**27 if device_type == "cuda" else 2**22  # as loss.py chooses its chunks
    chunk = min(tokens, max(elements // config.vocab_size, 64), 8192)
    head = config.padded_vocab_size * config.n_embd
    return chunk * config.vocab_size * (3 * 4 + size) + head * (4 + size)


# ---- devices --------------------------------------------------------------------------------------------------------


class Device(NamedTuple):
    """Peaks on paper, dense: TFLOP/s of bf16/fp16, of fp8 and of fp32 (as TF32 where the device has it; 0 = none), and GB/s of memory."""

    half: float
    fp8: float
    single: float
    bandwidth: float


# The first name that occurs in the device's own name counts, so the longer names come first. From the makers' data sheets, halved
# where they count structured sparsity. Consumer cards: tensor cores with fp32 accumulation.
DEVICES = {
    "GB200": Device(2500, 5000, 1250, 8000),
    "B200": Device(2250, 4500, 1100, 8000),
    "GH200": Device(989, 1979, 495, 4000),
    "H200 NVL": Device(836, 1671, 418, 4800),
    "H200": Device(989, 1979, 495, 4800),
    "H100 NVL": Device(836, 1671, 418, 3900),
    "H100 PCIE": Device(756, 1513, 378, 2000),
    "H100": Device(989, 1979, 495, 3350),
    "H800": Device(989, 1979, 495, 3350),
    "H20": Device(148, 296, 74, 4000),
    "A100-SXM4-80GB": Device(312, 0, 156, 2039),
    "A100 80GB PCIE": Device(312, 0, 156, 1935),
    "A100": Device(312, 0, 156, 1555),
    "A800": Device(312, 0, 156, 2039),
    "A40": Device(150, 0, 75, 696),
    "A30": Device(165, 0, 82, 933),
    "A10": Device(125, 0, 62, 600),
    "L40S": Device(362, 733, 183, 864),
    "L40": Device(181, 362, 90, 864),
    "L4": Device(121, 242, 60, 300),
    "RTX 6000 ADA": Device(364, 728, 182, 960),
    "RTX A6000": Device(155, 0, 77, 768),
    "RTX 5090": Device(210, 419, 105, 1792),
    "RTX 4090": Device(165, 330, 82.6, 1008),
    "RTX 4080": Device(97.5, 195, 48.7, 717),
    "RTX 3090": Device(71, 0, 35.6, 936),
    "V100": Device(125, 0, 15.7, 900),
    "TESLA T4": Device(65, 0, 8.1, 320),
    "MI325X": Device(1307, 2615, 654, 6000),
    "MI300X": Device(1307, 2615, 654, 5300),
    "MI250X": Device(383, 0, 95.7, 3277),
}


def find_device(name: str) -> Device | None:
    """The peaks of a device by the name its driver gives ("NVIDIA H100 80GB HBM3"); None for one that is not in the table."""
    upper = name.upper()
    words = upper.replace("-", " ").split()
    for key, device in DEVICES.items():
        if (key in upper) if (" " in key or "-" in key) else any(word == key for word in words):
            return device
    return None


def peak_flops(device_name: str, dtype: Any = "bfloat16") -> float | None:
    """FLOP/s on paper of a known device in bfloat16, float16, float32 or fp8 (or the torch.dtype); None where not known.

    Without a peak there is no utilisation to report: a caller leaves it out rather than inventing one.
    """
    device = find_device(device_name)
    if device is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name in ("bfloat16", "float16"):
        tera = device.half
    elif name == "float32":
        tera = device.single
    elif name.startswith(("fp8", "float8")):
        tera = device.fp8
    else:
        raise ValueError(f"no peak is listed for the dtype {name}: bfloat16, float16, float32 or fp8")
    return tera * 1e12 or None


def memory_bandwidth(device_name: str) -> float | None:
    """Bytes/s on paper between a known device and its memory; None where not known."""
    device = find_device(device_name)
    return device.bandwidth * 1e9 if device else None
