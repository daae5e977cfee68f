"""Decoding by CUDA graphs, emulated on a CPU; and the devices that streams, events, graphs and
pinned buffers are made on.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.common import Task, chat
from tests.emulated_graphs import Captures, emulated_graphs
from tests.simulated_gpu import simulated_gpu
from tests.util import ByteTokenizer, lively_model
from zangchat.config import ARCHITECTURES, GPTConfig
from zangchat.engine import Engine, Request, RunningBatch, cuda, runner
from zangchat.engine.model import InferenceGPT
from zangchat.engine.sequence import Sequence
from zangchat.gpt import GPT
from zangchat.server.pool import Worker
from zangchat.training.rollout import Sampling, rollout_batches

TOKENIZER = ByteTokenizer()
VOCAB = TOKENIZER.get_vocab_size()


@pytest.fixture(scope="module", params=["nanochat", "modern"])
def model(request: pytest.FixtureRequest) -> GPT:
    more = ARCHITECTURES[request.param]
    return lively_model(VOCAB, sequence_len=200, n_layer=2, n_embd=32, seed=1, **more).eval()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[Captures]:
    monkeypatch.setattr(cuda, "POSITIONS", 16)  # lengths of many size classes in a short context
    with emulated_graphs() as captures:
        yield captures


def prompt(number: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def run(batch: RunningBatch, requests: list[Request], gap: int = 0) -> list[Sequence]:
    """Submit a request every `gap` steps, and step until all have ended."""
    sequences = []
    for request in requests:
        sequences.append(batch.submit(request))
        for _ in range(gap):
            batch.step()
    while batch.busy:
        batch.step()
    return sequences


def assert_plain(model: GPT, sequences: list[Sequence]) -> None:
    """Their log-probabilities are those of the plain forward pass over their tokens."""
    for sequence in sequences:
        result = sequence.result()
        ended = [] if result.stop_token is None else [result.stop_token]
        whole = [*sequence.request.tokens, *result.tokens, *ended]
        with torch.no_grad():
            logprobs = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
        start = len(sequence.request.tokens) - 1
        expected = [float(logprobs[i, whole[i + 1]]) for i in range(start, len(whole) - 1)]
        assert [lp.value for lp in result.logprobs] == pytest.approx(expected, abs=2e-3)
        if sequence.request.temperature == 0:  # each token was the best, or as good
            assert all(
                logprobs[i].max() - logprobs[i, whole[i + 1]] < 1e-4
                for i in range(start, len(whole) - 1)
            )


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("gap", [0, 3])
def test_graphs_give_the_plain_models_logprobs_in_any_company(
    model: GPT, captures: Captures, gap: int, ahead: bool
) -> None:
    requests = [
        Request(
            prompt(i, 3 + 17 * (i % 7)),
            5 + 9 * i % 40,
            temperature=i % 2,
            seed=i,
            logprobs=1,
            prompt_logprobs=i % 5 == 0,
        )
        for i in range(14)
    ]
    batch = RunningBatch(InferenceGPT(model), TOKENIZER, 5, prefill_tokens=20, ahead=ahead)
    assert_plain(model, run(batch, requests, gap))
    assert captures.number > 8


def test_a_prompt_that_is_being_read_is_not_overwritten(model: GPT, captures: Captures) -> None:
    """Three short rows run in a graph of four. Its last row holds a long prompt, read in chunks."""
    short = [Request(prompt(i, 4), 60, temperature=0, logprobs=0) for i in range(3)]
    long = Request(prompt(9, 150), 10, temperature=0, logprobs=0, prompt_logprobs=True)
    batch = RunningBatch(InferenceGPT(model), TOKENIZER, 4, prefill_tokens=20)
    running = [batch.submit(request) for request in short]
    batch.step()
    last = batch.submit(long)
    together = 0
    while last not in batch.scheduler.running:
        batch.step()
        together += len(batch.scheduler.running) == 3
    assert together > 4
    run(batch, [])
    assert_plain(model, [*running, last])


def test_freed_rows_have_no_tokens(model: GPT, captures: Captures) -> None:
    """A row that has ended at the context's limit has no place for one more token."""
    batch = RunningBatch(InferenceGPT(model), TOKENIZER, 4)
    full = [Request(prompt(1, 199), temperature=0), Request(prompt(2, 200), 0, logprobs=0)]
    full[1] = Request(prompt(2, 200), 0, logprobs=0, prompt_logprobs=True)
    others = [Request(prompt(i, 9), 30, temperature=0, logprobs=0) for i in range(3, 5)]
    sequences = run(batch, [*full, *others])
    assert_plain(model, sequences[2:])
    batch.step()
    assert batch.runner.cache.lengths == [0] * batch.runner.cache.num_rows


