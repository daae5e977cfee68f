"""The helpers that scripts outside this project import by this name; they live in
zangchat/runtime.
"""

from zangchat.runtime.devices import autodetect_device_type, compute_init
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

__all__ = [
    "ColoredFormatter",
    "DummyWandb",
    "autodetect_device_type",
    "compute_cleanup",
    "compute_init",
    "download_file_with_lock",
    "get_base_dir",
    "get_dist_info",
    "is_ddp",
    "print0",
    "print_banner",
    "setup_default_logging",
]
