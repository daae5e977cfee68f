r"""Compare the tokenizer's speed and memory with other installed ones. Prints JSON.

    python -m dev.bench_tokenizer                                          20 MB of pydocs,
                                                                           vocabulary 32,768
    python -m dev.bench_tokenizer --data_path=base_data --megabytes=1000 --vocab_size=65536 \
        --tasks=train --only=zangchat
    python -m dev.bench_tokenizer --peers=rustbpe=FOLDER,gigatoken=FOLDER  packages that were
                                                                           installed with `pip
                                                                           install --target FOLDER`

Peers: rustbpe (PyPI's, in a separate folder because it shares our crate's name), tokenizers,
tiktoken, gigatoken. All train on the same text and encode it with the same vocabulary, ours, with
rustbpe's default pattern. Each repetition is a separate process, the peers take turns, and figures
are medians of --repeats. "core MB/s" is the core's own speed around a repetition: a virtual core
may share a physical one with another machine, and then the same work takes up to twice as long.
"fresh" is what users see: the text is new to an encoder that has encoded --other_megabytes of other
text of the same corpus. "cold" is the first time that a new encoder encodes the text, "warm" the
second. If the corpus is smaller than --megabytes, it is repeated from its beginning; the output
says how often, and how much other text there was. --tasks=fresh compares the encoders (of --only;
all must be installed) in one process that gives each of them the same 4 MB in turns, in processor
time: for small differences on a machine whose pace drifts. Trainers get an iterator over str in
memory, and are timed until they have trained, not until the tokens are Python objects;
"peak_MB_beyond_text" is their memory in addition to that text. A machine that is busy with other
work gives no result.
"""

import hashlib
import importlib.util
import itertools
import json
import operator
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dev.bench_common import BUSY, machine, taken_meanwhile
from zangchat import configurator

SEPARATOR = b"\0"  # between documents, for gigatoken's trainer


@dataclass
class Config:
    dataset: str | None = None  # the corpus; default: pydocs
    data_path: str | None = None  # a .parquet, .jsonl or .txt file, or a folder of them, instead
    megabytes: float = 20.0  # of text, from its beginning; a smaller corpus is repeated
    other_megabytes: float = 100.0  # of text after it, encoded before "fresh" is measured
    vocab_size: int = 32_768  # without special tokens
    threads: int = 0  # for all of them; 0: as many as there are cores
    peers: str = ""  # folders of packages that are not in this environment, name=FOLDER,...
    only: str = ""  # measure only these names, as in the output; default: all of them
    tasks: str = "train,encode,decode"  # or fresh
    repeats: int = 3
    busy: bool = False  # measure even if the machine is busy; the output records it
    worker: str = ""  # internal: the measurement of a repetition, as task:name
    folder: str = ""  # internal: the folder of its input


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> int:
    if config.worker:
        task, name = config.worker.split(":")
        texts = documents(Path(config.folder), config.megabytes)
        measure = {"train": train, "encode": encode, "decode": decode, "fresh": fresh}[task]
        before = core_speed()
        result = measure(name, texts, Path(config.folder), config.vocab_size)
        print(json.dumps({**result, "core MB/s": round((before + core_speed()) / 2, 1)}))
        return 0
    threads = config.threads or os.cpu_count() or 1
    where = machine(config.busy)
    with tempfile.TemporaryDirectory() as folder:
        facts = prepare(config, Path(folder))
        tasks = config.tasks.split(",")
        during, results = taken_meanwhile(
            lambda: {task: take_turns(config, task, Path(folder), threads) for task in tasks}
        )
    taken = max(where["busy_cores_before"], during)
    known = {
        "result": taken <= BUSY,
        "cores_taken_by_others": round(taken, 2),
        "threads": threads,
        "repeats": config.repeats,
    }
    print(json.dumps({"machine": where, **known, **facts, **results}, indent=1))
    return int(taken > BUSY and not config.busy)


# ---- input


