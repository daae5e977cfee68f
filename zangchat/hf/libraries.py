"""Optional libraries: whether they are installed, found out without importing them."""

from importlib.metadata import version
from importlib.util import find_spec

from zangchat.errors import UserError


def require_libraries(*names: str) -> None:
    """Raises UserError, with the command that installs them, if one is missing.

    transformers, which is slow to import, must also be version 5 or later.
    """
    missing = [name for name in names if find_spec(name) is None]
    if not missing and "transformers" in names and int(version("transformers").split(".")[0]) < 5:
        missing = ["transformers"]
    if missing:
        wanted = " ".join("transformers>=5" if name == "transformers" else name for name in names)
        listed = " and ".join(missing)
        raise UserError(f"{listed} needed for this format: run `pip install {wanted!r}`")
