"""Costs computed from a configuration equal those of the model and numbers computed by hand."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from zangchat.config import GPTConfig
from zangchat.flops import (
    CARDS,
    GIB,
    USABLE,
    activation_bytes_per_token,
    count_params,
    decode_bytes,
    decode_roofline,
    find_device,
    fitting_batch,
    flops_per_token,
    kv_bytes_per_token,
    memory_bandwidth,
    memory_estimate,
    peak_flops,
    scaling_params,
    what_fits,
)

D20 = GPTConfig(
    sequence_len=2048, vocab_size=65536, n_layer=20, n_head=10, n_kv_head=10, n_embd=1280
)
SMALL = GPTConfig(sequence_len=32, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


def test_parameters_of_d20():
    params = count_params(D20)
    assert params == {
        "wte": 83_886_080,
        "lm_head": 83_886_080,
        "matrices": 393_216_000,
        "total": 560_988_160,
    }
    assert scaling_params(D20) == 477_102_080


@pytest.mark.parametrize(
    "config",
    [SMALL, GPTConfig(sequence_len=8, vocab_size=257, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)],
)
def test_parameters_equal_those_of_the_model(config):
    from zangchat.gpt import GPT

    with torch.device("meta"):
        model = GPT(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    params = count_params(config)
    assert params["wte"] == sizes["transformer.wte.weight"]
    assert params["lm_head"] == sizes["lm_head.weight"]
    assert params["matrices"] == sum(
        size for name, size in sizes.items() if name.startswith("transformer.h.")
    )
    assert params["total"] == sum(sizes.values())


def test_training_flops_of_d20():
    assert flops_per_token(D20) == 6 * 477_102_080 + 12 * 20 * 10 * 128 * 2048
    assert flops_per_token(D20) == pytest.approx(3.49e9, rel=1e-3)
    assert 989e12 / flops_per_token(D20) == pytest.approx(
        283e3, rel=2e-3
    )  # tokens per second at full utilisation


def test_training_flops_equal_the_count_of_torch():
    """A forward pass is a third of it, by torch's counter with attention as plain products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from zangchat.gpt import GPT

    model = GPT(SMALL)
    model.init_weights()
    tokens = torch.randint(300, (3, 32))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)
    assert 3 * counter.get_total_flops() == flops_per_token(SMALL) * tokens.numel()


def test_decoding_limits_of_d20():
    assert kv_bytes_per_token(D20) == 102_400
    assert decode_bytes(D20, context=0) == pytest.approx(954e6, rel=1e-3)
    assert decode_bytes(D20, 512, batch_size=2) - decode_bytes(D20, 0) == 2 * 512 * 102_400
    assert decode_bytes(D20, 0, weight_bytes=1) == 477_102_080
    h100 = memory_bandwidth("NVIDIA H100 80GB HBM3")
    assert decode_roofline(D20, h100, 512) == pytest.approx(3.3e3, rel=0.02)
    assert decode_roofline(D20, h100, 1024, batch_size=64) == pytest.approx(28e3, rel=0.02)
    assert decode_roofline(D20, h100, 256, batch_size=256) == pytest.approx(112e3, rel=0.02)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_equal_the_tensors_saved_by_autograd(dtype, kv_heads):
    """Bytes saved for the backward pass, without weights and casts, plus the loss's gradient."""
    from zangchat.gpt import GPT, ForwardOptions
    from zangchat.nn.attention import choose_backend

    config = GPTConfig(
        sequence_len=256, vocab_size=256, n_layer=3, n_head=4, n_kv_head=kv_heads, n_embd=128
    )
    backend, _ = choose_backend("cpu", dtype, config.head_dim)
    model = GPT(config, dtype, ForwardOptions(attention=backend))
    model.init_weights()
    weight_shapes = {p.shape for p in model.parameters()} | {
        p.shape[::-1] for p in model.parameters()
    }
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in weight_shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(256, (3, 256))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens)
    assert torch.isfinite(loss)
    measured = sum(saved.values()) / tokens.numel() + dtype.itemsize * config.n_embd
    assert activation_bytes_per_token(config, dtype.itemsize, "cpu") == pytest.approx(
        measured, rel=0.02
    )


