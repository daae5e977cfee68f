"""Pretraining text: datasets of shards with a manifest, from the hub, this machine's documentation,
or files of your own.

`python -m zangchat.dataset --help` builds, fetches, checks and tokenizes them.
"""

from zangchat.dataset.find import find_dataset
from zangchat.dataset.manifest import (
    BUILD_PYDOCS,
    Dataset,
    datasets_dir,
    folder_lock,
    load_dataset,
    present_datasets,
    write_dataset,
)

__all__ = [
    "BUILD_PYDOCS",
    "Dataset",
    "datasets_dir",
    "find_dataset",
    "folder_lock",
    "load_dataset",
    "present_datasets",
    "write_dataset",
]
