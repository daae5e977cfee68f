"""Forward passes and draws of a running batch: all its tensors are here.

Shapes: B rows, P prompts, T new tokens, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zangchat.engine.cuda import DecodeGraphs, padded, to_device, to_host
from zangchat.engine.kv_cache import CACHE_BLOCK, KVCache
from zangchat.engine.native import storage_dtype
from zangchat.engine.sampling import LogprobTensors, Sampler
from zangchat.engine.scheduler import Chunk, Prompt
from zangchat.engine.sequence import Event, Sequence
from zangchat.runtime.memory import free_memory
from zangchat.runtime.seeds import derive_seed

# Prompts are padded to a multiple of this if each length costs something. In bf16 on a CPU torch
# keeps the product that it generates for each shape, some 2 MB per prompt length (d6); on CUDA
# cuDNN plans each new shape, 23 to 37 ms on an H100.
PROMPT_MULTIPLE, PROMPT_MULTIPLE_CUDA = 16, 64
CACHE_SHARE = 0.8  # of the free memory, for keys and values; the rest is for forward passes


class Draw(NamedTuple):
    """The tokens (B,) of one step on their way to the host."""

    sequences: list[Sequence]
    tokens: Tensor
    rows: list[int]  # those that want log-probabilities
    logprobs: LogprobTensors | None
    arrived: Any  # a CUDA event, or None

    def accept(self) -> list[Event]:
        """Wait for the tokens and give them to their sequences."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values = self.logprobs.on_host() if self.logprobs is not None else []
        logprobs = dict(zip(self.rows, values, strict=True))
        tokens, events = self.tokens.tolist(), []
        for row, sequence in enumerate(self.sequences):
            if sequence.stop_reason is not None:
                continue  # it ended while the draw was under way
            try:
                events.append(sequence.accept(tokens[row], logprobs.get(row)))
            except Exception as error:  # only this sequence: the others have their tokens
                events.append(sequence.fail(error))
        return events


