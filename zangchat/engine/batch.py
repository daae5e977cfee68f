"""Inference: one running batch for the terminal, the web server, evaluation and RL.

`RunningBatch` is the only path from prompts to tokens. Requests join it whenever a row is free and leave it when they end; each row
stands at its own position, has its own sampling settings and its own tool state. A step is one forward pass over the running rows, a
bounded one over the prompts still being read, one draw per row. `Engine` wraps it for callers that have all their prompts at hand.

A draw depends on (seed, sample index, number of tokens so far) and on the row's logits, on nothing else: the same request gives the
same text alone or in a crowd, up to rounding in the logits.

On CUDA the host runs one step ahead of what it knows: tokens go from the draw to the next forward pass on the device, and the host
reads them while that pass runs. Wherever rows are about to join or must end, it waits first.

Shapes: B rows, T new tokens, S stored tokens, L layers, G key/value heads, D head dimension, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zangchat.config import CheckpointConfig
from zangchat.engine.kv_cache import CACHE_BLOCK, KVCache, groups_by_length, storage_dtype
from zangchat.engine.replies import ReplyDecoder, StopFinder, StreamDecoder, fit_conversation
from zangchat.engine.sampling import Logprob, LogprobTensors, Request, Sampler, to_device
from zangchat.engine.tools import use_calculator
from zangchat.errors import UserError
from zangchat.runtime.seeds import derive_seed

if TYPE_CHECKING:
    from zangchat.gpt import GPT

__all__ = [
    "Engine",
    "Event",
    "Generation",
    "KVCache",
    "Logprob",
    "ReplyDecoder",
    "Request",
    "Result",
    "RunningBatch",
    "StopFinder",
    "StreamDecoder",
    "engine_for_chat",
    "fit_conversation",
    "load_for_chat",
    "use_calculator",
]

MAX_ROWS = 64  # rows of a running batch unless the caller says otherwise
PREFILL_TOKENS = {"cuda": 4096}  # prompt positions, padding included, that a step reads at most beside the running rows
PREFILL_TOKENS_ELSEWHERE = 512
PROMPT_MULTIPLE = 16  # to which prompts are padded where torch keeps the product that it generates for each shape: bf16 on a CPU
LOGIT_ELEMENTS = 2**27  # logits that exist at a time where those of a whole prompt are wanted


# ---- requests on their way ------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a request gave: the new tokens, without the token that ended it."""

    tokens: list[int]
    mask: list[int]  # 1 where the model chose the token, 0 where a tool's output was put in
    stop_reason: str  # "stop" (the model ended its turn, or said a stop string), "length" (max_tokens or the context), "cancelled"
    logprobs: list[Logprob] = field(default_factory=list)  # where asked for: of each token, and of the stop_token
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # where asked for: of each prompt token but the first
    stop_token: int | None = None  # the special token that ended it


@dataclass(eq=False)
class Generation:
    """A request on its way through a running batch."""

    request: Request
    limit: int  # new tokens at most
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    stop_reason: str | None = None  # None while waiting or running
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    stop_token: int | None = None
    drawn: int = 0  # tokens drawn so far; one more than the host has seen where a draw is under way
    forced: deque[int] = field(default_factory=deque)  # tool output still to be put in
    call: list[int] | None = None  # tokens of the tool call being written, None outside of one
    reply: ReplyDecoder | None = None  # looks for the stop strings

    @property
    def last_token(self) -> int | None:
        """The newest token, None where only the device knows it."""
        if self.drawn == len(self.tokens):
            return self.tokens[-1]
        return self.forced[0] if self.forced else None

    def result(self) -> Result:
        if self.stop_reason is None:
            raise ValueError("this generation has not ended yet")
        return Result(self.tokens, self.mask, self.stop_reason, self.logprobs, self.prompt_logprobs, self.stop_token)


class Event(NamedTuple):
    """A generation got a token, or (token None) ended without one. Whether it has ended is in its stop_reason."""

    generation: Generation
    token: int | None
    mask: int = 0
    logprob: Logprob | None = None  # where asked for, also of the stop token of an event without a token


# ---- the running batch ----------------------------------------------------------------------------------------------


