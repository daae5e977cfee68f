"""One running batch for the terminal, the web server, evaluation and RL.

`RunningBatch` is the only path from prompts to tokens. Requests join it when a row is free and
leave it when they end; each row has its own position, sampling settings and tool state. In a step
the `Scheduler` chooses, the `Runner` computes (one forward pass over the running rows, a bounded
one over prompts, one draw per row), and each `Sequence` accepts its token.

A draw depends only on (seed, sample index, number of tokens so far) and on the row's logits: the
same request gives the same text by itself or in a crowd, up to rounding in the logits.

A request that fails, because it does not fit into the memory or because the model raises an
exception for it, ends with the error; the others continue.

On CUDA the host runs one step ahead: tokens go from the draw to the next forward pass on the
device, and the host reads them while that pass runs. Before rows join or must end, it waits.
"""

import logging
from collections import deque
from typing import Any

import torch

from zangchat.engine.cuda import on_device
from zangchat.engine.replies import Markup
from zangchat.engine.runner import Draw, Runner
from zangchat.engine.sampling import Request
from zangchat.engine.scheduler import Scheduler
from zangchat.engine.sequence import Event, Sequence

logger = logging.getLogger(__name__)
MAX_ROWS = 64  # of a running batch, by default
# prompt positions that a step reads next to the running rows
PREFILL_TOKENS, PREFILL_TOKENS_CUDA = 512, 4096
LOGIT_ELEMENTS = 2**27  # of the logits of a pass that reports a prompt's log-probabilities


class RunningBatch:
    """Continuous batching: submit requests at any time, call step() until `busy` is False.

    For one thread; holds no lock. `model`: a model, or a Runner that no other batch uses now.
    `ahead`: launch a step before the host knows the tokens of the last one; the default on CUDA.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_rows: int = MAX_ROWS,
        prefill_tokens: int | None = None,
        ahead: bool | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"a batch needs at least one row, not {max_rows}")
        self.runner = model if isinstance(model, Runner) else Runner(model)
        self.runner.clear()
        self.config, self.markup = self.runner.model.config, Markup(tokenizer)
        on_cuda = self.runner.device.type == "cuda"
        self.ahead = on_cuda if ahead is None else ahead
        budget = prefill_tokens or (PREFILL_TOKENS_CUDA if on_cuda else PREFILL_TOKENS)
        logprob_tokens = LOGIT_ELEMENTS // self.config.vocab_size
        self.scheduler = Scheduler(max_rows, budget, logprob_tokens, self.runner.cache)
        self.waiting, self.live = self.scheduler.waiting, self.scheduler.live
        self._draws: deque[Draw] = deque()  # under way

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self.scheduler.in_rows)

    def submit(self, request: Request, owner: Any = None, text: bool = False) -> Sequence:
        """Queue a request. Raises ValueError for a prompt that the model cannot read.

        Requests of one `owner` share its part of the rows. With `text`, events have pieces of it.
        """
        context, vocab_size = self.config.sequence_len, self.config.vocab_size
        room = context - len(request.tokens)
        if room < 0:
            tokens = f"the prompt has {len(request.tokens)} tokens"
            raise ValueError(f"{tokens}, the model's context {context}")
        if not 0 <= min(request.tokens) <= max(request.tokens) < vocab_size:
            raise ValueError(f"the prompt has a token outside of 0..{vocab_size - 1}")
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        sequence = Sequence(request, limit, self.markup, owner, text)
        self.scheduler.waiting.append(sequence)
        return sequence

    @torch.inference_mode()
    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> list[Event]:
        """End a sequence now and free its row. Does nothing to one that has ended."""
        if sequence.stop_reason is not None:
            return []
        event = sequence.end(reason)
        if sequence in self.scheduler.running:
            with on_device(self.runner.device):
                self._arrange()
        else:
            self.scheduler.remove(sequence)
        return [event]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Schedule, run, accept: one token for each sequence that runs or whose prompt was read."""
        scheduler, runner = self.scheduler, self.runner
        with on_device(runner.device):
            self._arrange()
            events = scheduler.admit()
            if scheduler.reading or any(map(self._needs_all_tokens, scheduler.running)):
                events += self._accept()
            logits = self._decode(events) + self._read(events)
            if logits:
                whole = logits[0] if len(logits) == 1 else torch.cat(logits)
                self._draws.append(runner.draw(scheduler.running, whole))
            return events + self._accept(but=1 if logits and self.ahead else 0)

    def _needs_all_tokens(self, sequence: Sequence) -> bool:
        """Whether the host must know the tokens of the last draw before the next one."""
        penalty = sequence.request.repetition_penalty != 1
        return sequence.drawn >= sequence.limit or (penalty and self.runner.sampler is None)

    def _decode(self, events: list[Event]) -> list[torch.Tensor]:
        """The logits (B, V) of the running sequences; if they fail together, each by itself."""
        running = self.scheduler.running
        if not running:
            return []
        try:
            return [self.runner.decode(running)]
        except Exception as error:
            logger.warning("a step of %d rows failed (%s): now row by row", len(running), error)
        logits = [torch.zeros(1, self.config.vocab_size, device=self.runner.device)] * len(running)
        for row, sequence in enumerate(running):
            try:
                logits[row] = self.runner.decode(running, only=row)
            except Exception as error:
                events.append(sequence.fail(error))
        return logits

    def _read(self, events: list[Event]) -> list[torch.Tensor]:
        """Read prompts within the budget; the logits (B, V) of the sequences that join."""
        scheduler, runner = self.scheduler, self.runner
        logits, budget = [], scheduler.prefill_tokens
        while (chunk := scheduler.next_chunk(budget)) is not None:
            budget -= len(chunk.prompts) * chunk.size
            try:
                after = runner.read(chunk, scheduler.first_free_row, scheduler.most_tokens)
            except Exception as error:
                if (number := len(chunk.prompts)) > 1:
                    logger.warning("%d prompts failed (%s): now one by one", number, error)
                events += scheduler.failed(chunk, error)
                continue
            for prompt, row in zip(chunk.prompts, after, strict=True):
                if prompt.left == 0:
                    joined, ended = scheduler.join()
                    events += ended
                    rows = range(len(scheduler.running) - len(joined), len(scheduler.running))
                    runner.fork(prompt.row, rows)
                    logits.append(row[None].expand(len(joined), -1))
        return logits

    def _accept(self, but: int = 0) -> list[Event]:
        """Accept the draws that are under way, but for the last `but`."""
        events = []
        while len(self._draws) > but:
            events += self._draws.popleft().accept()
            self._arrange()
        return events

    def _arrange(self) -> None:
        scheduler, runner = self.scheduler, self.runner
        sources = scheduler.arrange()
        if sources is not None:
            runner.move_rows(sources)
        reading = {prompt.row for prompt in scheduler.reading}
        runner.keep_rows(reading | set(range(len(scheduler.running))))