def prepare(config: Config, folder: Path) -> dict[str, Any]:
    """Writes the text, and our vocabulary in the formats of the peers, for the workers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import rustbpe
    from zangchat.dataset import find_dataset
    from zangchat.hf.tokenizer import tokenizer_json
    from zangchat.tokenizer import RustBPETokenizer

    dataset = find_dataset(
        config.dataset or (None if config.data_path else "pydocs"), config.data_path
    )
    stream = iter(dataset.iter_documents("train"))
    corpus = list(until(config.megabytes, stream))
    other = list(until(config.other_megabytes, stream)) if config.tasks != "train" else []
    if not corpus:
        raise configurator.UserError(
            f"{dataset.name} has no text: name another --dataset or --data_path"
        )
    for name, part in (("text", corpus), ("other", other)):
        table = pa.table({"text": pa.array(part, pa.large_string())})
        pq.write_table(table, folder / f"{name}.parquet", compression="none")
    texts, distinct = documents(folder, config.megabytes), megabytes_of(corpus)
    if config.tasks != "train":
        tokenizer = RustBPETokenizer.train_from_iterator(
            corpus, config.vocab_size + 9, pattern=rustbpe.Tokenizer().get_pattern()
        )
        tokenizer.save(folder)
        (folder / "hf.json").write_text(
            json.dumps({**tokenizer_json(tokenizer), "added_tokens": [], "post_processor": None})
        )
    return {
        "text": dataset.name,
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "MB": round(megabytes_of(texts), 3),
        "times_that_the_corpus_is_read": round(megabytes_of(texts) / distinct, 3),
        "other_MB": round(megabytes_of(other), 3),
        "vocab_size": config.vocab_size,
        "versions": versions(folders_of(config)),
    }


def folders_of(config: Config) -> dict[str, str]:
    return dict(peer.split("=", 1) for peer in config.peers.split(",") if peer)


def versions(folders: dict[str, str]) -> dict[str, str]:
    from importlib import metadata

    installed = {
        name: metadata.version(name)
        for name in ("rustbpe", "tokenizers", "tiktoken", "numpy")
        if importlib.util.find_spec(name)
    }
    result = {
        "zangchat" if name == "rustbpe" else name: version for name, version in installed.items()
    }
    for name, folder in folders.items():
        for found in metadata.distributions(name=name, path=[folder]):
            result[name] = found.version
    return result


def until(megabytes: float, texts: Iterable[str]) -> Iterator[str]:
    """Texts, up to the one that reaches `megabytes` in total."""
    size = 0
    for text in texts:
        yield text
        size += len(text.encode("utf-8"))
        if size >= 1e6 * megabytes:
            break


def documents(folder: Path, megabytes: float) -> list[str]:
    """`megabytes` of text; a smaller corpus is repeated, as the same objects."""
    import pyarrow.parquet as pq

    corpus = pq.read_table(folder / "text.parquet")["text"].to_pylist()
    return list(until(megabytes, itertools.cycle(corpus)))


def other_documents(folder: Path) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(folder / "other.parquet")["text"].to_pylist()


def megabytes_of(texts: list[str]) -> float:
    return sum(len(text.encode("utf-8")) for text in texts) / 1e6


# ---- turns


def take_turns(config: Config, task: str, folder: Path, threads: int) -> dict[str, Any]:
    folders = folders_of(config)
    known: dict[str, dict[str, Any]] = {"train": TRAINERS, "decode": DECODERS}
    names = [n for n in known.get(task, ENCODERS) if n in (config.only or n).split(",")]
    if task == "fresh":
        names = ["+".join(names)]  # in one process
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for _ in range(config.repeats):
        for name, done in runs.items():
            packages = {each.split()[0] for each in name.split("+")}
            if "rustbpe" in packages - set(folders):
                failed[name] = "give --peers=rustbpe=FOLDER"
            if name not in failed:
                first = [folder for package, folder in folders.items() if package in packages]
                environment = {
                    **os.environ,
                    "RAYON_NUM_THREADS": str(threads),
                    "TOKENIZERS_PARALLELISM": "true",
                    "THREADS": str(threads),
                    "PYTHONPATH": os.pathsep.join([*first, os.environ.get("PYTHONPATH", "")]),
                }
                flags = [
                    f"--worker={task}:{name}",
                    f"--folder={folder}",
                    f"--vocab_size={config.vocab_size}",
                    f"--megabytes={config.megabytes}",
                ]
                finished = subprocess.run(
                    [sys.executable, "-m", "dev.bench_tokenizer", *flags],
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                if finished.returncode:
                    failed[name] = finished.stderr.strip().rsplit("\n", 1)[-1]
                else:
                    # tokenizers and others print, too
                    done.append(json.loads(finished.stdout.splitlines()[-1]))
    return {
        name: {"missing": failed[name]} if name in failed else summary(done)
        for name, done in runs.items()
    }


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians; of the speeds also all of them."""
    result = {}
    for key, first in done[0].items():
        values = [run[key] for run in done]
        result[key] = statistics.median(values) if isinstance(first, float) else first
        if key.endswith("MB/s"):
            result[f"all {key}"] = values
    return result


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def core_speed() -> float:
    """MB/s of SHA-256 in the nearest cache, in processor time: it depends only on the core."""
    page, started = bytes(4096), time.process_time()
    for _ in range(2000):
        hashlib.sha256(page)
    return 2000 * len(page) / 1e6 / (time.process_time() - started)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def forget_peak() -> float:
    """Reset the peak of `peak_megabytes` if the system allows it; return the peak from then on."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak_megabytes()


def peak_megabytes() -> float:
    """Peak since the program's start or the last reset; ru_maxrss would include the parent's
    memory.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return round(int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024, 1)


