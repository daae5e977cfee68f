"""Write the report of a run, or start a new one.

python -m zangchat.report generate
python -m zangchat.report reset
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from zangchat import configurator
from zangchat.report import get_report


@dataclass
class Config:
    """The report: `generate` writes <base>/report/report.md and .html, `reset` starts a new one."""

    command: Annotated[Literal["generate", "reset"], tyro.conf.Positional] = "generate"
    dollars_per_hour: float = 0.0  # price of the machine; above 0 the report says what the run cost


def report(config: Config) -> int:
    if config.command == "reset":
        get_report().reset()
        return 0
    path = get_report().generate(config.dollars_per_hour)
    print(f"report: {path} and {path.with_suffix('.html')}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, report, argv)


if __name__ == "__main__":
    sys.exit(main())
