"""Inference: one running batch for the terminal, the web server, evaluation and RL.

`RunningBatch` is the only path from prompts to tokens. Requests join it whenever a row is free and leave it when they end; each row
stands at its own position, has its own sampling settings and its own tool state. A step is one forward pass over the running rows,
one over the prompts that just joined, one draw per row. `Engine` wraps it for callers that have all their prompts at hand.

A draw depends on (seed, sample index, number of tokens so far) and on the row's logits, on nothing else: the same request gives the
same text alone or in a crowd, up to rounding in the logits.

Shapes: B rows, T new tokens, S stored tokens, L layers, G key/value heads, D head dimension, V vocabulary.
"""

import codecs
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zangchat.common import derive_seed
from zangchat.config import GPTConfig
from zangchat.tools import use_calculator

if TYPE_CHECKING:
    from zangchat.gpt import GPT

__all__ = [
    "CacheRows",
    "Engine",
    "Event",
    "Generation",
    "KVCache",
    "ReplyDecoder",
    "Request",
    "Result",
    "RunningBatch",
    "StreamDecoder",
    "fit_conversation",
    "load_for_chat",
    "sample",
    "use_calculator",
]

MAX_ROWS = 64  # rows of a running batch unless the caller says otherwise
PREFILL_TOKENS = 4096  # positions, padding included, in one forward pass over new prompts
CACHE_BLOCK = 64  # the cache is as long as a multiple of this
COLDEST = 1e-5  # temperatures below are taken as 0, before logits / temperature overflows


# ---- requests -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One continuation to generate. Raises ValueError for settings that mean nothing."""

    tokens: Sequence[int]  # the prompt
    max_tokens: int | None = None  # new tokens at most, forced tool output included; None: as many as the context holds
    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int | None = None  # draw among the k most likely; None or 0: all
    top_p: float | None = None  # draw among the most likely that reach this probability together (arXiv:1904.09751); None or 1: all
    seed: int = 42
    sample_index: int = 0  # tells apart the samples of one prompt under one seed

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("a prompt needs at least one token, <|bos|> for example")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


@dataclass
class Result:
    """What a request gave: the new tokens, without the token that ended it."""

    tokens: list[int]
    mask: list[int]  # 1 where the model chose the token, 0 where a tool's output was put in
    stop_reason: str  # "stop" (the model ended its turn), "length" (max_tokens or the context), "cancelled"


@dataclass
class Generation:
    """A request on its way through a running batch."""

    request: Request
    limit: int  # new tokens at most
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    stop_reason: str | None = None  # None while waiting or running
    forced: deque[int] = field(default_factory=deque)  # tool output still to be put in
    call: list[int] | None = None  # tokens of the tool call being written, None outside of one

    def result(self) -> Result:
        if self.stop_reason is None:
            raise ValueError("this generation has not ended yet")
        return Result(self.tokens, self.mask, self.stop_reason)


class Event(NamedTuple):
    """A generation got a token, or (token None) ended without one. Whether it has ended is in its stop_reason."""

    generation: Generation
    token: int | None
    mask: int = 0


