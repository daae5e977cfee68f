"""Compare bits per byte with nanochat, after the same tokens and after the same minutes. JSON.

    python -m dev.bench_quality --data=FOLDER --seeds=3 --peer=PATH,PATH      FOLDER holds parquet
                                                                              shards, each PATH a
                                                                              nanochat checkout

Each side is trained by its own scripts.base_train, in turns, with its own settings. All share the
text, the tokenizer (a peer trains it with its script and ours takes it over; the peers' tokenizers
are checked to be equal), depth, width, context, and, without --our_batch and --our_steps, the
tokens per step and the steps. A checkpoint is kept every `--every` steps; ours has as many. One
evaluator scores all of them on the same validation rows. Seconds run from the launch of a command
until a checkpoint's weights are on disk, so compiling and saving count. (An older nanochat also
writes a few samples before its last checkpoint, which takes some seconds.)

Finished runs are not trained again: after an interruption the command resumes.
"""

import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.bench_common import environment, machine
from zangchat import checkpoint_manager, configurator
from zangchat.dataset import find_dataset
from zangchat.hf.nanochat import read_tokenizer
from zangchat.runtime.devices import compute_init
from zangchat.runtime.files import get_base_dir

OURS = "zangchat"
SEEDED = """
import runpy, sys, torch
seed, plain = int(sys.argv.pop(1)), torch.manual_seed
torch.manual_seed = lambda _: plain(seed)  # nanochat has no flag for it
runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)
"""


@dataclass
class Config:
    data: str = ""
    """a folder of parquet shards with a column `text`; the last one is for validation"""
    peer: str = ""  # folders of nanochat checkouts, separated by commas
    out: str = ""  # folder for the runs; default <base>/bench_quality
    seeds: int = 3  # runs of each, with seeds 1, 2, ...
    depth: int = 4
    vocab_size: int = 8192
    tokenizer_chars: int = 150_000_000
    max_seq_len: int = 512
    total_batch_size: int = 16384  # tokens per step
    device_batch_size: int = 8
    steps: int = 150
    every: int = 50  # steps between checkpoints
    eval_tokens: int = 131072  # targets to score
    our_batch: int = 0  # tokens per step of ours; 0 = as the peers
    our_steps: int = 0  # steps of ours; 0 = the same tokens in total
    flags: str = ""  # further flags for our training, "--matrix_lr=0.01 --seed=3"
    busy: bool = False  # measure even if the machine is busy: bits per byte count, seconds do not
    score: str = ""  # internal: the folder of checkpoints to score, as JSON
    code: str = ""  # internal: the checkout of those checkpoints


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> int:
    if config.score:
        print(json.dumps(score(config, Path(config.score))))
        return 0
    check(config)
    where = machine(config.busy)
    out = Path(config.out or get_base_dir() / "bench_quality").absolute()
    contenders = {
        OURS: "",
        **{Path(peer).name: str(Path(peer).absolute()) for peer in config.peer.split(",") if peer},
    }
    make_tokenizers(config, {out / name: code for name, code in contenders.items()})
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in contenders}
    for seed in range(1, config.seeds + 1):
        for name, code in contenders.items():
            runs[name].append(curve(config, out / name, code, seed))
            print(f"{name}, seed {seed}: {runs[name][-1]}", file=sys.stderr, flush=True)
    print(
        json.dumps(
            {"settings": configurator.to_dict(config), "machine": where, **summary(runs)}, indent=1
        )
    )
    return 0