@dataclass
class _Prompt:
    """A prompt being read once, for all the generations that go on from it."""

    tokens: Sequence[int]
    generations: list[Generation]
    row: int  # of the cache; as many behind it are kept free as there are more generations
    read: int = 0  # tokens stored

    @property
    def left(self) -> int:
        return len(self.tokens) - self.read

    @property
    def logprobs(self) -> int | None:
        """Most likely tokens wanted at each place of the prompt; None where nobody wants to know."""
        return max((g.request.logprobs or 0 for g in self.generations if g.request.prompt_logprobs), default=None)


class _Draw(NamedTuple):
    """The tokens (B,) of one step on their way to the host, and the log-probabilities of those rows that want them."""

    generations: list[Generation]
    tokens: Tensor
    rows: list[int]
    logprobs: LogprobTensors | None
    arrived: Any  # a CUDA event, or None


class RunningBatch:
    """Continuous batching: submit requests at any time, call step() until nothing is left. For one thread; holds no lock.

    `ahead`: launch a step before the tokens of the one before are known to the host; by default where that pays, on CUDA.
    """

    def __init__(
        self, model: Any, tokenizer: Any, max_rows: int = MAX_ROWS, prefill_tokens: int | None = None, ahead: bool | None = None
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"a batch needs at least one row, not {max_rows}")
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.device = model.get_device()
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(self.device.type, PREFILL_TOKENS_ELSEWHERE)
        self.ahead = self.device.type == "cuda" if ahead is None else ahead
        self.prompt_multiple = PROMPT_MULTIPLE if self.device.type == "cpu" and model.compute_dtype == torch.bfloat16 else 1
        self.waiting: deque[Generation] = deque()
        self.reading: deque[_Prompt] = deque()  # in the order of their rows, all behind the running ones
        self.running: list[Generation] = []  # row i of the cache belongs to running[i]
        self._groups: list[int] = []  # sizes of the groups of running rows that attend together, see _arrange
        self.cache = KVCache(model.config, 1, CACHE_BLOCK, storage_dtype(model.compute_dtype, self.device), self.device)
        self.stop_tokens = frozenset(tokenizer.encode_special(name) for name in ("<|assistant_end|>", "<|bos|>"))
        self.python_start, self.python_end, self.output_start, self.output_end = (
            tokenizer.encode_special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")
        )
        self._sampler: Sampler | None = None  # of the running rows; None after they changed
        self._newest: Tensor | None = None  # (B,) the last draw, in the order of the running rows
        self._under_way: _Draw | None = None
        self._graphs: Any = None
        if self.device.type == "cuda":
            from zangchat.engine.model import DecodeGraphs

            self._graphs = DecodeGraphs(model)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.reading or self.waiting)

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self.running) + sum(len(prompt.generations) for prompt in self.reading)

    def live(self) -> list[Generation]:
        """All that have not ended."""
        return [*self.running, *(g for prompt in self.reading for g in prompt.generations), *self.waiting]

    def submit(self, request: Request) -> Generation:
        """Queue a request. Raises ValueError for a prompt that the model cannot read."""
        config = self.model.config
        room = config.sequence_len - len(request.tokens)
        if room < 0:
            raise ValueError(f"the prompt has {len(request.tokens)} tokens, the model's context {config.sequence_len}")
        if not 0 <= min(request.tokens) <= max(request.tokens) < config.vocab_size:
            raise ValueError(f"the prompt has a token outside of 0..{config.vocab_size - 1}")
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        generation = Generation(request, limit, reply=ReplyDecoder(self.tokenizer, request.stop) if request.stop else None)
        self.waiting.append(generation)
        return generation

    @torch.inference_mode()
    def cancel(self, generation: Generation) -> None:
        """End a generation now and free its row. Does nothing to one that has ended."""
        if generation.stop_reason is not None:
            return
        generation.stop_reason = "cancelled"
        if generation in self.running:
            self._arrange()
        elif generation in self.waiting:
            self.waiting.remove(generation)
        else:
            for prompt in self.reading:
                prompt.generations = [other for other in prompt.generations if other is not generation]
            self.reading = deque(prompt for prompt in self.reading if prompt.generations)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward pass: the running requests get their next tokens, those whose prompt was read get their first one."""
        events: list[Event] = []
        self._arrange()
        self._admit(events)
        if self.reading or any(g.drawn >= g.limit or (self._sampler is None and g.request.repetition_penalty != 1) for g in self.running):
            events += self._land()  # who runs is about to change, or a draw depends on all tokens: know first where everybody stands
        before, self._under_way = self._under_way, None
        logits = [self._decode()] if self.running else []
        if self.reading:
            logits += self._read(events)
        if logits:
            self._under_way = self._draw(logits[0] if len(logits) == 1 else torch.cat(logits))
        if before is not None:
            events += self._accept_all(before)
        return events if self.ahead else events + self._land()

    # -- forward passes

    def _decode(self) -> Tensor:
        """Feed each running row its newest token -> logits (B, V)."""
        known = [generation.last_token for generation in self.running]
        if None not in known:
            idx = to_device(known, torch.int64, self.device)[:, None]  # type: ignore[arg-type]
        else:
            assert self._newest is not None
            idx = self._newest[:, None]
            if any(token is not None for token in known):  # a tool's output overrules what was drawn
                overruled = to_device([-1 if token is None else token for token in known], torch.int64, self.device)[:, None]
                idx = torch.where(overruled < 0, idx, overruled)
        if self._sampler is not None:
            self._sampler.saw(idx)
        rows, cache = len(self.running), self.cache
        if self._graphs is not None:
            return self._graphs(cache, idx)
        cache.reserve(rows, max(cache.lengths[:rows]) + 1)
        return self.model(idx, kv_cache=cache.rows(0, rows, self._groups))[:, 0]

    def _admit(self, events: list[Event]) -> None:
        """Take waiting requests while rows are free; those with nothing to do end here. Equal prompts are read once."""
        prompts: dict[tuple[int, ...], list[Generation]] = {}
        row = self._first_free_row()
        free = self.max_rows - row
        while self.waiting and free > 0:
            generation = self.waiting.popleft()
            if generation.limit > 0 or generation.request.prompt_logprobs:
                prompts.setdefault(tuple(generation.request.tokens), []).append(generation)
                free -= 1
            else:
                generation.stop_reason = "length"
                events.append(Event(generation, None))
        for tokens in sorted(prompts, key=len):  # similar lengths will share a pass
            self.reading.append(_Prompt(tokens, prompts[tokens], row))
            row += len(prompts[tokens])

    def _first_free_row(self) -> int:
        return self.reading[-1].row + len(self.reading[-1].generations) if self.reading else len(self.running)

    def _read(self, events: list[Event]) -> list[Tensor]:
        """Read what the budget allows of the prompts; those read to the end join the running rows, their logits (B, V) are returned.

        Whole prompts share a pass, padded on the right: causal attention never looks there, and the padding is overwritten as the row
        goes on. One that is longer than the budget is read alone, a chunk a step.
        """
        logits, budget = [], self.prefill_tokens
        while self.reading and budget > 0:
            first = self.reading[0]
            if first.left > budget < self.prefill_tokens:
                break  # a whole chunk in the next step rather than a scrap in this one
            most = budget if first.logprobs is None else max(1, min(budget, LOGIT_ELEMENTS // self.model.config.vocab_size))
            together, size = [first], min(first.left, most)
            if first.read == 0 and size == first.left:
                for prompt in list(self.reading)[1:]:
                    widest = max(size, prompt.left)
                    if (len(together) + 1) * widest > most or (prompt.logprobs is None) != (first.logprobs is None):
                        break
                    together.append(prompt)
                    size = widest
            budget -= len(together) * size
            for prompt, row in zip(together, self._read_pass(together, size), strict=True):
                if prompt.left == 0:
                    self.reading.popleft()
                    logits.append(row[None].expand(self._join(prompt, events), -1))
        return logits

    def _read_pass(self, prompts: list[_Prompt], size: int) -> Tensor:
        """`size` more tokens of each prompt in one forward pass -> logits (len(prompts), V) behind the last token of each.

        A size of its own for every prompt would grow a bf16 server on a CPU by some 2 MB each (d6), hence `prompt_multiple`.
        """
        chunks = [prompt.tokens[prompt.read : prompt.read + size] for prompt in prompts]
        rows = [prompt.row for prompt in prompts]
        size = min(-(-size // self.prompt_multiple) * self.prompt_multiple, self.model.config.sequence_len - prompts[0].read)
        self.cache.reserve(self._first_free_row(), prompts[0].read + size)  # for all that are being read: growing copies
        for row, prompt in zip(rows, prompts, strict=True):
            self.cache.lengths[row] = prompt.read
        idx = to_device([token for chunk in chunks for token in [*chunk, *[0] * (size - len(chunk))]], torch.int64, self.device)
        last = to_device([len(chunk) - 1 for chunk in chunks], torch.int64, self.device)
        rows_of_cache, idx = self.cache.some_rows(rows), idx.view(len(prompts), size)
        if prompts[0].logprobs is None:
            logits = self.model(idx, kv_cache=rows_of_cache, logits_at=last)[:, 0]
        else:
            everywhere = self.model(idx, kv_cache=rows_of_cache)
            for prompt, chunk, at in zip(prompts, chunks, everywhere, strict=True):
                self._note_prompt(prompt, at[: len(chunk)])
            logits = everywhere[torch.arange(len(prompts), device=self.device), last]
        for row, prompt, chunk in zip(rows, prompts, chunks, strict=True):
            prompt.read += len(chunk)
            self.cache.lengths[row] = prompt.read
        return logits

    def _note_prompt(self, prompt: _Prompt, logits: Tensor) -> None:
        """Log-probabilities of the prompt tokens behind the places of `logits` (T, V)."""
        following = prompt.tokens[prompt.read + 1 : prompt.read + 1 + len(logits)]
        if not following:
            return
        tensors = LogprobTensors.of(logits[: len(following)], to_device(following, torch.int64, self.device), prompt.logprobs or 0)
        for generation in prompt.generations:
            if generation.request.prompt_logprobs:
                generation.prompt_logprobs += tensors.on_host(generation.request.logprobs or 0)

    def _join(self, prompt: _Prompt, events: list[Event]) -> int:
        """Give each generation of a prompt that was read a row behind the running ones; returns how many go on."""
        source, joined = prompt.row, 0
        for generation in prompt.generations:
            if generation.limit == 0:  # only its prompt was of interest
                generation.stop_reason = "length"
                events.append(Event(generation, None))
                continue
            row = len(self.running)
            if row != source:
                self.cache.reserve(row + 1, 0)
                self.cache.copy_rows({row: source})
            self.running.append(generation)
            joined += 1
        if joined:
            self._sampler = None
        return joined

    # -- choosing tokens

    def _draw(self, logits: Tensor) -> _Draw:
        """The next token of each running row, on the device, and on its way to the host."""
        requests = [generation.request for generation in self.running]
        if self._sampler is None:
            histories = [[*generation.request.tokens, *generation.tokens] for generation in self.running]
            self._sampler = Sampler(requests, self.model.config.vocab_size, self.device, histories)
        uniforms = [0.0] * len(requests)
        for i, (request, generation) in enumerate(zip(requests, self.running, strict=True)):
            if not request.greedy:
                seed = derive_seed(request.seed, "sample", request.sample_index, generation.drawn)
                uniforms[i] = (seed >> 10) / 2**53  # the 53 bits that a float holds exactly: always below 1
            generation.drawn += 1
        self._newest = self._sampler(logits, uniforms)
        rows = [i for i, request in enumerate(requests) if request.logprobs is not None]
        logprobs = None
        if rows:
            at = to_device(rows, torch.int64, self.device)
            logprobs = LogprobTensors.of(logits[at], self._newest[at], max(requests[i].logprobs or 0 for i in rows))
        tokens, arrived = self._newest, None
        if self.device.type == "cuda":
            tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return _Draw(list(self.running), tokens, rows, logprobs, arrived)

    def _land(self) -> list[Event]:
        draw, self._under_way = self._under_way, None
        return [] if draw is None else self._accept_all(draw)

    def _accept_all(self, draw: _Draw) -> list[Event]:
        """Wait for drawn tokens and give them to their generations."""
        if draw.arrived is not None:
            draw.arrived.synchronize()
        logprobs: dict[int, Logprob] = {}
        if draw.logprobs is not None:
            most = max(draw.generations[row].request.logprobs or 0 for row in draw.rows)
            logprobs = dict(zip(draw.rows, draw.logprobs.on_host(most), strict=True))
        events = [
            self._accept(generation, token, logprobs.get(row))
            for row, (generation, token) in enumerate(zip(draw.generations, draw.tokens.tolist(), strict=True))
            if generation.stop_reason is None  # else it ended while this was under way
        ]
        self._arrange()
        return events

    def _accept(self, generation: Generation, token: int, logprob: Logprob | None) -> Event:
        """Append the row's next token, which is the tool's where one has something to say, and follow the tool state."""
        forced = bool(generation.forced)
        if logprob is not None:
            # what a tool says was not chosen: it counts as certain
            logprob = Logprob(0.0, []) if forced else Logprob(logprob.value, logprob.top[: generation.request.logprobs])
            generation.logprobs.append(logprob)
        if forced:
            token = generation.forced.popleft()
        elif token in self.stop_tokens:
            generation.stop_reason, generation.stop_token = "stop", token
            return Event(generation, None, 0, logprob)
        else:
            self._follow_call(generation, token)
        generation.tokens.append(token)
        generation.mask.append(0 if forced else 1)
        if generation.reply is not None:
            generation.reply.feed(token)
        if generation.reply is not None and generation.reply.stopped:
            generation.stop_reason = "stop"
        elif len(generation.tokens) >= generation.limit:
            generation.stop_reason = "length"
        return Event(generation, token, generation.mask[-1], logprob)

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

    def _arrange(self) -> None:
        """Free the rows of what has ended, and keep the others in groups of similar length, longest first: a group attends as far as its
        longest row. Since all grow alike, rows only move when somebody joined or left: into the place of one that is no longer there,
        or has to go to another group."""
        live = [row for row, generation in enumerate(self.running) if generation.stop_reason is None]
        if len(live) == len(self.running) == sum(self._groups):
            return
        lengths = self.cache.lengths
        live.sort(key=lambda row: -lengths[row])
        worth = self.cache.bytes_per_token if self._graphs is None else 0  # in a CUDA graph all attend alike
        self._groups = groups_by_length([lengths[row] for row in live], worth)
        sources: list[int] = []  # where what is in each row now comes from
        for size in self._groups:
            places, members = range(len(sources), len(sources) + size), live[len(sources) : len(sources) + size]
            moving = [row for row in members if row not in places]
            sources += [place if place in members else moving.pop() for place in places]
        self.cache.copy_rows({row: source for row, source in enumerate(sources) if row != source})
        self.running = [self.running[source] for source in sources]
        if self._newest is not None:
            self._newest = self._newest[to_device(sources, torch.int64, self.device)]
        self._sampler = None


class Engine:
    """A model and its tokenizer, ready to continue prompts. Holds no state between calls; each call has a running batch of its own.

    The model is taken as it is at this moment (see inference.InferenceGPT): make a new engine after training it.
    """

    def __init__(self, model: "GPT", tokenizer: Any, quantize: str = "") -> None:
        from zangchat.engine.model import InferenceGPT
        from zangchat.gpt import GPT

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
        """Stream `num_samples` continuations of one prompt: (token column, mask column) per step, one entry per sample.

        The mask is 1 where the model chose the token and 0 where a tool's output was put in. A sample that has ended shows -1 (mask 0)
        while others go on; the token that ended it is never shown. `more` are further fields of a Request.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        batch = RunningBatch(self.model, self.tokenizer, max_rows=num_samples)
        for i in range(num_samples):
            batch.submit(Request(tokens, max_tokens, temperature, top_k, top_p, seed, sample_index=i, **more))
        return self._columns(batch, num_samples)

    def _columns(self, batch: RunningBatch, num_samples: int) -> Iterator[tuple[list[int], list[int]]]:
        while batch.busy:
            column, masks = [-1] * num_samples, [0] * num_samples
            for generation, token, mask, _ in batch.step():
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


# ---- loading --------------------------------------------------------------------------------------------------------


def load_for_chat(config: CheckpointConfig, device: torch.device | str | None = None) -> tuple["GPT", Any, dict[str, Any]]:
    """(model, tokenizer, meta) as a command's flags say; weights in the compute dtype."""
    from zangchat import checkpoint_manager
    from zangchat.runtime.devices import compute_init

    if device is None:
        device = compute_init(config.device_type)[-1]
    model, tokenizer, meta = checkpoint_manager.load_model(
        config.source, device, "eval", model_tag=config.model_tag, step=config.step, dtype=config.dtype
    )
    model.set_compute_dtype(model.compute_dtype, keep_masters=False)
    return model, tokenizer, meta


def engine_for_chat(config: Any, device: torch.device | str | None = None) -> Engine:
    """The same as an Engine, for a command that has --quantize too. Raises UserError for one that is not possible here."""
    model, tokenizer, _ = load_for_chat(config, device)
    try:
        return Engine(model, tokenizer, config.quantize)
    except ValueError as error:
        raise UserError(f"--quantize={config.quantize} is not possible: {error}") from None
