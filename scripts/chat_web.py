"""Serve the chat page and an OpenAI-compatible API.

    python -m scripts.chat_web                      # then open http://127.0.0.1:8000
    python -m scripts.chat_web --demo               # with the model in dev/demo
    python -m scripts.chat_web -i base --port=8080
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1        # for OpenAI's clients

Only this machine can reach it by default; --host=0.0.0.0 admits others. Other programs, proxies:
dev/docs/en/clients.md
"""

import errno
import gc
import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from zangchat import configurator
from zangchat.config import ChatConfig, check_demo
from zangchat.errors import UserError
from zangchat.server import exposure

if TYPE_CHECKING:
    from zangchat.engine import Engine
    from zangchat.server.protocol import Settings

logger = logging.getLogger(__name__)


@dataclass
class Config(ChatConfig):
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in; then set --api_key
    port: Annotated[int, tyro.conf.arg(aliases=["-p"])] = 8000  # 0 = any free one
    # this and the next three are defaults for requests without a value of their own
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.8  # 0 = the likeliest token
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50  # 0 = off
    top_p: float = 1.0  # draw among the likeliest tokens with this total probability; 1 = off
    max_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512  # longest reply
    num_gpus: int = 1  # one engine on each
    max_batch: int = 64  # replies written at the same time, per device
    queue: int = 64  # requests that may wait; more are answered 429
    request_timeout: float = 300.0  # seconds for one reply, waiting for a free row included
    truncate: bool = False  # drop the oldest turns of a chat that does not fit, else refuse it
    api_key: str | None = None  # required of every client; ZANGCHAT_API_KEY is hidden from `ps`
    api_key_file: str | None = None  # a file with the key
    allowed_hosts: str = ""  # more names of this server: chat.example.com,*.lan; * is any
    allowed_origins: str = ""  # sites whose pages may use the API: https://a.example,...; * is any
    root_path: str = ""  # /path of this server, if the proxy in front does not remove it


def serve(config: Config) -> None:
    settings = make_settings(config)
    with listen(config) as listener:
        engines = load_engines(config)

        from zangchat.server.app import create_app
        from zangchat.server.connections import http_server

        print(f"chat at {address_of(listener)} (Ctrl-C stops it)", flush=True)
        for warning in exposure.warnings(config):
            logger.warning(warning)
        app = create_app(engines, settings)
        gc.freeze()  # else each collection walks through torch's objects, for a tenth of a second
        http_server(app).run(sockets=[listener])


def make_settings(config: Config) -> "Settings":
    configurator.check_sampling(config)
    check_demo(config)
    configurator.check_range(0, config, "queue")
    configurator.check_range(1, config, "num_gpus", "max_batch")
    configurator.check_range(0, config, "port", most=65535)

    configurator.check_range(1, config, "request_timeout")
    access: dict[str, Any] = {
        "api_key": exposure.api_key(config),
        "hosts": exposure.hosts(config),
        "origins": exposure.origins(config),
        "root_path": exposure.root_path(config),
    }

    from zangchat.server.protocol import Settings

    return Settings(
        model_name=f"zangchat-{config.source}",
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        max_batch=config.max_batch,
        queue=config.queue,
        request_seconds=config.request_timeout,
        truncate=config.truncate,
        **access,
    )


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    more = "" if local == host else " and this machine's other addresses"
    return f"http://{f'[{local}]' if ':' in local else local}:{port}{more}"


def listen(config: Config) -> socket.socket:
    """Bind the port before a model is loaded, so that a mistake shows at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    both = config.host == "::" and socket.has_dualstack_ipv6()  # :: is all addresses, IPv4 too
    try:
        return socket.create_server(
            (config.host, config.port), family=family, backlog=512, dualstack_ipv6=both
        )
    except OSError as error:
        address, reason = f"--host={config.host} --port={config.port}", error.strerror or error
        remedy = "choose another --port"
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            remedy = "--host takes an address of this machine, such as 127.0.0.1 or ::1"
        raise UserError(f"{address} cannot be listened on ({reason}): {remedy}") from None


def load_engines(config: Config) -> "list[Engine]":
    import torch

    from zangchat.hf.demo import open_engine
    from zangchat.runtime.devices import check_kernels, compute_init

    if config.num_gpus == 1:
        return [open_engine(config)]
    first = compute_init(config.device_type)[-1]
    present = torch.cuda.device_count() if first.type == "cuda" else 0
    if config.num_gpus > present:
        found = f"{present} CUDA devices are present here"
        raise UserError(f"--num_gpus={config.num_gpus}, but {found}: lower it, or leave it out")
    devices = [torch.device("cuda", i) for i in range(config.num_gpus)]
    for device in devices:
        check_kernels(device)
    return [open_engine(config, device) for device in devices]


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