# ---- training: documents and the size -> a function that returns the bytes of the tokens

Trained = Callable[[], list[bytes]]


def train(name: str, texts: list[str], folder: Path, vocab_size: int) -> dict[str, Any]:
    importlib.import_module({"zangchat": "rustbpe"}.get(name, name))
    size, before = megabytes_of(texts), forget_peak()
    trained, seconds = timed(lambda: TRAINERS[name](iter(texts), vocab_size))
    peak, tokens = peak_megabytes(), trained()
    return {
        "MB/s": round(size / seconds, 2),
        "seconds": round(seconds, 3),
        "peak_MB": peak,
        "peak_MB_beyond_text": round(peak - before, 1),
        "tokens": len(tokens),
        "digest": digest(b"".join(len(token).to_bytes(4, "little") + token for token in tokens)),
    }


def train_rustbpe(texts: Iterator[str], vocab_size: int) -> Trained:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    # PyPI's asks the environment for threads.
    options: dict[str, Any] = (
        {"num_threads": int(os.environ["THREADS"])}
        if hasattr(rustbpe.Tokenizer, "from_ranks")
        else {}
    )
    tokenizer.train_from_iterator(texts, vocab_size, **options)
    return lambda: [
        bytes(token)
        for token, _ in sorted(tokenizer.get_mergeable_ranks(), key=lambda pair: pair[1])
    ]


def train_tokenizers(texts: Iterator[str], vocab_size: int) -> Trained:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    import rustbpe
    from zangchat.hf.tokenizer import byte_characters

    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(rustbpe.Tokenizer().get_pattern())
    pieces = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )

    def tokens() -> list[bytes]:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        return [bytes(byte_of[character] for character in token) for token, _ in by_id]

    return tokens


def train_gigatoken(texts: Iterator[str], vocab_size: int) -> Trained:
    import gigatoken

    vocabulary, _ = gigatoken.train_bpe(
        SEPARATOR.join(text.encode() for text in texts), vocab_size, [], separator=SEPARATOR
    )
    return lambda: [vocabulary[i] for i in sorted(vocabulary)]


TRAINERS: dict[str, Callable[[Iterator[str], int], Trained]] = {
    "zangchat": train_rustbpe,
    "rustbpe": train_rustbpe,
    "tokenizers": train_tokenizers,
    "gigatoken": train_gigatoken,
}


# ---- encoding


def encode(name: str, texts: list[str], folder: Path, vocab_size: int) -> dict[str, Any]:
    size, threads = megabytes_of(texts), int(os.environ["THREADS"])
    work, flatten = ENCODERS[name](folder, threads)
    _, cold = timed(lambda: work(texts))
    _, warm = timed(lambda: work(texts))
    work, flatten = ENCODERS[name](folder, threads)  # one that has not seen the text
    other = other_documents(folder)
    work(other)
    result, seconds = timed(lambda: work(texts))
    ids = flatten(result)
    return {
        "fresh MB/s" if other else "cold again MB/s": round(size / seconds, 2),
        "warm MB/s": round(size / warm, 2),
        "cold MB/s": round(size / cold, 2),
        "peak_MB": peak_megabytes(),
        "bytes_per_token": round(1e6 * size / len(ids), 4),
        "digest": digest(ids.tobytes()),
    }


def fresh(names: str, texts: list[str], folder: Path, vocab_size: int) -> dict[str, Any]:
    """Medians over all parts: the speed of each, and the first one's over each other one's."""
    threads = int(os.environ["THREADS"])
    work = {name: ENCODERS[name](folder, threads)[0] for name in names.split("+")}
    other, left = other_documents(folder), iter(texts)
    for encode_all in work.values():
        encode_all(other)
    speeds: dict[str, list[float]] = {name: [] for name in work}
    while part := list(until(4, left)):
        for name in random.sample(list(work), len(work)):
            started = time.process_time()
            result = work[name](part)
            speeds[name].append(megabytes_of(part) / (time.process_time() - started))
            del result  # not while the next one is timed
    first = names.split("+")[0]
    medians = {f"{name} MB/s": statistics.median(found) for name, found in speeds.items()}
    ratios = {
        f"{first} / {name}": statistics.median(map(operator.truediv, speeds[first], speeds[name]))
        for name in work
        if name != first
    }
    return {**medians, **ratios, "parts": len(speeds[first])}


