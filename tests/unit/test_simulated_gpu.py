"""Training and decoding on a simulated GPU: waits, memory, fp8 products, CUDA graph capture."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simulated_gpu import DEVICE, Usage, backward, simulated_gpu
from zangchat import schedule
from zangchat.config import GPTConfig
from zangchat.engine.kv_cache import KVCache
from zangchat.engine.model import InferenceGPT
from zangchat.engine.sampling import Request, Sampler
from zangchat.flops import block_bytes_per_token, memory_estimate
from zangchat.gpt import GPT, ForwardOptions
from zangchat.nn import fp8
from zangchat.nn.linear import Linear
from zangchat.optim import build_optimizer


def gpt_config(depth: int) -> GPTConfig:
    return schedule.model_config_for_depth(depth, 128, 0, vocab_size=65536, sequence_len=2048)


def make_model(depth: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> GPT:
    with DEVICE:
        model = GPT(gpt_config(depth), dtype, ForwardOptions(**options))
    model.init_weights()
    return model


def train(usage: Usage, model: GPT, rows: int, **settings: Any) -> int:
    """Take two steps of two passes each, like the trainer; return the second's peak in bytes."""
    optimizer = build_optimizer(
        model, embedding_lr=0.3, unembedding_lr=0.01, matrix_lr=0.02, **settings
    )
    for _ in range(2):  # the second step has the optimizer's state, its second pass has gradients
        usage.peak = usage.now
        with model.cast_once():
            for last in (False, True):
                tokens = torch.zeros(
                    rows, model.config.sequence_len, dtype=torch.int64, device=DEVICE
                )
                losses = [model(tokens, tokens)]
                if last:
                    optimizer.last_pass()
                backward(losses)
        optimizer.sum_gradients()
        optimizer.step()
        optimizer.zero_grad()
    return usage.peak


def test_simulation_has_no_values_and_one_device() -> None:
    with simulated_gpu() as usage:
        x = torch.zeros(1000, device=DEVICE)
        assert usage.now == 4096
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(1000)
        del x
        assert usage.now == 0 and usage.peak >= 4096


@pytest.mark.parametrize(
    ("depth", "rows", "dtype", "grad_checkpoint"),
    [
        (4, 4, torch.bfloat16, False),
        (12, 8, torch.bfloat16, False),
        (12, 8, torch.float32, True),
        (20, 32, torch.bfloat16, False),
        pytest.param(20, 32, torch.bfloat16, True, marks=pytest.mark.slow),
        pytest.param(12, 8, torch.float32, False, marks=pytest.mark.slow),
        pytest.param(32, 8, torch.bfloat16, False, marks=pytest.mark.slow),
        pytest.param(32, 2, torch.bfloat16, True, marks=pytest.mark.slow),
    ],
)
def test_training_step_never_waits_and_uses_the_predicted_memory(
    depth: int, rows: int, dtype: torch.dtype, grad_checkpoint: bool
) -> None:
    with simulated_gpu() as usage:
        model = make_model(depth, dtype, grad_checkpoint=grad_checkpoint)
        taken = train(usage, model, rows)
    foreseen = memory_estimate(
        gpt_config(depth), rows, dtype=str(dtype), grad_checkpoint=grad_checkpoint
    )
    assert foreseen["total"] == pytest.approx(taken, rel=0.03), foreseen


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_other_optimizers_use_the_predicted_memory(optimizer: str) -> None:
    with simulated_gpu() as usage:
        taken = train(usage, make_model(12), 2, kind=optimizer)
    assert memory_estimate(gpt_config(12), 2, optimizer=optimizer)["total"] == pytest.approx(
        taken, rel=0.03
    )


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize("comm_dtype", [torch.float32, torch.bfloat16])
def test_one_of_eight_ranks_uses_the_predicted_memory(comm_dtype: torch.dtype) -> None:
    with simulated_gpu() as usage:
        taken = train(usage, make_model(12), 8, world_size=8, comm_dtype=comm_dtype)
    foreseen = memory_estimate(
        gpt_config(12), 8, world_size=8, grad_comm_dtype=str(comm_dtype).removeprefix("torch.")
    )
    assert foreseen["total"] == pytest.approx(taken, rel=0.03), foreseen


