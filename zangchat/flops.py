"""The cost of a model, computed from its GPTConfig: parameters, FLOPs, bytes moved, memory; and the
peaks of known devices.

Nothing here imports torch. FLOPs count a multiplication and an addition as two. Memory is in GiB,
as on the boxes of graphics cards ("24 GB" are 24 x 2^30 bytes); disks and rates are in powers of
ten.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from zangchat.config import GPTConfig

# ---- the model -----------------------------------------------------------------------------------


def count_params(config: GPTConfig) -> dict[str, int]:
    """Parameters as stored (padding rows of the vocabulary included): wte (with the value
    embeddings), lm_head, matrices (of all blocks), total.
    """
    kv_width = config.n_kv_head * config.head_dim
    # q and output; k and v
    attention = 2 * config.n_embd * config.n_embd + 2 * config.n_embd * kv_width
    mlp = 2 * config.n_embd * 4 * config.n_embd
    table = config.padded_vocab_size * config.n_embd
    matrices = config.n_layer * (attention + mlp)
    values = sum(map(config.has_value_embed, range(config.n_layer)))
    wte = table + values * config.padded_vocab_size * kv_width
    return {"wte": wte, "lm_head": table, "matrices": matrices, "total": wte + table + matrices}


def scaling_params(config: GPTConfig) -> int:
    """The parameters that scaling laws count here: those that multiply, so matrices and lm_head,
    without the embedding table.
    """
    params = count_params(config)
    return params["matrices"] + params["lm_head"]


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token, forward and backward, at full context: 6 per multiplying parameter,
    plus attention's two products.

    Attention is counted without the saving of causality, as PaLM (arXiv:2204.02311, appendix B)
    does.
    """
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.sequence_len
    return 6 * scaling_params(config) + attention