def check(config: Config) -> None:
    if not config.data or not any(Path(config.data).glob("*.parquet")):
        raise configurator.UserError(
            f"--data={config.data} holds no .parquet file: name a folder of shards with a column "
            "`text`"
        )
    for peer in filter(None, config.peer.split(",")):
        if not (Path(peer) / "nanochat" / "gpt.py").is_file():
            raise configurator.UserError(
                f"--peer={peer} is no checkout of nanochat: it has no nanochat/gpt.py"
            )
    if config.steps % config.every:
        raise configurator.UserError(
            f"--steps={config.steps} is not a multiple of --every={config.every}: change one of "
            "them"
        )
    if config.our_batch < 0 or config.our_batch and config.total_batch_size % config.our_batch:
        raise configurator.UserError(
            f"--our_batch={config.our_batch} does not divide "
            f"--total_batch_size={config.total_batch_size}"
        )
    if config.our_steps < 0 or config.our_steps % (config.steps // config.every):
        raise configurator.UserError(
            f"--our_steps={config.our_steps} does not divide into {config.steps // config.every} "
            "checkpoints"
        )


def summary(runs: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Medians over seeds for each side, and our time to reach each peer's final score."""
    result: dict[str, Any] = {}
    for name, seeds in runs.items():
        middle = [
            {key: statistics.median(point[key] for point in points) for key in points[0]}
            for points in zip(*seeds, strict=True)
        ]
        result[name] = {"median": middle, "seeds": seeds}
    for name, found in result.items():
        if name != OURS:
            end = found["median"][-1]
            found["ours_reached_its_end_after"] = seconds_to(result[OURS]["median"], end["bpb"])
            found["its_seconds"] = end["seconds"]
    return result


def seconds_to(points: Sequence[dict[str, float]], bpb: float) -> float | None:
    """Seconds until the curve, linear between its points, first reaches `bpb`; None if it never
    does.
    """
    before = None
    for point in points:
        if point["bpb"] <= bpb:
            if before is None:
                return point["seconds"]
            share = (before["bpb"] - bpb) / (before["bpb"] - point["bpb"])
            return round(before["seconds"] + share * (point["seconds"] - before["seconds"]), 1)
        before = point
    return None


# ---- training ------------------------------------------------------------------------------------


def make_tokenizers(config: Config, bases: dict[Path, str]) -> None:
    """Put the peers' tokenizer into every base folder.

    We do not train ours: each script cuts its last document by its own rule, so it would differ.
    """
    settings = {"max_chars": config.tokenizer_chars, "vocab_size": config.vocab_size}
    pickles = []
    for base, code in bases.items():
        if not code:
            continue
        pickles.append(base / "tokenizer" / "tokenizer.pkl")
        base.mkdir(parents=True, exist_ok=True)
        for name in ("base_data", "base_data_climbmix"):  # of the older and the newer nanochat
            if not (base / name).exists():
                (base / name).symlink_to(Path(config.data).absolute())
        if not pickles[-1].is_file():
            command = [
                sys.executable,
                "-m",
                "scripts.tok_train",
                *spelled(settings, code, "tok_train"),
            ]
            launch(command, base, code, base / "tokenizer.log")
    ours = next(base for base, code in bases.items() if not code)
    tokenizers = [read_tokenizer(path) for path in pickles]
    if len({tokenizer.fingerprint for tokenizer in tokenizers}) > 1:
        raise configurator.UserError(
            f"the peers' tokenizers differ, so nothing can be compared: see {ours.parent}"
        )
    if tokenizers:
        tokenizers[0].save(ours / "tokenizer")
    else:
        command = [
            sys.executable,
            "-m",
            "scripts.tok_train",
            f"--data_path={config.data}",
            *spelled(settings),
        ]
        launch(command, ours, "", ours / "tokenizer.log")


def curve(config: Config, base: Path, code: str, seed: int) -> list[dict[str, Any]]:
    """Steps, tokens, seconds and bits per byte of the checkpoints of one run; train it if
    missing.
    """
    tag = f"seed{seed}"
    folder, done = base / "base_checkpoints" / tag, base / f"{tag}.json"
    batch, steps = config.total_batch_size, config.steps
    if not code:
        batch = config.our_batch or batch
        steps = config.our_steps or steps * config.total_batch_size // batch
    if not done.is_file():
        settings = {
            "depth": config.depth,
            "max_seq_len": config.max_seq_len,
            "device_batch_size": config.device_batch_size,
            "total_batch_size": batch,
            "num_iterations": steps,
            "save_every": steps * config.every // config.steps,
            "model_tag": tag,
            "core_metric_every": -1,
        }
        if code:
            # it validates at its end in any case, on this little
            rows = config.device_batch_size * config.max_seq_len
            settings |= {"eval_every": 10**9, "sample_every": 10**9, "eval_tokens": rows}
            command = [
                sys.executable,
                "-c",
                SEEDED,
                str(seed),
                *spelled(settings, code, "base_train"),
            ]
        else:
            settings |= {
                "eval_every": -1,
                "sample_every": -1,
                "seed": seed,
                "keep_last": config.steps // config.every,
                "overwrite": 1,
            }
            command = [
                sys.executable,
                "-m",
                "scripts.base_train",
                f"--data_path={config.data}",
                *spelled(settings),
                *config.flags.split(),
            ]
        start = time.time()
        launch(command, base, code, base / f"{tag}.log")
        seconds = {
            step: round(path.stat().st_mtime - start, 1)
            for step, path in checkpoints(folder).items()
        }
        done.write_text(json.dumps(seconds), encoding="utf-8")
    seconds = {
        int(step): value for step, value in json.loads(done.read_text(encoding="utf-8")).items()
    }
    scores = scored(config, folder, code)
    return [
        {"step": step, "tokens": step * batch, "seconds": seconds[step], "bpb": scores[step]}
        for step in sorted(seconds)
    ]


def spelled(settings: dict[str, Any], code: str = "", script: str = "") -> list[str]:
    """Command-line flags, spelled with hyphens if the script of the nanochat checkout does so."""
    text = (Path(code) / "scripts" / f"{script}.py").read_text(encoding="utf-8") if code else ""
    hyphens = {
        name: name.replace("_", "-")
        for name in settings
        if re.search(rf"""["']--{name.replace("_", "-")}["']""", text)
    }
    return [f"--{hyphens.get(name, name)}={value}" for name, value in settings.items()]


def launch(command: Sequence[str], base: Path, code: str, log: Path) -> str:
    """Run a command in the checkout `code` (empty: ours) with `base` for its files; return its
    output.
    """
    base.mkdir(parents=True, exist_ok=True)
    root = code or str(Path(__file__).parents[1])
    bases = {"NANOCHAT_BASE_DIR": str(base)} if code else {"ZANGCHAT_BASE_DIR": str(base)}
    own = {
        **environment("peer" if code else OURS),
        **bases,
        "PYTHONPATH": root,
        "WANDB_MODE": "disabled",
        "PYTHONUTF8": "1",
    }
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command,
            cwd=root,
            env=own,
            stdout=subprocess.PIPE,
            stderr=file,
            encoding="utf-8",
        )
        file.write(done.stdout)
    if done.returncode:
        raise configurator.UserError(
            f"{' '.join(command[1:4])} ... failed with code {done.returncode}: see {log}"
        )
    return done.stdout


def checkpoints(folder: Path) -> dict[int, Path]:
    """step -> weights"""
    found = {
        re.fullmatch(r"model_(\d+)\.pt", path.name): path for path in folder.glob("model_*.pt")
    }
    return {
        int(match[1]): path
        for match, path in sorted(found.items(), key=lambda item: item[1])
        if match
    }


# ---- scoring -------------------------------------------------------------------------------------


def scored(config: Config, folder: Path, code: str) -> dict[int, float]:
    """Score in a separate process: two checkouts both define a package `nanochat`."""
    ours = folder.parents[1].parent / OURS
    flags = {
        "data": config.data,
        "max_seq_len": config.max_seq_len,
        "device_batch_size": config.device_batch_size,
        "code": code,
    }
    flags |= {"eval_tokens": config.eval_tokens, "score": str(folder)}
    printed = launch(
        [sys.executable, "-m", "dev.bench_quality", *spelled(flags)], ours, "", folder / "score.log"
    )
    return {int(step): bpb for step, bpb in json.loads(printed.splitlines()[-1]).items()}


def score(config: Config, folder: Path) -> dict[int, float]:
    """Bits per byte of every checkpoint in the folder."""
    import torch

    from zangchat.dataloader import validation_batches
    from zangchat.loss_eval import evaluate_bpb
    from zangchat.tokenizer import get_token_bytes, get_tokenizer

    device = compute_init("")[-1]
    tokenizer, dataset = get_tokenizer(), find_dataset(data_path=config.data)
    found = {}
    for step, path in checkpoints(folder).items():
        batches = validation_batches(
            dataset,
            tokenizer,
            config.max_seq_len,
            eval_tokens=config.eval_tokens,
            rows_per_batch=config.device_batch_size,
        )
        model: Any = (
            peer_model(config.code, path, device)
            if config.code
            else checkpoint_manager.build_model(folder, step, device, "eval")[0]
        )
        with torch.inference_mode():
            found[step] = round(evaluate_bpb(model, batches, get_token_bytes()), 4)
        if not math.isfinite(found[step]):
            raise configurator.UserError(f"{path} has no finite score: {found[step]}")
    return found


def peer_model(code: str, path: Path, device: Any) -> Any:
    """A nanochat model with the interface that evaluate_bpb needs."""
    sys.path.insert(0, code)
    with contextlib.redirect_stdout(sys.stderr):
        from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]
    meta = json.loads(
        (path.parent / path.name.replace("model_", "meta_"))
        .with_suffix(".json")
        .read_text(encoding="utf-8")
    )
    model = GPT(GPTConfig(**meta["model_config"])).to(device)
    model.init_weights()  # its rotary tables are not part of a checkpoint
    weights = checkpoint_manager.strip_prefix(checkpoint_manager.read_tensors(path, device))
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()

    class Scored:
        def get_device(self) -> Any:
            return device

        def __call__(self, inputs: Any, targets: Any, loss_reduction: str) -> Any:
            return model(inputs, targets, loss_reduction=loss_reduction).view(targets.shape)

    return Scored()


if __name__ == "__main__":
    sys.exit(main())
