"""What each idea of the crate brings: the crate as it is beside builds that leave one idea out.

    python -m dev.bench_ablation --file=TEXT                          all ideas
    python -m dev.bench_ablation --file=TEXT --ideas=cache,window     only these

TEXT holds documents separated by NUL, 120 MB or more for figures that mean something: the first
--megabytes are counted, trained on and encoded, the rest is the other text that is encoded before
"fresh" is measured (rustbpe/examples/speed.rs). One thread, processor time, medians of --repeats,
the builds in turns. Prints JSON: MB/s of the crate, of `plain`, and for each idea the gain in
percent that the crate has over the build without it.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zangchat import configurator

ROOT = Path(__file__).parents[1]
CRATE = ROOT / "rustbpe"


@dataclass
class Config:
    file: str = ""  # documents separated by NUL
    megabytes: int = 20  # of it to measure, from its beginning
    vocab_size: int = 32_768
    ideas: str = ""  # default: all that the sources name
    repeats: int = 3
    target: str = "rustbpe/target/ablation"  # a folder for the builds
    plain: bool = True  # also the functions of plain, which take minutes


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> int:
    if not Path(config.file).is_file():
        raise configurator.UserError("--file: name a file of documents separated by NUL")
    ideas = config.ideas.split(",") if config.ideas else ideas_in_sources()
    programs = {idea: build(idea, ROOT / config.target) for idea in ["", *ideas]}
    runs: dict[str, list[dict[str, float]]] = {idea: [] for idea in programs}
    for _ in range(config.repeats):
        for idea, program in programs.items():
            runs[idea].append(run(program, config))
    medians = {idea: medians_of(done) for idea, done in runs.items()}
    ours = medians.pop("")
    gains = {
        idea: {key: round(100 * (ours[key] / speed - 1), 1) for key, speed in speeds.items()}
        for idea, speeds in medians.items()
    }
    plain = run(programs[""], config, "plain") if config.plain else None
    print(json.dumps({"MB/s": ours, "plain MB/s": plain, "gain in %": gains}, indent=1))
    return 0


def ideas_in_sources() -> list[str]:
    sources = "".join(
        path.read_text(encoding="utf-8") for path in sorted(CRATE.rglob("src/**/*.rs"))
    )
    return list(dict.fromkeys(re.findall(r'without\("([\w ]+)"\)', sources)))


def build(idea: str, target: Path) -> Path:
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target)}
    environment |= {"WITHOUT": idea} if idea else {}
    command = ["cargo", "build", "--release", "--quiet", "--locked", "--example", "speed"]
    subprocess.run(command, cwd=CRATE, env=environment, check=True)
    return Path(shutil.copy(target / "release/examples/speed", target / f"speed without {idea}"))


def run(program: Path, config: Config, *options: str) -> dict[str, float]:
    arguments = [config.file, str(config.megabytes), str(config.vocab_size), *options]
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    speeds: dict[str, float] = json.loads(done.stdout)
    return speeds


def medians_of(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


if __name__ == "__main__":
    sys.exit(main())