# ---- key/value cache ------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of many rows, (L, rows, G, S, D) each, preallocated and grown by doubling; every row has its own length."""

    def __init__(self, config: GPTConfig, num_rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.max_capacity = -(-config.sequence_len // CACHE_BLOCK) * CACHE_BLOCK
        self.lengths = [0] * num_rows  # tokens stored, per row
        # zeros, not empty: a masked position still enters the sum as 0 x value, which is NaN where the memory held one
        self.keys, self.values = (
            torch.zeros(config.n_layer, num_rows, config.n_kv_head, self._rounded(capacity), config.head_dim, dtype=dtype, device=device)
            for _ in range(2)
        )

    @property
    def num_rows(self) -> int:
        return self.keys.size(1)

    @property
    def capacity(self) -> int:
        return self.keys.size(3)

    def _rounded(self, length: int) -> int:
        return -(-length // CACHE_BLOCK) * CACHE_BLOCK

    def reserve(self, num_rows: int, capacity: int) -> None:
        """Make room, keeping what is stored. Storage at least doubles, so that growing costs little over time."""
        if num_rows > self.num_rows:
            num_rows = max(num_rows, 2 * self.num_rows)
            self.lengths += [0] * (num_rows - self.num_rows)
        if capacity > self.capacity:
            capacity = max(self._rounded(capacity), min(2 * self.capacity, self.max_capacity))
        rows, length = self.num_rows, self.capacity
        if num_rows > rows or capacity > length:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_zeros(old.size(0), max(num_rows, rows), old.size(2), max(capacity, length), old.size(4))
                new[:, :rows, :, :length] = old
                setattr(self, name, new)

    def copy_row(self, source: int, target: int) -> None:
        length = self.lengths[source]
        for storage in (self.keys, self.values):
            storage[:, target, :, :length] = storage[:, source, :, :length]
        self.lengths[target] = length

    def rows(self, start: int, stop: int) -> "CacheRows":
        """The rows start..stop-1 as the model's forward takes them, for one call."""
        return CacheRows(self, start, stop)


class CacheRows:
    """Some rows of a cache for one forward pass: gpt.KVCacheLike. Room for the new tokens must have been reserved."""

    def __init__(self, cache: KVCache, start: int, stop: int) -> None:
        if not 0 <= start < stop <= cache.num_rows:
            raise ValueError(f"rows {start}..{stop} of a cache that has {cache.num_rows}")
        self.cache, self.start, self.stop = cache, start, stop
        lengths = cache.lengths[start:stop]
        self.longest = max(lengths)
        self.aligned = min(lengths) == self.longest
        self.positions = torch.tensor(lengths, device=cache.keys.device)
        self._index: tuple[Tensor, Tensor] | None = None
        self._mask: Tensor | None = None

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k, v (B, G, T, D) behind each row's tokens; returns keys and values (B, G, S, D) and a mask (B, 1, T, S).

        The mask is None where all rows have the same length: then the T queries are simply the last T of S positions.
        """
        T = k.size(2)
        end = self.longest + T
        if end > self.cache.capacity or k.size(0) != self.stop - self.start:
            raise ValueError(f"no room for {tuple(k.shape)} behind {self.longest} tokens in {self.stop - self.start} rows")
        stored = tuple(storage[layer_idx, self.start : self.stop] for storage in (self.cache.keys, self.cache.values))
        if self.aligned:
            for storage, new in zip(stored, (k, v), strict=True):
                storage[:, :, self.longest : end] = new
        else:
            if self._index is None:
                where = self.positions[:, None] + torch.arange(T, device=k.device)  # (B, T)
                self._index = (torch.arange(k.size(0), device=k.device)[:, None], where)
                self._mask = (torch.arange(end, device=k.device) <= where[:, :, None])[:, None]
            row, where = self._index
            for storage, new in zip(stored, (k, v), strict=True):
                storage[row, :, where] = new.transpose(1, 2)
        return stored[0][:, :, :end], stored[1][:, :, :end], self._mask

    def advance(self, num_tokens: int) -> None:
        for row in range(self.start, self.stop):
            self.cache.lengths[row] += num_tokens


# ---- sampling -------------------------------------------------------------------------------------------------------


def sample(logits: Tensor, requests: Sequence[Request], uniforms: Sequence[float]) -> Tensor:
    """One token per row from logits (B, V): (B,) int64. `uniforms` are the rows' draws from [0, 1).

    Inverse-CDF sampling in the order of the vocabulary: the result moves only if a draw falls within rounding of a boundary, whatever
    else is in the batch.
    """
    best = logits.argmax(dim=-1)
    if all(request.greedy for request in requests):
        return best
    device, vocab_size = logits.device, logits.size(-1)
    temperature = torch.tensor([1.0 if r.greedy else r.temperature for r in requests], device=device)
    scores = logits / temperature[:, None]
    top_k = [min(r.top_k or vocab_size, vocab_size) for r in requests]
    top_p = [r.top_p or 1.0 for r in requests]
    narrow = [i for i, r in enumerate(requests) if not r.greedy and (top_k[i] < vocab_size or top_p[i] < 1)]
    if narrow:
        scores[narrow] = _narrowed(scores[narrow], [top_k[i] for i in narrow], [top_p[i] for i in narrow])
    precise = torch.float32 if device.type == "mps" else torch.float64
    cdf = scores.softmax(dim=-1).cumsum(dim=-1, dtype=precise)
    target = torch.tensor(uniforms, dtype=precise, device=device)[:, None] * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp_(max=vocab_size - 1)
    return torch.where(torch.tensor([r.greedy for r in requests], device=device), best, drawn)


def _narrowed(scores: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """scores (B, V) with -inf outside each row's k best, and outside the fewest best whose probabilities reach p."""
    best, ids = scores.topk(max(top_k), dim=-1)  # descending
    dropped = torch.arange(best.size(-1), device=scores.device) >= torch.tensor(top_k, device=scores.device)[:, None]
    best = best.masked_fill(dropped, -math.inf)
    if min(top_p) < 1:
        probabilities = best.softmax(dim=-1)
        reached_before = probabilities.cumsum(dim=-1) - probabilities
        limit = torch.tensor(top_p, device=scores.device)[:, None]
        best = best.masked_fill((reached_before >= limit) & (limit < 1), -math.inf)
    return torch.full_like(scores, -math.inf).scatter_(1, ids, best)


# ---- the running batch ----------------------------------------------------------------------------------------------


class RunningBatch:
    """Continuous batching: submit requests at any time, call step() until nothing is left. For one thread; holds no lock."""

    def __init__(self, model: "GPT", tokenizer: Any, max_rows: int = MAX_ROWS) -> None:
        if max_rows < 1:
            raise ValueError(f"a batch needs at least one row, not {max_rows}")
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.device = model.get_device()
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []  # row i of the cache belongs to running[i]
        self.cache: KVCache | None = None
        self.stop_tokens = frozenset(tokenizer.encode_special(name) for name in ("<|assistant_end|>", "<|bos|>"))
        self.python_start, self.python_end, self.output_start, self.output_end = (
            tokenizer.encode_special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")
        )

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def submit(self, request: Request) -> Generation:
        """Queue a request. Raises ValueError for a prompt that the model cannot read."""
        config = self.model.config
        room = config.sequence_len - len(request.tokens)
        if room < 0:
            raise ValueError(f"the prompt has {len(request.tokens)} tokens, the model's context {config.sequence_len}")
        if not all(0 <= token < config.vocab_size for token in request.tokens):
            raise ValueError(f"the prompt has a token outside of 0..{config.vocab_size - 1}")
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        generation = Generation(request, limit)
        self.waiting.append(generation)
        return generation

    @torch.inference_mode()
    def cancel(self, generation: Generation) -> None:
        """End a generation now and free its row. Does nothing to one that has ended."""
        if generation.stop_reason is not None:
            return
        generation.stop_reason = "cancelled"
        if any(generation is other for other in self.waiting):
            self.waiting = deque(other for other in self.waiting if other is not generation)
        else:
            self._drop_ended()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Give every running request its next token, those that just joined included."""
        events: list[Event] = []
        logits: list[Tensor] = []
        if self.running:
            logits.append(self._decode())
        joined = self._admit(events)
        if joined:
            logits.append(self._prefill(joined))
        if not self.running:
            return events
        chosen = self._draw(logits[0] if len(logits) == 1 else torch.cat(logits))
        for generation, token in zip(self.running, chosen, strict=True):
            events.append(self._accept(generation, token))
        self._drop_ended()
        return events

    # -- forward passes

    def _decode(self) -> Tensor:
        """Feed each running row its last token -> logits (B, V)."""
        cache, rows = self._cache(), len(self.running)
        cache.reserve(rows, max(cache.lengths[:rows]) + 1)
        idx = torch.tensor([[generation.tokens[-1]] for generation in self.running], device=self.device)
        return self.model(idx, kv_cache=cache.rows(0, rows))[:, 0]

    def _admit(self, events: list[Event]) -> list[Generation]:
        """Take waiting requests while rows are free; those with no room for a token end here."""
        joined: list[Generation] = []
        while self.waiting and len(self.running) + len(joined) < self.max_rows:
            generation = self.waiting.popleft()
            if generation.limit > 0:
                joined.append(generation)
            else:
                generation.stop_reason = "length"
                events.append(Event(generation, None))
        return joined

    def _prefill(self, joined: list[Generation]) -> Tensor:
        """Read the prompts of requests that just joined, each different one once -> logits (joined, V) in the order of their rows.

        Prompts of similar length share a forward pass, padded on the right: causal attention never looks there, and the padding is
        overwritten as the row goes on.
        """
        prompts: dict[tuple[int, ...], list[Generation]] = {}
        for generation in sorted(joined, key=lambda g: len(g.request.tokens)):
            prompts.setdefault(tuple(generation.request.tokens), []).append(generation)
        first, unique = len(self.running), list(prompts)
        cache = self._cache()
        cache.reserve(first + len(joined), len(unique[-1]))
        logits = []
        for start, stop in _groups([len(prompt) for prompt in unique], PREFILL_TOKENS):
            longest = len(unique[stop - 1])
            idx = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in unique[start:stop]], device=self.device)
            last = torch.tensor([len(prompt) - 1 for prompt in unique[start:stop]], device=self.device)
            for row in range(first + start, first + stop):
                cache.lengths[row] = 0
            logits.append(self.model(idx, kv_cache=cache.rows(first + start, first + stop), logits_at=last)[:, 0])
            for row, prompt in enumerate(unique[start:stop], first + start):
                cache.lengths[row] = len(prompt)
        self.running += [generations[0] for generations in prompts.values()]
        sources = list(range(len(unique)))
        for number, generations in enumerate(prompts.values()):
            for generation in generations[1:]:
                cache.copy_row(first + number, len(self.running))
                self.running.append(generation)
                sources.append(number)
        read = torch.cat(logits)
        return read[torch.tensor(sources, device=self.device)] if len(sources) > len(unique) else read

    def _cache(self) -> KVCache:
        if self.cache is None:
            self.cache = KVCache(self.model.config, 1, CACHE_BLOCK, self.model.compute_dtype, self.device)
        return self.cache

    # -- choosing tokens

    def _draw(self, logits: Tensor) -> list[int]:
        requests = [generation.request for generation in self.running]
        uniforms = [0.0] * len(requests)
        for i, (request, generation) in enumerate(zip(requests, self.running, strict=True)):
            if not request.greedy:
                seed = derive_seed(request.seed, "sample", request.sample_index, len(generation.tokens))
                uniforms[i] = (seed >> 10) / 2**53  # the 53 bits that a float holds exactly: always below 1
        return sample(logits, requests, uniforms).tolist()

    def _accept(self, generation: Generation, token: int) -> Event:
        """Append the row's next token, which is the tool's where one has something to say, and follow the tool state."""
        forced = bool(generation.forced)
        if forced:
            token = generation.forced.popleft()
        elif token in self.stop_tokens:
            generation.stop_reason = "stop"
            return Event(generation, None)
        else:
            self._follow_call(generation, token)
        generation.tokens.append(token)
        generation.mask.append(0 if forced else 1)
        if len(generation.tokens) >= generation.limit:
            generation.stop_reason = "length"
        return Event(generation, token, generation.mask[-1])

    def _follow_call(self, generation: Generation, token: int) -> None:
        """The tool state machine: <|python_start|> expression <|python_end|> forces <|output_start|> result <|output_end|>.

        A second start begins a new expression, an end without a start means nothing, and what the calculator refuses gets no output.
        """
        if token == self.python_start:
            generation.call = []
        elif generation.call is None:
            return
        elif token != self.python_end:
            generation.call.append(token)
        else:
            result = use_calculator(self.tokenizer.decode(generation.call))
            generation.call = None
            if result is not None:
                generation.forced.extend([self.output_start, *self.tokenizer.encode(result), self.output_end])

    def _drop_ended(self) -> None:
        """Free the rows of what has ended; the last row moves into the gap, so that the running rows stay together."""
        for row in reversed(range(len(self.running))):
            if self.running[row].stop_reason is not None:
                last = self.running.pop()
                if row < len(self.running):
                    self.running[row] = last
                    self._cache().copy_row(len(self.running), row)


def _groups(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Cut ascending lengths into runs (start, stop) whose count x longest stays within the budget; a single one may exceed it."""
    start = 0
    for i, length in enumerate(lengths):
        if i > start and (i - start + 1) * length > budget:
            yield start, i
            start = i
    if start < len(lengths):
        yield start, len(lengths)


class Engine:
    """A model and its tokenizer, ready to continue prompts. Holds no state between calls; each call has a running batch of its own."""

    def __init__(self, model: "GPT", tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Stream `num_samples` continuations of one prompt: (token column, mask column) per step, one entry per sample.

        The mask is 1 where the model chose the token and 0 where a tool's output was put in. A sample that has ended shows -1 (mask 0)
        while others go on; the token that ended it is never shown.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        batch = RunningBatch(self.model, self.tokenizer, max_rows=num_samples)
        for i in range(num_samples):
            batch.submit(Request(tokens, max_tokens, temperature, top_k, top_p, seed, sample_index=i))
        return self._columns(batch, num_samples)

    def _columns(self, batch: RunningBatch, num_samples: int) -> Iterator[tuple[list[int], list[int]]]:
        while batch.busy:
            column, masks = [-1] * num_samples, [0] * num_samples
            for generation, token, mask in batch.step():
                if token is not None:
                    i = generation.request.sample_index
                    column[i], masks[i] = token, mask
            if any(token >= 0 for token in column):
                yield column, masks

    def generate_batch(self, tokens: Sequence[int], num_samples: int = 1, **settings: Any) -> tuple[list[list[int]], list[list[int]]]:
        """`num_samples` whole sequences, prompt included, and their masks (0 over the prompt and over tool output)."""
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        for column, mask_column in self.generate(tokens, num_samples, **settings):
            for i, (token, mask) in enumerate(zip(column, mask_column, strict=True)):
                if token >= 0:
                    sequences[i].append(token)
                    masks[i].append(mask)
        return sequences, masks

    def generate_many(self, requests: Sequence[Request], max_rows: int = MAX_ROWS) -> list[Result]:
        """Continue many different prompts, at most `max_rows` at a time; results in the order of the requests.

        Equal prompts that are next to each other are read once.
        """
        batch = RunningBatch(self.model, self.tokenizer, max_rows)
        generations = [batch.submit(request) for request in requests]
        while batch.busy:
            batch.step()
        return [generation.result() for generation in generations]


# ---- tokens to text -------------------------------------------------------------------------------------------------


class StreamDecoder:
    """Tokens -> text, piece by piece, never half a character: incomplete UTF-8 is held back until it is whole, or flushed as U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode_bytes = tokenizer.decode_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that became certain with this token; often "", when it ends within a character."""
        return self._decoder.decode(self._decode_bytes([token]))

    def flush(self) -> str:
        """What is still held back, at the end of the stream; the decoder can be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class ReplyDecoder:
    """Tokens of a reply -> the parts of its message: [{"type": "text" | "python" | "python_output", "text": str}], growing."""

    SWITCHES = {
        "<|python_start|>": "python",
        "<|python_end|>": "text",
        "<|output_start|>": "python_output",
        "<|output_end|>": "text",
    }

    def __init__(self, tokenizer: Any) -> None:
        self.parts: list[dict[str, str]] = []
        self._decoder = StreamDecoder(tokenizer)
        self._switches = {tokenizer.encode_special(name): kind for name, kind in self.SWITCHES.items()}
        self._silent = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()} - set(self._switches)
        self._kind = "text"

    def feed(self, token: int) -> list[tuple[str, str]]:
        """The (type, text) pieces that this token adds: none, one, or two where a part ends with half a character."""
        if token in self._switches:
            pieces = self.flush()
            self._kind = self._switches[token]
            if self._kind != "text":
                self.parts.append({"type": self._kind, "text": ""})
            return pieces
        if token in self._silent:
            return []
        return self._add(self._decoder.feed(token))

    def flush(self) -> list[tuple[str, str]]:
        return self._add(self._decoder.flush())

    def text(self) -> str:
        """What was said, tool calls left out."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def content(self) -> str | list[dict[str, str]]:
        """The reply as a message's content: a string, or its parts where a tool was called."""
        return self.parts if any(part["type"] != "text" for part in self.parts) else self.text()

    def _add(self, text: str) -> list[tuple[str, str]]:
        if not text:
            return []
        if not self.parts or self.parts[-1]["type"] != self._kind:
            self.parts.append({"type": self._kind, "text": ""})
        self.parts[-1]["text"] += text
        return [(self._kind, text)]


# ---- chat -----------------------------------------------------------------------------------------------------------


def fit_conversation(tokenizer: Any, messages: list[dict[str, Any]], max_prompt: int) -> tuple[list[int], int]:
    """(prompt tokens of a chat that waits for the assistant, number of oldest messages left out to stay within `max_prompt` tokens).

    The system message stays, turns go in pairs, and the last user message always stays: the prompt may therefore still be too long.
    """
    head = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(head) :]
    cuts = range(0, len(turns), 2)  # turns alternate, so that every cut leaves a user message first

    def render(cut: int) -> list[int]:
        return tokenizer.render_for_completion({"messages": [*head, *turns[cut:]]})

    low, high = 0, len(cuts) - 1
    while low < high:  # the fewest turns to leave out: prompts only get shorter
        middle = (low + high) // 2
        low, high = (low, middle) if len(render(cuts[middle])) <= max_prompt else (middle + 1, high)
    return render(cuts[low]), cuts[low]


def load_for_chat(config: Any, device: torch.device | str | None = None) -> tuple["GPT", Any, dict[str, Any]]:
    """(model, tokenizer, meta) for a command with the flags source, model_tag, step, device_type, dtype; weights in the compute dtype."""
    from zangchat import checkpoint_manager, common

    if device is None:
        device = common.compute_init(config.device_type)[-1]
    model, tokenizer, meta = checkpoint_manager.load_model(
        config.source, device, "eval", model_tag=config.model_tag, step=config.step, dtype=config.dtype
    )
    model.set_compute_dtype(model.compute_dtype, keep_masters=False)
    return model, tokenizer, meta
