"""Build, fetch, check or tokenize the text of pretraining.

    python -m zangchat.dataset --source=pydocs             a corpus of this machine's documentation
    python -m zangchat.dataset -n 8                        8 shards of climbmix, and its validation
    python -m zangchat.dataset --source=fineweb-edu -n 8
    python -m zangchat.dataset verify [--dataset=NAME] [--repair]
    python -m zangchat.dataset tokenize [--dataset=NAME]   token ids, as the dataset NAME-tokens

Files of your own need no command: every command that reads text takes --data_path.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from zangchat import configurator
from zangchat.dataset import pydocs, tokens
from zangchat.dataset.find import find_dataset
from zangchat.dataset.manifest import (
    BUILD_PYDOCS,
    DEFAULT,
    HUB_REPOS,
    MANIFEST,
    TOKENS_SUFFIX,
    check_shard,
    datasets_dir,
    folder_lock,
    load_dataset,
)
from zangchat.errors import UserError
from zangchat.runtime.logs import print0
from zangchat.tokenizer import get_tokenizer


def tokenize(config: "TokenizeConfig") -> int:
    dataset = find_dataset(config.dataset, config.data_path, config.skip_bad_rows)
    dataset.count_left_out()
    if dataset.tokenizer_fingerprint is not None:
        raise UserError(
            f"--dataset={dataset.name} holds token ids already: give {dataset.text_flag}"
        )
    folder = datasets_dir() / f"{dataset.name}{TOKENS_SUFFIX}"
    train = shlex.quote(f"--dataset={folder.name}")
    with folder_lock(folder):
        tokenizer = get_tokenizer()
        if (folder / MANIFEST).exists() and not config.overwrite:
            made = load_dataset(folder)
            if made.manifest.get("text", {}).get("fingerprint") != dataset.fingerprint:
                raise UserError(f"{folder} has the ids of other text: --overwrite replaces them")
            if made.tokenizer_fingerprint != tokenizer.fingerprint:
                other = "has the ids of another tokenizer"
                raise UserError(f"{folder} {other}: --overwrite makes it again")
            raise UserError(
                f"{folder} is there already: train with {train}, or give --overwrite to make it "
                "again"
            )
        num_threads = config.num_threads or os.cpu_count() or 1
        made = tokens.tokenize(dataset, tokenizer, folder, num_threads)
    count = sum(entry.get("tokens", 0) for entry in made.manifest["shards"])
    print0(f"{folder}: {count:,} tokens; train on them with {train}")
    return 0


def verify(config: "VerifyConfig") -> int:
    dataset = find_dataset(config.dataset)
    bad = {}
    for entry in dataset.manifest["shards"]:
        problem = check_shard(dataset.folder / entry["name"], entry)
        print0(f"{entry['name']}  {entry['split']:<10}  {problem or 'ok'}")
        if problem:
            bad[entry["name"]] = problem
    if not bad:
        print0(
            f"{dataset.name}: {len(dataset.manifest['shards'])} shards are what the manifest says "
            f"(fingerprint {dataset.fingerprint})"
        )
        return 0
    if config.repair and (dataset.manifest["source"] == "pydocs" or "repo" in dataset.manifest):
        if dataset.manifest["source"] == "pydocs":
            return build(Config(source="pydocs", overwrite=True))
        from zangchat.dataset import hub

        hub.fetch_missing(dataset, bad)
        return 0
    worst = ", ".join(f"{name} ({problem})" for name, problem in bad.items())
    raise UserError(f"{dataset.folder}: {worst}: {dataset.repair_hint()}")


@dataclass
class Config:
    source: str = ""  # pydocs | climbmix | fineweb-edu | tinystories; default with -n: climbmix
    num_shards: Annotated[
        int, tyro.conf.arg(aliases=["-n"])
    ] = -1  # training shards to fetch from the hub; -1 = all of them
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4  # downloads at a time
    overwrite: bool = False  # pydocs: build it again although it is there


@dataclass
class VerifyConfig:
    dataset: str | None = None  # which dataset; default: the only one present
    repair: bool = False
    """fetch or build missing and damaged shards again, if they are the hub's or pydocs"""


@dataclass
class TokenizeConfig:
    dataset: str | None = None  # whose text; default: the only one present
    data_path: str | None = None  # a .parquet, .jsonl or .txt file, or a folder of them, instead
    skip_bad_rows: bool = False  # leave out rows of own files that cannot be read, and count them
    num_threads: int = 0  # 0 = one per core
    overwrite: bool = False  # make it again although it is there


def build(config: Config) -> int:
    if not config.source and config.num_shards < 0:
        raise UserError(
            f"--source is missing: `{BUILD_PYDOCS}` needs no download, `python -m zangchat.dataset "
            "-n 8` fetches text from the hub"
        )
    source = config.source or DEFAULT
    if source == "pydocs":
        return pydocs.build(datasets_dir() / "pydocs", overwrite=config.overwrite)
    if source not in HUB_REPOS:
        raise UserError(
            f"--source={source} is unknown: choose one of pydocs, {', '.join(HUB_REPOS)}"
        )
    if config.num_shards == 0 or config.num_shards < -1 or config.num_workers < 1:
        raise UserError(
            f"-n {config.num_shards} -w {config.num_workers}: both must be at least 1 (-n -1 "
            "fetches all shards)"
        )
    from zangchat.dataset import hub

    hub.download(source, config.num_shards, num_workers=config.num_workers)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["verify"]:
        return configurator.run(VerifyConfig, verify, arguments[1:])
    if arguments[:1] == ["tokenize"]:
        return configurator.run(TokenizeConfig, tokenize, arguments[1:])
    return configurator.run(Config, build, arguments)


if __name__ == "__main__":
    sys.exit(main())