def test_memory_of_a_training_step():
    estimate = memory_estimate(D20, 32)
    together = estimate["casts"] + estimate["activations"] + estimate["logits"]
    assert estimate["total"] == sum(
        estimate[name] for name in ("weights", "gradients", "optimizer")
    ) + max(together, estimate["update"])
    assert 40e9 < estimate["total"] < 80e9  # an 80 GB card holds 32 rows of d20
    halved = memory_estimate(D20, 16)
    assert halved["activations"] * 2 == estimate["activations"]
    assert halved["weights"] == estimate["weights"]
    sharded = memory_estimate(D20, 32, world_size=8)
    assert sharded["optimizer"] == estimate["optimizer"] // 8
    d32 = dataclasses.replace(D20, n_layer=32, n_head=16, n_kv_head=16, n_embd=2048)
    plain, short = (
        memory_estimate(d32, 1, world_size=8, grad_checkpoint=True, grad_comm_dtype=name)
        for name in ("float32", "bfloat16")
    )
    assert (plain["sent"], short["sent"]) == (0, 2 * scaling_params(d32))
    passing = plain["activations"] + max(plain["recomputed"], plain["logits"])
    assert short["total"] - plain["total"] == short["sent"] - passing > 0


@pytest.mark.parametrize("gigabytes", CARDS)
def test_chosen_batch_fits_divides_and_is_the_largest(gigabytes):
    for rows in (512, 24, 7):
        for checkpoint in (False, True):
            size = fitting_batch(D20, rows, gigabytes * GIB, grad_checkpoint=checkpoint)
            cost = {
                n: memory_estimate(D20, n, grad_checkpoint=checkpoint)["total"]
                for n in range(1, 33)
                if rows % n == 0
            }
            assert size == max(
                (n for n in cost if cost[n] <= USABLE * (gigabytes * GIB - 6e8)), default=0
            )
    assert fitting_batch(D20, 7, gigabytes * GIB, even=False) >= fitting_batch(
        D20, 7, gigabytes * GIB
    )


def test_plan_reports_the_batch_for_each_card():
    lines = list(what_fits(D20, 512))
    assert [line.partition(":")[0].strip() for line in lines] == [
        f"{gigabytes} GB" for gigabytes in CARDS
    ]
    assert "not one row" in lines[0] and "32 rows x 16 passes" in lines[-1]
    needed = memory_estimate(D20, 32)["total"]
    assert lines[-2].startswith(f" 80 GB: 32 rows x 16 passes ({needed / GIB:.1f} GiB)")
    free = 81_559 - 600  # MiB of an H100, and of those that the driver and a context take
    assert fitting_batch(D20, 512, free * 2**20) == 32
    assert (
        memory_estimate(D20, 32, grad_checkpoint=True)["activations"]
        < memory_estimate(D20, 32)["activations"] / 5
    )


PEAK = """
import sys, json
from pathlib import Path
import torch
from zangchat.config import GPTConfig
from zangchat.gpt import GPT, ForwardOptions

def kilobytes(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

def train(rows, dtype, checkpoint, *sizes):
    config = GPTConfig(*sizes)
    options = ForwardOptions(grad_checkpoint=checkpoint)
    model = GPT(config, getattr(torch, dtype), options)
    model.init_weights()
    optimizer = model.setup_optimizers(embedding_lr=0.1, unembedding_lr=0.01, matrix_lr=0.01)
    tokens = torch.randint(config.vocab_size, (rows, config.sequence_len))
    for _ in range(2):  # in the second step the optimizer's state is there already, in its second pass the gradients are
        for _ in range(2):
            model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

torch.set_num_threads(1)
for case in json.loads(sys.argv[1]):
    train(2, *case[1:3], 64, 256, 1, 2, 2, 64)  # what libraries keep for themselves is there afterwards
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = kilobytes("VmRSS")
    train(*case)
    print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's own count")
@pytest.mark.slow
def test_predicted_memory_equals_cpu_usage():
    """The allocator returns freed memory; glibc would keep tens of MB, too much at this size."""
    cases = [[8, "float32", checkpoint, 256, 4096, 4, 4, 4, 256] for checkpoint in (False, True)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    command = [sys.executable, "-c", PEAK, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for (rows, dtype, checkpoint, *shape), measured in zip(
        cases, map(int, done.stdout.split()), strict=True
    ):
        estimate = memory_estimate(
            GPTConfig(*shape), rows, dtype=dtype, device_type="cpu", grad_checkpoint=checkpoint
        )
        assert 0.85 < estimate["total"] / measured < 1.25, (dtype, checkpoint, estimate, measured)


GROWTH = """
import sys, psutil, torch
from zangchat.flops import fitting_batch
from zangchat.gpt import GPT, GPTConfig
from zangchat.runtime.memory import keep_freed_memory
keep_freed_memory()
config = GPTConfig(512, 400, 6, 4, 4, 256)
rows = fitting_batch(config, 16, float(sys.argv[1]), dtype="float32", device_type="cpu")
model, before = GPT(config), psutil.Process().memory_info()
model.init_weights()
idx = torch.zeros(rows, 512, dtype=torch.int64)
for _ in range(3):
    model(idx, idx).backward()
