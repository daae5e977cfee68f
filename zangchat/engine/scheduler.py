"""The order of work in a running batch: which requests join, which prompts are read, which row is
whose. No tensors.

Rows 0..len(running)-1 of the cache belong to the running sequences, the rows after them to the
prompts being read.
"""

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from zangchat.engine.sequence import Event, Sequence


@dataclass
class Prompt:
    """A prompt that is read once for all the sequences that continue it."""

    tokens: tuple[int, ...]
    sequences: list[Sequence]
    row: int  # in the cache; the rows after it are kept free for all but one of the sequences
    read: int = 0  # tokens stored
    alone: bool = False  # it does not share a pass with others

    @property
    def left(self) -> int:
        return len(self.tokens) - self.read

    @property
    def logprobs(self) -> int | None:
        """Most likely tokens to report at each position of the prompt; None if not requested."""
        requests = [sequence.request for sequence in self.sequences]
        return max((r.logprobs or 0 for r in requests if r.prompt_logprobs), default=None)


@dataclass
class Chunk:
    """The next tokens of some prompts, for one forward pass: of each at most `size`."""

    prompts: list[Prompt]
    size: int


class Scheduler:
    """Admits requests while rows and memory are free, and reads prompts within a budget.

    prefill_tokens: prompt positions to read in a step, padding included. logprob_tokens: the most
    positions of a pass that keeps the logits of all of them. cache: a KVCache, which tells how many
    rows of how many tokens fit; without one, all do.
    """

    def __init__(
        self, max_rows: int, prefill_tokens: int, logprob_tokens: int, cache: Any = None
    ) -> None:
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self.logprob_tokens, self.cache = max(1, logprob_tokens), cache
        self.waiting: deque[Sequence] = deque()
        self.reading: deque[Prompt] = deque()  # in the order of their rows
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self.running or self.reading or self.waiting)

    @property
    def in_rows(self) -> list[Sequence]:
        """The sequences that have a row of the cache."""
        return [*self.running, *(s for prompt in self.reading for s in prompt.sequences)]

    @property
    def first_free_row(self) -> int:
        if not self.reading:
            return len(self.running)
        return self.reading[-1].row + len(self.reading[-1].sequences)

    @property
    def most_tokens(self) -> int:
        """Tokens that the longest row may come to hold."""
        return max((sequence.most_tokens for sequence in self.in_rows), default=0)

    def live(self) -> list[Sequence]:
        """All sequences that have not ended."""
        return [*self.in_rows, *self.waiting]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has not begun to run."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        for prompt in self.reading:
            prompt.sequences = [other for other in prompt.sequences if other is not sequence]
        self.reading = deque(prompt for prompt in self.reading if prompt.sequences)

    def admit(self) -> list[Event]:
        """Move waiting requests to `reading`. Equal prompts are read once.

        The next one is of the owner with the fewest rows; no owner of several gets more than half
        of them. Each has room for all that it may generate. Returns the ends of those that have
        nothing to do, and of those for which even an empty cache is too small.
        """
        if not self.waiting:
            return []
        events: list[Event] = []
        prompts: dict[tuple[int, ...], list[Sequence]] = {}
        held = Counter(sequence.owner for sequence in self.in_rows)
        rows, longest = self.first_free_row, self.most_tokens
        while self.waiting and rows < self.max_rows:
            newcomer = next((s for s in self.waiting if not held[s.owner]), None)
            sequence = newcomer or min(self.waiting, key=lambda s: held[s.owner])
            wanted, own = max(longest, sequence.most_tokens), held[sequence.owner] + 1
            if sequence.limit == 0 and not sequence.request.prompt_logprobs:
                events.append(sequence.end("length"))
            elif own > 1 and not (2 * own <= self.max_rows and self._fits(2 * own, wanted)):
                break
            elif self._fits(rows + 1, wanted):
                prompts.setdefault(tuple(sequence.request.tokens), []).append(sequence)
                held[sequence.owner] = own
                rows, longest = rows + 1, wanted
            elif rows:
                break  # until rows are free
            else:
                events.append(sequence.fail(self.cache.too_small(wanted)))
            self.waiting.remove(sequence)
        row = self.first_free_row
        for tokens in sorted(prompts, key=len):  # similar lengths will share a pass
            self.reading.append(Prompt(tokens, prompts[tokens], row))
            row += len(prompts[tokens])
        return events

    def _fits(self, num_rows: int, capacity: int) -> bool:
        return self.cache is None or self.cache.size_for(num_rows, capacity) is not None

    def next_chunk(self, budget: int) -> Chunk | None:
        """The prompts to read next with a rest of the step's budget.

        Whole prompts share a pass, padded on the right. A prompt that is longer than the budget is
        read by itself, one chunk per step.
        """
        if not self.reading or budget <= 0:
            return None
        first = self.reading[0]
        if first.left > budget < self.prefill_tokens:
            return None  # a whole chunk in the next step rather than a part in this one
        most = budget if first.logprobs is None else min(budget, self.logprob_tokens)
        together, size = [first], min(first.left, most)
        if first.read == 0 and size == first.left and not first.alone:
            for prompt in list(self.reading)[1:]:
                widest = max(size, prompt.left)
                alike = (prompt.logprobs is None) == (first.logprobs is None)
                if (len(together) + 1) * widest > most or not alike:
                    break
                together.append(prompt)
                size = widest
        return Chunk(together, size)

    def failed(self, chunk: Chunk, error: Exception) -> list[Event]:
        """A pass over the chunk raised an exception: read its prompts one by one from now on, and
        end the sequences of a single one."""
        if len(chunk.prompts) == 1:
            self.reading.popleft()
            return [sequence.fail(error) for sequence in chunk.prompts[0].sequences]
        for prompt in chunk.prompts:
            prompt.alone = True
        return []

    def join(self) -> tuple[list[Sequence], list[Event]]:
        """Give each sequence of the first prompt a row after the running ones.

        Returns (those that run, the ends of those that wanted the prompt's log-probabilities only).
        """
        sequences = self.reading.popleft().sequences
        joined = [sequence for sequence in sequences if sequence.limit > 0]
        self.running += joined
        return joined, [sequence.end("length") for sequence in sequences if sequence.limit == 0]

    def arrange(self) -> list[int] | None:
        """Move the last rows into those of ended sequences.

        Returns the former row of each row, or None if nothing changes.
        """
        live = [row for row, s in enumerate(self.running) if s.stop_reason is None]
        if len(live) == len(self.running):
            return None
        moving = [row for row in live if row >= len(live)]
        sources = [row if row in live else moving.pop() for row in range(len(live))]
        self.running = [self.running[source] for source in sources]
        return sources
