"""Who may reach a server, from the operator's flags: host names, origins, path, key. No torch."""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from zangchat.errors import UserError
from zangchat.runtime.files import expand_home

LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
EVERY_ADDRESS = ("0.0.0.0", "::", "")
KEY_VARIABLE = "ZANGCHAT_API_KEY"


class Flags(Protocol):
    """The flags of scripts.chat_web that are read here."""

    host: str
    api_key: str | None
    api_key_file: str | None
    allowed_hosts: str
    allowed_origins: str
    root_path: str


def api_key(flags: Flags) -> str | None:
    """The key that is required of clients, from its flag, its file or the environment."""
    # an empty one is a variable that was not set, and no wish for an open server
    if flags.api_key is not None and flags.api_key_file is not None:
        raise UserError("--api_key and --api_key_file are both given: leave one of them out")
    if flags.api_key_file is not None:
        source, text = f"--api_key_file={flags.api_key_file}", _text_of(flags.api_key_file)
    elif flags.api_key is not None:
        source, text = "--api_key", flags.api_key
    else:
        source, text = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "")
        if not text:
            return None
    key = text.strip()  # headers arrive without the newline that `echo` writes
    if not key:
        raise UserError(f"{source} is empty: write the key into it")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{source} has a character that is not printable ASCII: choose another key")
    return key


def _text_of(file: str) -> str:
    try:
        return expand_home(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"--api_key_file={file} cannot be read ({reason})"
        raise UserError(f"{message}: name a text file that holds the key") from None


def hosts(flags: Flags) -> frozenset[str] | None:
    """The accepted Host headers, without ports; None: any."""
    names = frozenset(map(host_name, _listed(flags.allowed_hosts)))
    for name in sorted(names):
        if "/" in name:
            message = f"--allowed_hosts={flags.allowed_hosts} has {name!r}, which is no host name"
            raise UserError(f"{message}: leave out https:// and the path")
    if "*" in names or (flags.host in EVERY_ADDRESS and not names):
        return None
    host = flags.host.lower()
    own = () if host in EVERY_ADDRESS else (host, f"[{host}]")
    return frozenset({*LOCAL_HOSTS, *own, *names})


def origins(flags: Flags) -> frozenset[str]:
    """The origins of other sites' pages that are accepted."""
    found = frozenset(origin.rstrip("/").lower() for origin in _listed(flags.allowed_origins))
    for origin in sorted(found - {"*", "null"}):
        if not re.fullmatch(r"[a-z][a-z0-9.+-]*://[^/]+", origin):
            message = f"--allowed_origins={flags.allowed_origins} has {origin!r}"
            raise UserError(f"{message}, which is no origin: write https://chat.example.com")
    return found


def root_path(flags: Flags) -> str:
    path = flags.root_path.rstrip("/")
    if path and not path.startswith("/"):
        raise UserError(f"--root_path={flags.root_path} must begin with /: write /{path}")
    return path


def warnings(flags: Flags) -> Iterator[str]:
    """The dangers of these flags."""
    host, any_name = flags.host.lower(), hosts(flags) is None
    is_local = host == "localhost" or host == "::1" or host.startswith("127.")
    if any_name:
        yield (
            f"--host={flags.host} accepts every host name, so a page of another site can reach "
            "this server by a name of its own (DNS rebinding): name yours by --allowed_hosts"
        )
    if not api_key(flags) and (any_name or not is_local or flags.allowed_origins):
        yield f"anyone who reaches this server may use it: set a key by {KEY_VARIABLE}"


def host_name(host: str) -> str:
    """A Host header, or the address in an origin, without its port."""
    return re.sub(r":\d*$", "", host).lower()


def is_among(name: str, patterns: Iterable[str]) -> bool:
    """Whether a host name is one of these; *.example.com stands for all below example.com."""
    return any(
        name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern
        for pattern in patterns
    )


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