# ---- captured once -------------------------------------------------------------------------------


def test_graphs_serve_all_calls_of_an_engine(model: GPT, captures: Captures) -> None:
    engine = Engine(model, TOKENIZER)
    requests = [Request(prompt(i, 5 + i), 20, temperature=0) for i in range(6)]
    first = engine.generate_many(requests, max_rows=3)
    # rows 4, 2, 1 and lengths up to 16, 32, 48
    assert 0 < captures.number <= 9
    before = captures.number
    again = engine.generate_many(requests, max_rows=3)
    assert [s.tokens for s in again] == [s.tokens for s in first]
    assert captures.number == before
    for turn in range(1, 4):  # a chat: each prompt longer than the one before
        list(engine.generate(prompt(0, 12 * turn), max_tokens=8, temperature=0))
    assert captures.number <= 9
    assert captures.modes == {"thread_local"}


def test_a_cache_that_moves_gets_new_graphs(model: GPT, captures: Captures) -> None:
    engine, numbers = Engine(model, TOKENIZER), itertools.count()
    for rows, length in (
        (1, 10),
        (6, 150),
        (1, 10),
    ):  # never a prompt of before, which old memory has
        requests = [
            Request(prompt(next(numbers), length), 20, temperature=0, logprobs=0)
            for _ in range(rows)
        ]
        with engine.running_batch() as batch:
            assert_plain(model, run(batch, requests))