def kv_bytes_per_token(config: GPTConfig, kv_bytes: int = 2) -> int:
    """Key/value storage of one token of one row."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * kv_bytes


def decode_bytes(
    config: GPTConfig, context: int, batch_size: int = 1, weight_bytes: float = 2, kv_bytes: int = 2
) -> int:
    """Bytes that one decoding step of `batch_size` rows must read: every multiplying weight once,
    and each row's stored keys and values.
    """
    return round(scaling_params(config) * weight_bytes) + batch_size * context * kv_bytes_per_token(
        config, kv_bytes
    )


def decode_roofline(
    config: GPTConfig, bandwidth: float, context: int, batch_size: int = 1, **sizes: Any
) -> float:
    """The most tokens per second, all rows together, that a memory bandwidth (bytes/s) allows;
    `sizes` as in decode_bytes.
    """
    return batch_size * bandwidth / decode_bytes(config, context, batch_size, **sizes)


# ---- memory of a training step -------------------------------------------------------------------

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def weight_bytes(config: GPTConfig, dtype: str = "bfloat16") -> int:
    """The weights as trained and saved: fp32, but for the embedding, which is bf16 when computing
    in bf16.
    """
    params = count_params(config)
    return (
        4 * scaling_params(config) + (2 if str(dtype).endswith("bfloat16") else 4) * params["wte"]
    )


def optimizer_bytes(config: GPTConfig, kind: str = "muon", dtype: str = "bfloat16") -> int:
    """State of the optimizers, all ranks together: two moments of a parameter for AdamW, one for
    Muon, and the fp32 master of a bf16 embedding; SGD has none."""
    if kind == "sgd":
        return 0
    params = count_params(config)
    master = 4 * params["wte"] if str(dtype).endswith("bfloat16") else 0
    return (
        (4 if kind == "muon" else 8) * params["matrices"]
        + 8 * (params["lm_head"] + params["wte"])
        + master
    )


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
    grad_checkpoint: bool = False,
    grad_comm_dtype: str = "float32",
    fsdp: bool = False,
) -> dict[str, int]:
    """Bytes one rank needs to train with `device_batch_size` rows: weights, gradients, optimizer,
    casts, activations, recomputed, logits, sent, update, total.

    The total is the peak, so parts that never exist together count once: 16-bit gradients are sent
    as the activations are freed, the optimizer updates after the activations and casts are gone,
    and a block is recomputed (with `grad_checkpoint`) after the logits are. The estimate is for the
    uncompiled model. The optimizer's state is sharded over ranks; with `fsdp`, so are weights and
    gradients. The allocator's waste and workspaces come on top (`USABLE`).
    """
    size = BYTES[str(dtype).removeprefix("torch.")]
    weights = weight_bytes(config, dtype)
    # kept from the forward pass for the backward pass
    casts = 0 if size == 4 else size * scaling_params(config)
    tokens = device_batch_size * config.sequence_len
    if fsdp:  # gathered: two blocks, with gradients, the head, and to the end value embeddings
        params = count_params(config)
        gathered = 2 * 2 * 4 * params["matrices"] // config.n_layer + 4 * params["lm_head"]
        gathered += 2 * size * (params["wte"] - params["lm_head"])
        weights = weights // world_size
        casts += gathered
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": optimizer_bytes(config, optimizer, dtype) // world_size,
        "casts": casts,
        "activations": tokens
        * activation_bytes_per_token(config, size, device_type, grad_checkpoint),
        "recomputed": tokens * block_bytes_per_token(config, size, device_type)
        if grad_checkpoint
        else 0,
        "logits": logits_bytes(config, tokens, size, device_type),
        "sent": 2 * scaling_params(config)
        if grad_comm_dtype == "bfloat16" and world_size > 1 and not fsdp
        else 0,
        "update": update_bytes(config, optimizer, world_size, 2 if device_type == "cuda" else size),
    }
    return {**parts, "total": peak_bytes(parts)}


def peak_bytes(parts: dict[str, int]) -> int:
    """The sum of the parts of a memory_estimate that exist at the same time, when it is largest."""
    passing = parts["activations"] + max(parts["recomputed"], parts["logits"])
    lasting = parts["weights"] + parts["gradients"] + parts["optimizer"]
    return lasting + max(parts["casts"] + max(passing, parts["sent"]), parts["update"])


def update_bytes(
    config: GPTConfig, kind: str = "muon", world_size: int = 1, ortho_size: int = 2
) -> int:
    """Scratch memory of the optimizer. Muon stacks all matrices of a shape: two fp32 copies of
    them, and four in the dtype of the orthogonalisation (`ortho_size` bytes), or after it two more
    fp32 copies and a mask. AdamW takes one parameter at a time and needs an fp32 copy of its
    gradient."""
    params = count_params(config)
    largest = 4 * params["wte"]
    if kind == "muon":
        layers = -(-config.n_layer // world_size)
        return max(largest, (2 * 4 + max(4 * ortho_size, 9)) * layers * 4 * config.n_embd**2)
    return largest


def activation_bytes_per_token(
    config: GPTConfig, size: int = 2, device_type: str = "cuda", grad_checkpoint: bool = False
) -> int:
    """Bytes that the forward pass keeps for the backward pass, per token, with `size` bytes a
    number.

    With `grad_checkpoint` each block keeps only its input.
    """
    kept = (
        size * config.n_embd
        if grad_checkpoint
        else block_bytes_per_token(config, size, device_type)
    )
    # the first norm, the last norm and its output; the loss's gradient
    ends = size * 3 * config.n_embd + 8
    return config.n_layer * kept + ends


def block_bytes_per_token(config: GPTConfig, size: int = 2, device_type: str = "cuda") -> int:
    """Bytes that one block's forward pass keeps for its backward pass, per token.

    In widths: inputs of its norms (x twice, q; and k), x normed twice, q normed, attention's
    output, relu and its square (4 each), k normed and v. On a CPU the norm of functional.py keeps
    only its output, and attention also keeps its output as computed, head by head, in 16 bits its
    probabilities instead (attention.py, `blocks`). Row statistics are fp32: one number for each
    norm of x, and per head those of q, k and softmax.
    """
    width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
    cpu = device_type == "cpu"
    inputs = 0 if cpu else size * (3 * width + kv_width)
    statistics = 4 * (2 + 2 * config.n_head + config.n_kv_head)
    kept = size * ((13 if cpu else 12) * width + 2 * kv_width) + statistics
    if cpu and size == 2:
        block = min(config.sequence_len, 128)  # as attention.py cuts a row
        kept += size * (config.n_head * (config.sequence_len + block) // 2 - width)
    return inputs + kept


def logits_bytes(config: GPTConfig, tokens: int, size: int = 2, device_type: str = "cuda") -> int:
    """Bytes of the loss: two fp32 copies of a chunk of logits and the head's gradient; in 16 bits
    one more of each.
    """
    elements = 2**27 if device_type == "cuda" else 2**22  # as loss.py chooses its chunks
    chunk = min(tokens, max(elements // config.vocab_size, 64), 8192)
    head = config.padded_vocab_size * config.n_embd
    half = size if size < 4 else 0
    return chunk * config.vocab_size * (2 * 4 + half) + head * (4 + half)


# ---- batch size ----------------------------------------------------------------------------------

GIB = 2**30
CARDS = (8, 16, 24, 40, 80, 141)  # GiB of the GPUs that people have
# share of the memory, with expandable segments (devices.py); the libraries' workspaces, NCCL's
# buffers and some fragmentation take the rest
USABLE = 0.92
USABLE_CPU = 0.4  # glibc's heap grew to 1.1 to 2.3 times the estimate (fp32, 4 and 6 layers)
CONTEXT = {"cuda": 6e8}  # bytes that a process takes on the device before its first tensor
# longer passes gain nothing: the products run at full speed
PASS_TOKENS = {
    "cuda": 2**16,
    "mps": 2**14,
    "cpu": 2**13,
}


def fitting_batch(
    config: GPTConfig, rows: int, memory: float, *, even: bool = True, **settings: Any
) -> int:
    """The largest number of rows in one pass, of a rank's `rows` in a step, that fits `memory`
    bytes; 0 if one row does not fit.

    With `even` the result divides `rows`. `settings` as in memory_estimate.
    """
    device_type = settings.get("device_type", "cuda")
    most = min(rows, max(1, PASS_TOKENS[device_type] // config.sequence_len))
    share = USABLE_CPU if device_type == "cpu" else USABLE
    room = share * (memory - CONTEXT.get(device_type, 0))
    for size in range(most, 0, -1):
        if (not even or rows % size == 0) and memory_estimate(config, size, **settings)[
            "total"
        ] <= room:
            return size
    return 0


def what_fits(config: GPTConfig, rows: int, **settings: Any) -> Iterator[str]:
    """For each of CARDS a line: the rows of a pass and the passes of a step of `rows` rows, and
    what --grad_checkpoint=1 would change.
    """
    for card in CARDS:
        options = []
        for checkpoint in (False, True):
            size = fitting_batch(config, rows, card * GIB, grad_checkpoint=checkpoint, **settings)
            if size:
                needed = memory_estimate(config, size, grad_checkpoint=checkpoint, **settings)[
                    "total"
                ]
                options.append(f"{size} rows x {-(-rows // size)} passes ({needed / GIB:.1f} GiB)")
            else:
                options.append("not one row")
        yield f"{card:>3} GB: {options[0]}" + (
            f"; with --grad_checkpoint=1 {options[1]}" if options[1] != options[0] else ""
        )


# ---- devices -------------------------------------------------------------------------------------


class Device(NamedTuple):
    """Dense peaks from data sheets: TFLOP/s of bf16/fp16, fp8 and fp32 (as TF32 if the device has
    it; 0 = none), and GB/s of memory.
    """

    half: float
    fp8: float
    single: float
    bandwidth: float


# The first entry found in the device's name counts, so longer names come first. From the makers'
# data sheets, halved if they assume structured sparsity. Consumer cards: tensor cores with fp32
# accumulation.
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
    """The peaks of a device by the name its driver gives ("NVIDIA H100 80GB HBM3"); None for one
    that is not in the table, as a laptop's slower GPU of a card's name.
    """
    upper = name.upper()
    words = upper.replace("-", " ").split()
    if "LAPTOP" in words:
        return None
    for key, device in DEVICES.items():
        if (key in upper) if (" " in key or "-" in key) else any(word == key for word in words):
            return device
    return None


def peak_flops(device_name: str, dtype: Any = "bfloat16") -> float | None:
    """Data-sheet FLOP/s of a device in bfloat16, float16, float32 or fp8 (or the torch.dtype); None
    if unknown.

    Callers then report no utilisation instead of an invented one.
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
        raise ValueError(
            f"no peak is listed for the dtype {name}: bfloat16, float16, float32 or fp8"
        )
    return tera * 1e12 or None


def memory_bandwidth(device_name: str) -> float | None:
    """Data-sheet bytes/s between a device and its memory; None if unknown."""
    device = find_device(device_name)
    return device.bandwidth * 1e9 if device else None
