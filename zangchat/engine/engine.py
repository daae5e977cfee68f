"""A model and its tokenizer, ready to generate and to score; loading them for a command."""

import contextlib
from collections import abc
from collections.abc import Iterator
from typing import Any

import torch

from zangchat import checkpoint_manager
from zangchat.config import CheckpointConfig
from zangchat.engine.batch import MAX_ROWS, RunningBatch
from zangchat.engine.model import InferenceGPT
from zangchat.engine.runner import Runner
from zangchat.engine.sampling import Request
from zangchat.engine.scoring import score
from zangchat.engine.sequence import Sequence
from zangchat.errors import UserError
from zangchat.gpt import GPT
from zangchat.runtime.devices import compute_init


class Engine:
    """A model and its tokenizer, ready to continue prompts.

    The model is a snapshot (see model.InferenceGPT): call `refresh` after training it. The cache
    and the CUDA graphs of a call are kept for the next one; calls that overlap have their own.
    """

    def __init__(self, model: GPT, tokenizer: Any, quantize: str = "") -> None:
        self.model: Any = InferenceGPT(model, quantize) if isinstance(model, GPT) else model
        self.tokenizer = tokenizer
        self._idle: list[Runner] = []

    def refresh(self, model: GPT) -> None:
        """Take over the weights of the model as they are now."""
        self.model.refresh(model)

    @contextlib.contextmanager
    def running_batch(self, max_rows: int = MAX_ROWS) -> Iterator[RunningBatch]:
        """A running batch on the memory of one that has ended, if there is any."""
        try:
            runner = self._idle.pop()
        except IndexError:  # all are in use
            runner = Runner(self.model)
        try:
            yield RunningBatch(runner, self.tokenizer, max_rows)
        finally:
            self._idle.append(runner)

    def generate(
        self,
        tokens: abc.Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
        **more: Any,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Stream `num_samples` continuations of one prompt.

        Yields (token column, mask column) per step, with one entry per sample. The mask is 1 for a
        token that the model chose and 0 for tool output. A sample that has ended shows -1 (mask 0)
        until all have ended; the token that ended it is never shown. `more` are further fields of a
        Request. Raises UserError if the memory is too small for one sample.
        """
        more |= {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        more |= {"top_k": top_k, "top_p": top_p}
        columns = self._columns(_samples(tokens, num_samples, more))
        next(columns)  # submits them, which may raise ValueError
        return columns

    def _columns(self, requests: abc.Sequence[Request]) -> Iterator[tuple[list[int], list[int]]]:
        with self.running_batch(max_rows=len(requests)) as batch:
            sequences = [batch.submit(request) for request in requests]
            yield [], []
            while batch.busy:
                column, masks = [-1] * len(requests), [0] * len(requests)
                for sequence, token, mask, *_ in batch.step():
                    if token is not None:
                        i = sequence.request.sample_index
                        column[i], masks[i] = token, mask
                if any(token >= 0 for token in column):
                    yield column, masks
            for sequence in sequences:
                sequence.result()  # raises its error

    def generate_batch(
        self, tokens: abc.Sequence[int], num_samples: int = 1, **settings: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """`num_samples` whole sequences, and masks (0 for the prompt and tool output)."""
        requests = _samples(tokens, num_samples, settings)
        done = self.generate_many(requests, max_rows=num_samples)
        masks = [[0] * len(tokens) + sequence.mask for sequence in done]
        return [[*tokens, *sequence.tokens] for sequence in done], masks

    def generate_many(
        self, requests: abc.Sequence[Request], max_rows: int = MAX_ROWS
    ) -> list[Sequence]:
        """Continue different prompts, results in order. Equal ones side by side are read once."""
        with self.running_batch(max_rows) as batch:
            sequences = [batch.submit(request) for request in requests]
            while batch.busy:
                batch.step()
        return [sequence.result() for sequence in sequences]

    def score(
        self,
        prompts: abc.Sequence[abc.Sequence[int]],
        continuations: abc.Sequence[abc.Sequence[int]],
        greedy: bool = False,
    ) -> list[float]:
        """Log-probabilities of continuations, see scoring.score."""
        return score(self.model, prompts, continuations, greedy)


def _samples(tokens: Any, num_samples: int, settings: dict[str, Any]) -> list[Request]:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    return [Request(tokens, sample_index=i, **settings) for i in range(num_samples)]


def load_for_chat(
    config: CheckpointConfig, device: torch.device | str | None = None
) -> tuple[GPT, Any, dict[str, Any]]:
    """(model, tokenizer, meta) for a command's flags; weights in the compute dtype."""
    device = device or compute_init(config.device_type)[-1]
    model, tokenizer, meta = checkpoint_manager.load_model(
        config.source, device, "eval", config.model_tag, config.step, config.dtype
    )
    model.set_compute_dtype(model.compute_dtype, keep_masters=False)
    return model, tokenizer, meta


def engine_for_chat(config: Any, device: torch.device | str | None = None) -> Engine:
    """An engine for a command with --quantize. Raises UserError if that is not possible here."""
    model, tokenizer, _ = load_for_chat(config, device)
    return quantised_engine(model, tokenizer, config)


def quantised_engine(model: GPT, tokenizer: Any, config: Any) -> Engine:
    try:
        return Engine(model, tokenizer, config.quantize)
    except ValueError as error:
        raise UserError(f"--quantize={config.quantize} is not possible: {error}") from None