def test_no_two_engines_capture_on_one_stream(
    model: GPT, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch hands out a few streams in turn, and the end of a graph frees what its stream has."""
    streams = itertools.cycle([torch.cuda.Stream() for _ in range(3)])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(streams))
    monkeypatch.setattr(cuda, "_unused", {})
    lasting = Engine(model, TOKENIZER)
    lasting.generate_many([Request([1, 2], 3)])
    graphs = lasting._idle[0].graphs
    assert graphs is not None and graphs.graphs
    for _ in range(5):  # as the evaluations of a run
        passing = Engine(model, TOKENIZER)
        passing.generate_many([Request([1, 2], 3)])
        other = passing._idle[0].graphs
        assert other is not None and other.stream is not graphs.stream


def test_a_failed_capture_ends_the_graphs_of_its_stream(
    model: GPT, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own end frees the memory that they use."""
    engine = Engine(model, TOKENIZER)
    engine.generate_many([Request(prompt(0, 5), 3)])
    graphs = engine._idle[0].graphs
    assert graphs is not None and graphs.graphs

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "graph", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate_many([Request(prompt(0, 50), 3)])
    assert not graphs.graphs
    requests = [Request(prompt(i, 5), 20, temperature=0, logprobs=0) for i in range(3)]
    assert_plain(model, engine.generate_many(requests))


def test_calls_that_overlap_have_their_own_cache(model: GPT, captures: Captures) -> None:
    engine = Engine(model, TOKENIZER)
    alone = [list(engine.generate(prompt(i, 9), max_tokens=12, temperature=0)) for i in range(2)]
    both = [engine.generate(prompt(i, 9), max_tokens=12, temperature=0) for i in range(2)]
    steps = list(itertools.zip_longest(*both))
    assert [[step[i] for step in steps if step[i] is not None] for i in range(2)] == alone
    next(stopped := engine.generate(prompt(0, 9), max_tokens=12, temperature=0))
    stopped.close()  # type: ignore[attr-defined]
    before = captures.number
    assert list(engine.generate(prompt(1, 9), max_tokens=12, temperature=0)) == alone[1]
    assert captures.number == before


class Echo(Task):
    rewarded = True

    def num_examples(self) -> int:
        return 8

    def get_example(self, index: int) -> Any:
        return chat("q" * (index + 1), "a")

    def reward(self, conversation: Any, completion: Any) -> float:
        return float(len(completion))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_steps_of_rl_share_graphs_and_follow_the_weights(
    captures: Captures, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the engine has a cast copy of the fp32 masters; in fp32 a part of the weights is
    shared with the model.
    """
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)  # plain tensors
    monkeypatch.setattr(cuda, "POSITIONS", 64)
    fp32 = lively_model(VOCAB, sequence_len=64, n_layer=1, n_embd=16, seed=7)
    model = GPT(fp32.config, dtype)
    model.load_state_dict(fp32.state_dict())
    sampling = Sampling(num_samples=4, max_new_tokens=6, top_k=None)

    def steps(cursor: dict[str, Any] | None = None) -> Iterator[Any]:
        return rollout_batches(
            model, TOKENIZER, Echo(), examples_per_step=2, sampling=sampling, seed=3, cursor=cursor
        )

    stream, numbers, old = steps(), [], None
    for step in range(4):
        batch = next(stream)
        numbers.append(captures.number)
        fresh = next(steps({"step": step}))  # an engine of this moment's weights
        assert torch.equal(batch.inputs, fresh.inputs)
        old = batch
        captures.number = numbers[-1]
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    assert old is not None and len(set(numbers)) == 1 and numbers[0] > 0


def test_int8_weights_are_refreshed_in_their_memory(model: GPT) -> None:
    other = GPT(model.config).eval()
    for parameter in other.parameters():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    mine, idx = InferenceGPT(model, "int8"), torch.tensor([prompt(1, 20)])
    memory = mine.layers[0].up.weight.data_ptr()
    mine.refresh(other)
    assert mine.layers[0].up.weight.data_ptr() == memory
    with torch.inference_mode():
        assert torch.equal(mine(idx), InferenceGPT(other, "int8")(idx))


# ---- several GPUs --------------------------------------------------------------------------------


def test_workers_of_several_gpus_capture_one_after_the_other(model: GPT) -> None:
    with emulated_graphs(pause=0.05) as captures:
        engines = [Engine(model, TOKENIZER) for _ in range(3)]
        threads = [
            threading.Thread(target=engine.generate_many, args=([Request([1, 2], 3)],))
            for engine in engines
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert captures.number >= 3 and captures.most_at_once == 1


class Made:
    """Stand-ins for torch.cuda that note on which GPU each thing is made or used."""

    def __init__(self) -> None:
        self.current = torch.device("cuda", 0)  # as in a new thread
        self.devices: list[tuple[str, torch.device]] = []

    def note(self, kind: str, device: Any = None) -> None:
        self.devices.append((kind, torch.device(device or self.current)))

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def stand_ins(self) -> dict[str, Any]:
        made = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.device = torch.device(device or made.current)
                made.note("stream", self.device)

            def wait_stream(self, other: "Stream") -> None:
                made.note("waiting stream", other.device)

        class Event:
            def record(self, stream: Any = None) -> None:
                made.note("event", stream.device if stream else None)

            def synchronize(self) -> None: ...

        class Graph:
            def __init__(self) -> None:
                made.note("graph")

            def replay(self) -> None:
                made.note("replay")

        @contextlib.contextmanager
        def capture(graph: Any, pool: Any, stream: Stream, mode: str) -> Iterator[None]:
            made.note("capture", stream.device)
            made.note("capture")
            yield

        return {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "device": made.device,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": Stream,
            "graph_pool_handle": object,
        }


def test_everything_is_made_on_the_models_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated second GPU, from a thread whose current device is the first."""
    gpu, made = torch.device("cuda", 1), Made()
    for name, stand_in in made.stand_ins().items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def pinned(make: Any, *args: Any, pin_memory: bool = False, **more: Any) -> Tensor:
        if pin_memory:
            made.note("pinned buffer")
        return make(*args, **more)

    monkeypatch.setattr(runner, "free_memory", lambda device: 2**30)
    monkeypatch.setattr(runner.Draw, "accept", lambda draw: draw.arrived.synchronize() or [])
    config = GPTConfig(
        sequence_len=256, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=128
    )
    with simulated_gpu():
        with gpu:
            gpt = GPT(config, torch.bfloat16)
        for name in ("tensor", "empty"):
            monkeypatch.setattr(torch, name, functools.partial(pinned, getattr(torch, name)))
        batch = RunningBatch(InferenceGPT(gpt), TOKENIZER, 2)
        for length in (5, 9):
            batch.submit(Request([1] * length, 9, temperature=1.0, logprobs=1))
        for _ in range(3):
            batch.step()
    kinds = {kind for kind, _ in made.devices}
    assert kinds == {
        *("stream", "waiting stream", "event", "graph", "replay", "capture", "pinned buffer")
    }
    assert [pair for pair in made.devices if pair[1] != gpu] == []
    assert batch.runner.prompt_multiple == 64


def test_a_workers_thread_sets_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        busy = False

    class Elsewhere:
        def get_device(self) -> torch.device:
            return torch.device("cuda", 1)

    seen: list[tuple[torch.device, str]] = []
    monkeypatch.setattr(Worker, "_new_batch", lambda worker: Idle())
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: seen.append((d, threading.current_thread().name))
    )
    engine = Engine(Elsewhere(), TOKENIZER)  # type: ignore[arg-type]
    worker = Worker(engine, 3, 1)
    worker.start()
    worker.stop()
    worker.join(timeout=10)
    assert seen == [(torch.device("cuda", 1), "engine-3")]
