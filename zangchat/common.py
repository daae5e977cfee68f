"""The helpers that scripts outside this project import by this name; they live in
zangchat/runtime.
"""

from typing import Any

from zangchat.runtime.downloads import download_file_with_lock
from zangchat.runtime.files import get_base_dir
from zangchat.runtime.logs import (
    ColoredFormatter,
    DummyWandb,
    print0,
    print_banner,
    setup_default_logging,
)
from zangchat.runtime.processes import compute_cleanup, get_dist_info, is_ddp

NEED_TORCH = ("autodetect_device_type", "compute_init")  # imported when they are asked for
__all__ = [
    "ColoredFormatter",
    "DummyWandb",
    "compute_cleanup",
    "download_file_with_lock",
    "get_base_dir",
    "get_dist_info",
    "is_ddp",
    "print0",
    "print_banner",
    "setup_default_logging",
]


def __getattr__(name: str) -> Any:
    if name not in NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zangchat.runtime import devices

    return getattr(devices, name)
