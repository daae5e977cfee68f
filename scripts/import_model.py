r"""Take over a model: a Hugging Face directory of this architecture, or a checkpoint of nanochat.

    python -m scripts.import_model --path=d20-sft --source=sft --model_tag=d20
    python -m scripts.import_model --path=~/.cache/nanochat --source=base --from_tag=d20 \
        --model_tag=d20

Afterwards it is a checkpoint like any other: chat with it, evaluate it, finetune it, export it. No
code of it is run.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zangchat import configurator
from zangchat.runtime.files import expand_home
from zangchat.runtime.logs import print0


@dataclass
class Config:
    path: Path
    """the directory; of nanochat its base directory, a model's folder in it, or one with
    model_*.pt, meta_*.json and tokenizer.pkl
    """
    source: str
    """base | mid | sft | rl: the stage that the model has gone through; of nanochat the one
    to take
    """
    model_tag: str  # the name that it gets here
    from_tag: str | None = None
    """the name that it has there, where nanochat's base directory holds several"""
    step: int | None = None  # of nanochat's checkpoints; default: the last
    overwrite: bool = False  # replace the checkpoints that model_tag has


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, import_model, argv)


def import_model(config: Config) -> int:
    from zangchat import checkpoint_manager
    from zangchat.hf import importing, nanochat

    # a mistake in these shows before anything large is read
    checkpoint_manager.tag_folder(config.source, config.model_tag)
    path = expand_home(config.path)
    if not path.is_dir():
        raise configurator.UserError(
            f"--path={path} is no folder: give the one that holds the model"
        )
    is_hf = (path / "config.json").is_file()
    imported = (
        importing.read_hf(path)
        if is_hf
        else nanochat.read_checkpoint(path, config.source, config.from_tag, config.step)
    )
    folder = importing.save(imported, config.source, config.model_tag, config.overwrite)
    print0(f"{imported.origin}, step {imported.step}, is now {folder}")
    if config.source != "base":
        print0(f"talk to it: python -m scripts.chat_cli -i {config.source} -g {config.model_tag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