def test_heads_are_copied_by_their_rotations_only() -> None:
    """Queries and keys stay as the projections make them, (B, T, heads, D), through rotation, norm
    and attention: two copies in the forward pass, and the same two back."""
    with simulated_gpu() as usage:
        model = make_model(4)
        tokens = torch.zeros(4, 2048, dtype=torch.int64, device=DEVICE)
        with model.cast_once():
            usage.calls.clear()
            losses = [model(tokens, tokens)]
            assert usage.calls["clone"] == 2 * 4
            backward(losses)
            assert usage.calls["clone"] == 4 * 4


def test_a_block_keeps_what_the_memory_estimate_says() -> None:
    """To the byte: attention's output once, not also as a copy in rows."""
    kept: dict[int, int] = {}
    with simulated_gpu():
        model = make_model(4)
        x = torch.zeros(4, 2048, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        rotary = model._rotary(2048, None)
        with model.cast_once():
            casts = [layer.cast for layer in model.modules() if isinstance(layer, Linear)]
            known = {t.untyped_storage()._cdata for t in (*casts, *rotary)}

            def keep(tensor: Any) -> Any:
                storage = tensor.untyped_storage()
                if storage._cdata not in known and tensor.numel() > 2:
                    kept[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model.transformer["h"][0](x, rotary, None, "sdpa")
    assert sum(kept.values()) == 4 * 2048 * block_bytes_per_token(model.config)


def test_fp8_products_get_valid_operands() -> None:
    """_scaled_mm needs fp8, one column-major side and multiples of 16; torch checks that here."""
    with simulated_gpu() as usage:
        model = make_model(12)
        layers = fp8.convert_to_fp8(model, min_size=0)
        train(usage, model, 1)
    assert layers == 6 * 12
    assert usage.calls["_scaled_mm"] == 2 * 2 * 3 * layers  # steps, passes, products
    # the scales: of the inputs and gradients in each pass, of the weights once per step
    assert usage.calls["amax"] == 2 * (2 * 2 + 1) * layers


def test_fp8_accumulates_fast_in_the_forward_pass_only() -> None:
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            if function is torch.ops.aten._scaled_mm.default:
                fast.append((kwargs or {}).get("use_fast_accum", (*args, False)[7:8] == (True,)))
            return function(*args, **(kwargs or {}))

    fast: list[bool] = []
    with simulated_gpu(), Products():
        with DEVICE:
            layer = fp8.Fp8Linear(64, 32)
        y = layer(torch.zeros(16, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True))
        assert fast == [True]
        backward([y.sum()])
    assert fast == [True, False, False]


def test_inference_never_waits_for_the_gpu() -> None:
    """A pass over prompts, the decoding step that CUDA graphs record, and the sampling after it.

    Waiting during a capture is an error.
    """
    requests = [
        Request([1], temperature=0),
        Request([1], top_k=50, top_p=0.9),
        Request([1], top_k=None, top_p=0.9, min_p=0.1),
    ]
    requests.append(Request([1], top_k=None, repetition_penalty=1.2))
    with simulated_gpu(), torch.inference_mode():
        model = InferenceGPT(make_model(12))
        cache = KVCache(model.config, 8, 512, torch.bfloat16, DEVICE)
        prompts = torch.zeros(4, 300, dtype=torch.int64, device=DEVICE)
        logits = model(prompts, kv_cache=cache.rows(range(4)), logits_at=prompts[:, 0])
        assert logits.shape == (4, 1, 65536)
        sampler = Sampler(requests, model.config.vocab_size, DEVICE, [[1]] * 4)
        tokens = sampler(logits[:, 0], [0.5] * 4)
        assert tokens.shape == (4,) and tokens.device == DEVICE
        sampler.mark_seen(tokens[:, None])
        for rows in (cache.fixed_rows(prompts[:, 0], 512), cache.rows(range(4))):
            logits = model(tokens[:, None], kv_cache=rows)
            assert logits.shape == (4, 1, 65536) and logits.device == DEVICE
