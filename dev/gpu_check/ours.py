"""All that this check calls of the model, the trainer and the engine: if their names change, only
this file does."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zangchat import checkpoint_manager
from zangchat.config import GPTConfig, RunState, StepMultipliers
from zangchat.dataloader import Batch
from zangchat.engine import Engine, Request, RunningBatch, native
from zangchat.gpt import ForwardOptions
from zangchat.nn import attention, fp8
from zangchat.nn.loss import softcapped_cross_entropy
from zangchat.optim import build_optimizer
from zangchat.runtime.compiler import working_backend
from zangchat.training.trainer import Stage, Trainer

RATES = {"embedding_lr": 1e-3, "unembedding_lr": 1e-3, "matrix_lr": 1e-3}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_model(
    gpt: GPTConfig, device: torch.device, dtype: torch.dtype, options: ForwardOptions | None = None
) -> Any:
    model = checkpoint_manager.empty_model(
        gpt, device, dtype_name(dtype), options or ForwardOptions()
    )
    model.init_weights(0.0, torch.Generator(device).manual_seed(1))
    return model


def make_trainer(
    gpt: GPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    rows_per_pass: int,
    *,
    fp8_products: bool = False,
    grad_checkpoint: bool = False,
    compile: bool | None = None,
    **optimizer: Any,
) -> tuple[Trainer, dict[str, str]]:
    """The real Trainer, and the choices it made: attention, fp8.

    `compile` as the flag (None: on CUDA); `optimizer` as in build_optimizer.
    """
    backend, reason = attention.choose_backend(device, dtype, gpt.head_dim)
    options = ForwardOptions(backend, grad_checkpoint, working_backend(compile, device))
    model = make_model(gpt, device, dtype, options)
    chosen = {"attention": reason, "fp8": fp8.use_fp8(model, device) if fp8_products else ""}
    trainer = Trainer(
        model,
        build_optimizer(model, **{**RATES, **optimizer}),
        Stage("base", lambda _: iter(()), lambda _: StepMultipliers()),
        RunState(num_iterations=10**9),
        device=device,
        device_batch_size=rows_per_pass,
    )
    return trainer, chosen


def make_batch(gpt: GPTConfig, rows: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(gpt.vocab_size, (rows, gpt.sequence_len + 1), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), {})


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def save(trainer: Trainer, folder: str) -> None:
    state, meta = trainer.optimizer.state_shards(), {"run_state": trainer.state.to_dict()}
    checkpoint_manager.save_checkpoint(folder, 1, trainer.model.state_dict(), state, meta)


def load(trainer: Trainer, folder: str) -> None:
    device = trainer.model.get_device()
    data, state, meta = checkpoint_manager.load_checkpoint(folder, 1, device, load_optimizer=True)
    trainer.model.load_state_dict(data)
    trainer.optimizer.load_shards(state)
    trainer.state = trainer.loss_scale.state = RunState.from_dict(meta["run_state"])


# ---- attention and loss --------------------------------------------------------------------------


def attention_backends(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*attention.candidates(device.type, dtype), "sdpa")))


def attention_problem(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v with gradients, for `shape` (B, H, T, D)."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_()
        for _ in range(3)
    )
    return q, k, v


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, (B, H, T, D) -> (B, H, T, D)."""
    attention.activate(backend)
    return attention.attend(q, k, v, backend=backend)


def loss(x: Tensor, weight: Tensor, targets: Tensor, compile: bool) -> Tensor:
    backend = "inductor" if compile else None
    return softcapped_cross_entropy(
        x, weight, targets, weight.size(0), 15.0, compile_backend=backend
    )


# ---- decoding ------------------------------------------------------------------------------------


class NoText:
    """Special tokens that no model draws: rows end only by their length."""

    def encode_special(self, name: str) -> int:  # noqa: ARG002
        return -1

    def get_bos_token_id(self) -> int:
        return -1

    def get_special_tokens(self) -> list[str]:
        return []


def kv_size(dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of a stored number."""
    return native.storage_dtype(dtype, device).itemsize


class Decoding:
    """Greedy continuations of `prompts`, `new` tokens each, all rows at once."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], new: int, graphs: bool = True
    ) -> None:
        self.batch = RunningBatch(engine.model, engine.tokenizer, len(prompts))
        if not graphs:
            self.batch.runner.graphs = None
        requests = [Request(list(prompt), new, temperature=0) for prompt in prompts]
        self.sequences = [self.batch.submit(request) for request in requests]

    @property
    def has_graphs(self) -> bool:
        return self.batch.runner.graphs is not None

    def begin(self) -> None:
        """Until each row has a token."""
        while not all(sequence.tokens for sequence in self.sequences):
            self.batch.step()

    def steps(self) -> Iterator[None]:
        while self.batch.busy:
            self.batch.step()
            yield

    def tokens(self) -> list[list[int]]:
        for _ in self.steps():
            pass
        return [list(sequence.tokens) for sequence in self.sequences]


def make_engine(gpt: GPTConfig, device: torch.device, dtype: torch.dtype) -> Engine:
    model = make_model(gpt, device, dtype)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():  # a new model's head knows nothing, and all its logits would be equal
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    model.set_compute_dtype(dtype, keep_masters=False)
    return Engine(model, NoText())


def logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """(T, V) of one row, without the engine."""
    idx = torch.tensor([list(tokens)], device=model.get_device())
    with torch.no_grad():
        return model(idx)[0]


def orthogonalise() -> Callable[..., Tensor]:
    from zangchat.muon import orthogonalise

    return orthogonalise