class Runner:
    """The model, its cache and its graphs; row i of the cache for the i-th running sequence.

    Serves one running batch at a time, and another one after it: the memory and the graphs stay.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, model.get_device()
        dtype, kind = model.compute_dtype, self.device.type
        on_cpu = PROMPT_MULTIPLE if dtype == torch.bfloat16 else 1
        self.prompt_multiple = {"cuda": PROMPT_MULTIPLE_CUDA, "cpu": on_cpu}.get(kind, 1)
        stored = storage_dtype(dtype, self.device)
        self.cache = KVCache(model.config, 1, CACHE_BLOCK, stored, self.device)
        self.graphs = DecodeGraphs(model, self.cache) if kind == "cuda" else None
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.keep_rows(set())
        # of the running rows; None after they changed: a new one needs to know all their tokens
        self.sampler: Sampler | None = None
        self._newest: Tensor | None = None  # (B,) the last draw, in the order of the running rows
        self.cache.budget = self.cache.storage.nbytes + CACHE_SHARE * free_memory(self.device)

    def move_rows(self, sources: list[int]) -> None:
        """Put into each row what was in its source, and drop the rows after them."""
        self.cache.copy_rows({row: source for row, source in enumerate(sources) if row != source})
        if self._newest is not None:
            self._newest = self._newest[to_device(sources, torch.int64, self.device)]
        self.sampler = None

    def keep_rows(self, rows: set[int]) -> None:
        """All other rows are empty."""
        lengths = enumerate(self.cache.lengths)
        self.cache.lengths[:] = [length if row in rows else 0 for row, length in lengths]

    def fork(self, source: int, rows: range) -> None:
        """Continue the prompt in row `source` in each of `rows`."""
        self.cache.copy_rows({row: source for row in rows if row != source})
        if rows:
            self.sampler = None

    def decode(self, running: list[Sequence], only: int | None = None) -> Tensor:
        """Feed each running row its newest token -> logits (B, V); or `only` one row -> (1, V)."""
        idx = self._newest_tokens(running)[:, None]
        if self.sampler is not None:
            self.sampler.mark_seen(idx)
        lengths = list(self.cache.lengths)
        try:
            if only is not None:
                return self.model(idx[only : only + 1], kv_cache=self.cache.rows([only]))[:, 0]
            if self.graphs is not None:
                return self.graphs(idx)
            return self.model(idx, kv_cache=self.cache.rows(range(len(running))))[:, 0]
        except Exception:
            self.cache.lengths[:] = lengths
            raise

    def _newest_tokens(self, running: list[Sequence]) -> Tensor:
        known = [sequence.last_token for sequence in running]
        if None not in known:
            return to_device(known, torch.int64, self.device)  # type: ignore[arg-type]
        assert self._newest is not None
        if all(token is None for token in known):
            return self._newest
        # tool output replaces the token that was drawn
        forced = [-1 if token is None else token for token in known]
        replacing = to_device(forced, torch.int64, self.device)
        return torch.where(replacing < 0, self._newest, replacing)

    def read(self, chunk: Chunk, num_rows: int, most_tokens: int) -> Tensor:
        """One forward pass over a chunk -> logits (P, V) after the last token of each prompt.

        Prompts are padded on the right: causal attention never looks there, and the tokens to come
        overwrite the padding. The cache gets `num_rows` rows, each with room for `most_tokens`.
        """
        prompts, cache = chunk.prompts, self.cache
        if cache.reserve(num_rows, most_tokens) and self.graphs is not None:
            self.graphs.clear()
        parts = [prompt.tokens[prompt.read : prompt.read + chunk.size] for prompt in prompts]
        rows, start = [prompt.row for prompt in prompts], prompts[0].read
        room = min(self.model.config.sequence_len, cache.capacity - cache.ahead) - start
        size = min(-(-chunk.size // self.prompt_multiple) * self.prompt_multiple, room)
        for prompt in prompts:
            cache.lengths[prompt.row] = prompt.read
        idx = padded(parts, self.device, size)
        last = to_device([len(part) - 1 for part in parts], torch.int64, self.device)
        context = cache.rows(rows)
        if prompts[0].logprobs is None:
            logits = self.model(idx, kv_cache=context, logits_at=last)[:, 0]
        else:
            everywhere = self.model(idx, kv_cache=context)
            for prompt, part, at in zip(prompts, parts, everywhere, strict=True):
                self._report_prompt(prompt, at[: len(part)])
            logits = everywhere[torch.arange(len(prompts), device=self.device), last]
        for prompt, part in zip(prompts, parts, strict=True):
            prompt.read += len(part)
            cache.lengths[prompt.row] = prompt.read
        return logits

    def _report_prompt(self, prompt: Prompt, logits: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the positions of `logits` (T, V)."""
        following = prompt.tokens[prompt.read + 1 : prompt.read + 1 + len(logits)]
        if not following:
            return
        tokens = to_device(following, torch.int64, self.device)
        found = LogprobTensors.of(logits[: len(following)], tokens, prompt.logprobs or 0).on_host()
        for sequence in prompt.sequences:
            if sequence.request.prompt_logprobs:
                n = sequence.request.logprobs or 0
                sequence.prompt_logprobs[prompt.read :] = [lp.cut(n) for lp in found]

    def draw(self, running: list[Sequence], logits: Tensor) -> Draw:
        """Logits (B, V) -> the next token of each running row, on its way to the host."""
        requests = [sequence.request for sequence in running]
        if self.sampler is None:
            histories = [[*sequence.request.tokens, *sequence.tokens] for sequence in running]
            vocab_size = self.model.config.vocab_size
            self.sampler = Sampler(requests, vocab_size, self.device, histories)
        uniforms = [0.0] * len(running)
        for i, (request, sequence) in enumerate(zip(requests, running, strict=True)):
            if not request.greedy:
                seed = derive_seed(request.seed, "sample", request.sample_index, sequence.drawn)
                uniforms[i] = (seed >> 10) / 2**53  # the 53 bits that a float holds: below 1
            sequence.drawn += 1
        tokens = self._newest = self.sampler(logits, uniforms)
        rows = [i for i, request in enumerate(requests) if request.logprobs is not None]
        logprobs = None
        if rows:
            at = to_device(rows, torch.int64, self.device)
            most = max(requests[i].logprobs or 0 for i in rows)
            logprobs = LogprobTensors.of(logits[at], tokens[at], most)
        tokens, arrived = to_host(tokens)
        return Draw(list(running), tokens, rows, logprobs, arrived)
