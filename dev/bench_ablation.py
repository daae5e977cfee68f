"""What each idea of the crate brings: the crate as it is, and without one idea after the other.

    python -m dev.bench_ablation --file=TEXT                          all ideas
    python -m dev.bench_ablation --file=TEXT --ideas=Cache,Window     only these

TEXT holds documents separated by NUL, 120 MB or more for figures that mean something: the first
--megabytes are counted, trained on and encoded, the rest is the other text that is encoded before
"fresh" is measured (rustbpe/examples/speed.rs). One thread, processor time, medians of --repeats,
in turns. Prints JSON: MB/s of the crate, of `plain`, and for each idea the gain in percent that the
crate has over itself without it. Every loop has a branch more than in the crate that users have.
"""

import json
import os
import re
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
    plain: bool = True  # also the functions of plain, which take minutes


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> int:
    if not Path(config.file).is_file():
        raise configurator.UserError("--file: name a file of documents separated by NUL")
    program = build()
    ideas = config.ideas.split(",") if config.ideas else ideas_in_sources()
    runs: dict[str, list[dict[str, float]]] = {idea: [] for idea in ["", *ideas]}
    for _ in range(config.repeats):
        for idea, done in runs.items():
            done.append(run(program, config, *([idea] if idea else [])))
    medians = {idea: medians_of(done) for idea, done in runs.items()}
    ours = medians.pop("")
    gains = {
        idea: {key: round(100 * (ours[key] / speed - 1), 1) for key, speed in speeds.items()}
        for idea, speeds in medians.items()
    }
    plain = run(program, config, "plain") if config.plain else None
    print(json.dumps({"MB/s": ours, "plain MB/s": plain, "gain in %": gains}, indent=1))
    return 0


def ideas_in_sources() -> list[str]:
    source = (CRATE / "src/fast/ablation.rs").read_text(encoding="utf-8")
    return re.findall(r"^    (\w+),$", source.split("pub enum Idea {")[1].split("}")[0], re.M)


def build() -> Path:
    command = ["cargo", "build", "--release", "--quiet", "--locked", "--example", "speed"]
    subprocess.run([*command, "--features", "ablation"], cwd=CRATE, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR") or CRATE / "target")
    return target / "release/examples/speed"


def run(program: Path, config: Config, *options: str) -> dict[str, float]:
    arguments = [config.file, str(config.megabytes), str(config.vocab_size), *options]
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    speeds: dict[str, float] = json.loads(done.stdout)
    return speeds


def medians_of(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


if __name__ == "__main__":
    sys.exit(main())
