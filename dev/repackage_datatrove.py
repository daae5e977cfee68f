r"""Run dev/repackage_data_reference.py on many processes or machines, by datatrove (pip install -e
'.[datatrove]').

    python -m dev.repackage_datatrove --data_path=corpus/ --name=mine --num_shards=400 --tasks=64 \
        --workers=16
    python -m dev.repackage_datatrove ... --slurm_partition=cpu --slurm_time=12:00:00

Both passes are datatrove pipelines. In the first, each of --tasks tasks deals the documents of its
share of the files to --num_shards buckets. In the second, each bucket becomes a shard, so it must
fit into the memory of one task (use about one shard per 250 million characters). The last step
writes the manifest. Finished tasks are not repeated: after a failure, run the same command again.
On Slurm, run the command on the head node, with a folder that all nodes see; the Slurm executor is
untried.
"""

import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader, ParquetReader

from dev.repackage_data_reference import bucket_files, gather, scatter, write_shards
from zangchat import configurator
from zangchat.dataset import datasets_dir
from zangchat.dataset.manifest import FORMAT, write_manifest
from zangchat.errors import UserError
from zangchat.runtime.logs import print0

READERS = {".parquet": ParquetReader, ".jsonl": JsonlReader}


@dataclass
class Config:
    data_path: str
    """a folder (or fsspec address, e.g. hf://datasets/OWNER/NAME) of .parquet or .jsonl files
    with `text`
    """
    name: str  # the dataset to make, in <base>/base_data
    format: str = ".parquet"  # .parquet | .jsonl: the files of the folder to read
    num_shards: int = 64
    """buckets of the shuffle: training shards, and the last is the validation shard"""
    tasks: int = 8  # shares of the work in each pass
    workers: int = 4  # concurrent tasks on this machine
    memory: float = 4.0  # GB for the texts of one task
    seed: int = 1337
    slurm_partition: str = ""  # run the tasks on this partition instead of here
    slurm_time: str = "12:00:00"  # time limit of a task on Slurm


class Scatter(PipelineStep):
    """Deals this task's documents to the buckets."""

    name, type = "scatter", "shuffle"

    def __init__(self, buckets: Path, num_shards: int, seed: int) -> None:
        super().__init__()
        self.buckets, self.num_shards, self.seed = buckets, num_shards, seed

    def run(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterable[Any]:
        texts = (document.text.encode("utf-8", "replace") for document in data if document.text)
        scatter(texts, self.buckets, self.seed, part=rank, buckets=self.num_shards)
        yield from ()


class Gather(PipelineStep):
    """Shuffles each of this task's buckets into a shard, and writes its manifest entry next to
    it.
    """

    name, type = "gather", "shuffle"

    def __init__(
        self, buckets: Path, folder: Path, num_shards: int, memory: int, seed: int
    ) -> None:
        super().__init__()
        self.buckets, self.folder, self.num_shards, self.memory, self.seed = (
            buckets,
            folder,
            num_shards,
            memory,
            seed,
        )

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterable[Any]:
        for number in range(rank, self.num_shards, world_size):
            files = bucket_files(self.buckets)[number]
            split = "validation" if number == self.num_shards - 1 else "train"
            entries = write_shards(
                gather([files], self.memory, self.seed, number),
                self.folder,
                split,
                sys.maxsize,
                first=number,
            )
            (self.folder / f"{number:05d}.json").write_text(json.dumps(entries), encoding="utf-8")
        yield from ()


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, repackage, argv)


def repackage(config: Config) -> int:
    if config.format not in READERS or config.num_shards < 2:
        raise UserError(
            f"--format={config.format} must be one of {', '.join(READERS)}, and "
            f"--num_shards={config.num_shards} at least 2"
        )
    configurator.check_folder_name("--name", config.name)
    folder = datasets_dir() / config.name
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --name, or delete it")
    building = folder.with_name(f".{config.name}.building")
    building.mkdir(parents=True, exist_ok=True)
    buckets, logs = building / "buckets", building / "logs"
    read = READERS[config.format](config.data_path, glob_pattern=f"*{config.format}")
    first = executor(
        config, [read, Scatter(buckets, config.num_shards, config.seed)], logs / "scatter"
    )
    second = executor(
        config,
        [Gather(buckets, building, config.num_shards, round(config.memory * 1e9), config.seed)],
        logs / "gather",
        depends=first,
    )
    second.run()
    if config.slurm_partition:
        here = configurator.as_flags(dataclasses.replace(config, slurm_partition=""))
        last = shlex.join(["python", "-m", "dev.repackage_datatrove", *here])
        print0(f"submitted; when both jobs are done: {last}")
        return 0
    parts = sorted(building.glob("[0-9]*.json"))
    shards = [entry for part in parts for entry in json.loads(part.read_text(encoding="utf-8"))]
    for leftover in (*parts, buckets, logs):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    write_manifest(
        building, {"format": FORMAT, "name": config.name, "source": "repackaged", "shards": shards}
    )
    building.rename(folder)
    print0(f"{folder}: {len(shards)} shards; train on them with --dataset={config.name}")
    return 0


def executor(config: Config, pipeline: list[Any], logs: Path, depends: Any = None) -> Any:
    common: dict[str, Any] = {
        "pipeline": pipeline,
        "tasks": config.tasks,
        "logging_dir": str(logs),
        "depends": depends,
    }
    if not config.slurm_partition:
        return LocalPipelineExecutor(workers=config.workers, **common)
    slurm = {
        "time": config.slurm_time,
        "partition": config.slurm_partition,
        "mem_per_cpu_gb": round(2 * config.memory) + 1,
    }
    return SlurmPipelineExecutor(job_name=logs.name, **slurm, **common)


if __name__ == "__main__":
    sys.exit(main())