after = psutil.Process().memory_info()
print(rows, (after.rss - after.shared) - (before.rss - before.shared))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the waste is that of glibc's heap")
def test_rows_on_a_cpu_leave_room_for_what_the_heap_wastes():
    """Under a container's limit of 1 GB, 16 rows were chosen and took twice that."""
    command = [sys.executable, "-c", GROWTH, str(1e9)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, grown = map(int, done.stdout.split())
    assert rows > 1 and grown < 1e9


def test_memory_depends_on_the_dtype():
    single, half = (
        memory_estimate(SMALL, 4, dtype=dtype, device_type="cpu")
        for dtype in ("float32", "bfloat16")
    )
    assert half["activations"] < 0.8 * single["activations"]
    assert single["weights"] == 4 * count_params(SMALL)["total"]
    assert memory_estimate(SMALL, 4, dtype=torch.float32, device_type="cpu") == single


def test_optimizer_memory_equals_the_optimizer_state():
    from zangchat.gpt import GPT
    from zangchat.optim import build_optimizer

    config = GPTConfig(
        sequence_len=16, vocab_size=256, n_layer=2, n_head=4, n_kv_head=4, n_embd=256
    )
    model = GPT(config, compute_dtype=torch.bfloat16)
    model.init_weights()
    optimizer = build_optimizer(model, embedding_lr=0.1, unembedding_lr=0.1, matrix_lr=0.1)
    tokens = torch.randint(256, (1, 16))
    model(tokens, tokens).backward()
    optimizer.step()
    kept = sum(
        t.numel() * t.element_size()
        for shard in optimizer.state_shards().values()
        for t in shard["tensors"].values()
    )
    assert memory_estimate(config, 1)["optimizer"] == pytest.approx(kept, rel=0.02)


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 836),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("AMD Instinct MI300X", 1307),
        ("a CPU", None),
    ],
)
def test_peaks_of_known_devices(name, tera):
    peak = peak_flops(name, torch.bfloat16)
    assert peak is None if tera is None else peak == tera * 1e12


def test_peaks_by_dtype():
    h100 = "NVIDIA H100 80GB HBM3"
    assert peak_flops(h100, "bfloat16") == peak_flops(h100, torch.float16) == 989e12
    assert peak_flops(h100, "fp8") == peak_flops(h100, torch.float8_e4m3fn) == 1979e12
    assert peak_flops(h100, torch.float32) == 495e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    with pytest.raises(ValueError, match="int4"):
        peak_flops(h100, "int4")


def test_variants_of_a_device_are_distinguished():
    assert memory_bandwidth("NVIDIA A100-SXM4-80GB") == 2039e9
    assert memory_bandwidth("NVIDIA A100-SXM4-40GB") == 1555e9
    assert memory_bandwidth("NVIDIA H200") == 4800e9
    assert memory_bandwidth("something new") is None
    assert find_device("NVIDIA GeForce RTX 4090 Laptop GPU") is None, "another chip of that name"
    assert find_device("NVIDIA A100 80GB PCIe").bandwidth == 1935
