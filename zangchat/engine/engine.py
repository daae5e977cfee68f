"""A model and its tokenizer, ready to generate and to score; loading them for a command."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from zangchat import checkpoint_manager
from zangchat.config import CheckpointConfig
from zangchat.engine.batch import MAX_ROWS, RunningBatch
from zangchat.engine.model import InferenceGPT
from zangchat.engine.sampling import Request
from zangchat.engine.scoring import score
from zangchat.engine.sequence import Result
from zangchat.errors import UserError
from zangchat.gpt import GPT
from zangchat.runtime.devices import compute_init


class Engine:
    """A model and its tokenizer, ready to continue prompts. Each call has a running batch of its
    own.

    The model is a snapshot (see model.InferenceGPT): make a new engine after training it.
    """

    def __init__(self, model: GPT, tokenizer: Any, quantize: str = "") -> None:
        self.model: Any = InferenceGPT(model, quantize) if isinstance(model, GPT) else model
        self.tokenizer = tokenizer

    def generate(
        self,
        tokens: Sequence[int],
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
        Request.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        batch = RunningBatch(self.model, self.tokenizer, max_rows=num_samples)
        settings = (max_tokens, temperature, top_k, top_p, seed)
        for i in range(num_samples):
            batch.submit(Request(tokens, *settings, sample_index=i, **more))
        return self._columns(batch, num_samples)

    def _columns(
        self, batch: RunningBatch, num_samples: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        while batch.busy:
            column, masks = [-1] * num_samples, [0] * num_samples
            for sequence, token, mask, _ in batch.step():
                if token is not None:
                    i = sequence.request.sample_index
                    column[i], masks[i] = token, mask
            if any(token >= 0 for token in column):
                yield column, masks

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **settings: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """`num_samples` whole sequences with the prompt, and masks (0 for prompt and tool
        output).
        """
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        for column, mask_column in self.generate(tokens, num_samples, **settings):
            for i, (token, mask) in enumerate(zip(column, mask_column, strict=True)):
                if token >= 0:
                    sequences[i].append(token)
                    masks[i].append(mask)
        return sequences, masks

    def generate_many(self, requests: Sequence[Request], max_rows: int = MAX_ROWS) -> list[Result]:
        """Continue different prompts, at most `max_rows` at a time; results in order of the
        requests.

        Equal prompts next to each other are read once.
        """
        batch = RunningBatch(self.model, self.tokenizer, max_rows)
        sequences = [batch.submit(request) for request in requests]
        while batch.busy:
            batch.step()
        return [sequence.result() for sequence in sequences]

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        greedy: bool = False,
    ) -> list[float]:
        """Log-probabilities of continuations, see scoring.score."""
        return score(self.model, prompts, continuations, greedy)


# ---- loading -------------------------------------------------------------------------------------


def load_for_chat(
    config: CheckpointConfig, device: torch.device | str | None = None
) -> tuple[GPT, Any, dict[str, Any]]:
    """(model, tokenizer, meta) for a command's flags; weights in the compute dtype."""
    if device is None:
        device = compute_init(config.device_type)[-1]
    model, tokenizer, meta = checkpoint_manager.load_model(
        config.source,
        device,
        "eval",
        model_tag=config.model_tag,
        step=config.step,
        dtype=config.dtype,
    )
    model.set_compute_dtype(model.compute_dtype, keep_masters=False)
    return model, tokenizer, meta


def engine_for_chat(config: Any, device: torch.device | str | None = None) -> Engine:
    """An engine for a command with --quantize. Raises UserError if that is not possible here."""
    model, tokenizer, _ = load_for_chat(config, device)
    try:
        return Engine(model, tokenizer, config.quantize)
    except ValueError as error:
        raise UserError(f"--quantize={config.quantize} is not possible: {error}") from None