# (folder, threads) -> (encode documents, flatten the result to all ids)
Encode = tuple[Callable[[list[str]], Any], Callable[[Any], np.ndarray]]


def flat(lists: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.array(ids, dtype=np.uint32) for ids in lists])


def ours(folder: Path) -> Any:
    from zangchat.tokenizer import RustBPETokenizer

    return RustBPETokenizer.from_directory(folder)


def encode_zangchat(folder: Path, threads: int) -> Encode:
    tokenizer = ours(folder)
    return lambda texts: tokenizer.encode_documents(
        texts, num_threads=threads
    ), lambda result: result[0]


def encode_zangchat_list(folder: Path, threads: int) -> Encode:
    tokenizer = ours(folder)
    return lambda texts: tokenizer.encode(texts, num_threads=threads), flat


def encode_tiktoken(folder: Path, threads: int) -> Encode:
    encoding = ours(folder).enc
    return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads), flat


def encode_tokenizers(folder: Path, threads: int) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "hf.json"))
    return lambda texts: tokenizer.encode_batch_fast(texts), lambda result: flat(
        [encoding.ids for encoding in result]
    )


# gigatoken supports only a few patterns. This one differs from ours in runs of white space, and so
# in a few ids and in the digest.
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gigatoken_of(folder: Path) -> Any:
    import gigatoken

    tokenizer = json.loads((folder / "hf.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA_PATTERN
    return gigatoken.Tokenizer.from_json(json.dumps(tokenizer))


def encode_gigatoken(folder: Path, threads: int) -> Encode:
    import awkward

    tokenizer = gigatoken_of(folder)
    return lambda texts: tokenizer.encode_batch(texts), lambda result: awkward.to_numpy(
        awkward.flatten(result)
    ).astype(np.uint32)


def encode_gigatoken_list(folder: Path, threads: int) -> Encode:
    tokenizer = gigatoken_of(folder)
    return lambda texts: tokenizer.encode_batch_list(texts), flat


ENCODERS: dict[str, Callable[[Path, int], Encode]] = {
    "zangchat": encode_zangchat,
    "zangchat list": encode_zangchat_list,
    "tiktoken list": encode_tiktoken,
    "tokenizers list": encode_tokenizers,
    "gigatoken": encode_gigatoken,
    "gigatoken list": encode_gigatoken_list,
}


# ---- decoding


def decode(name: str, texts: list[str], folder: Path, vocab_size: int) -> dict[str, Any]:
    ids, offsets = ours(folder).encode_documents(texts)
    work = DECODERS[name](folder, int(os.environ["THREADS"]))
    result, seconds = timed(work(ids, offsets))
    data = b"".join(text.encode() if isinstance(text, str) else text for text in result)
    return {"MB/s": round(len(data) / 1e6 / seconds, 2), "digest": digest(data)}


# (folder, threads) -> (ids, offsets) -> a function that decodes them
Decode = Callable[[np.ndarray, np.ndarray], Callable[[], Any]]


def lists(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [document.tolist() for document in np.split(ids, offsets[1:-1])]


def decode_zangchat(folder: Path, threads: int) -> Decode:
    import rustbpe

    tokenizer = rustbpe.Tokenizer.from_ranks(list(ours(folder).enc._mergeable_ranks.items()))
    return lambda ids, offsets: (
        lambda: [tokenizer.decode_documents(ids, offsets, num_threads=threads)[0]]
    )


def decode_tiktoken(folder: Path, threads: int) -> Decode:
    encoding = ours(folder).enc

    def prepared(ids: np.ndarray, offsets: np.ndarray) -> Callable[[], Any]:
        documents = lists(ids, offsets)
        return lambda: encoding.decode_bytes_batch(documents, num_threads=threads)

    return prepared


def decode_tokenizers(folder: Path, threads: int) -> Decode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "hf.json"))

    def prepared(ids: np.ndarray, offsets: np.ndarray) -> Callable[[], Any]:
        documents = lists(ids, offsets)
        return lambda: tokenizer.decode_batch(documents, skip_special_tokens=False)

    return prepared


DECODERS: dict[str, Callable[[Path, int], Decode]] = {
    "zangchat": decode_zangchat,
    "tiktoken list": decode_tiktoken,
    "tokenizers list": decode_tokenizers,
}


if __name__ == "__main__":
    sys.exit(main())
