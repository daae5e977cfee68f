"""Serve the chat page and an OpenAI-compatible API.

    python -m scripts.chat_web                      # then open http://127.0.0.1:8000
    python -m scripts.chat_web -i base --port=8080
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1        # for OpenAI's clients

Only this machine can reach it unless --host says otherwise.
"""

import gc
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from zangchat import configurator
from zangchat.config import CheckpointConfig
from zangchat.errors import UserError

if TYPE_CHECKING:
    from zangchat.engine import Engine
    from zangchat.server.protocol import Settings


@dataclass
class Config(CheckpointConfig):
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in; then set --api_key
    port: Annotated[int, tyro.conf.arg(aliases=["-p"])] = 8000  # 0 = any free one
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.8  # where a request names none, as the next three
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50  # 0 = off
    top_p: float = 1.0  # draw among the likeliest tokens that reach this probability together; 1 = off
    max_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512  # longest reply
    num_gpus: int = 1  # one engine on each
    max_batch: int = 64  # replies written at the same time, per device
    queue: int = 64  # requests that may wait; more are answered 429
    api_key: str | None = None  # asked of every client, as a bearer token
    quantize: str = ""  # int8: weights in a quarter of fp32's bytes; fp16: half of them, for x86 CPUs; empty = as they are


def serve(config: Config) -> None:
    settings = make_settings(config)
    with listen(config) as listener:
        engines = load_engines(config)

        from zangchat.server.app import create_app
        from zangchat.server.http import http_server

        host, port = listener.getsockname()[:2]
        print(f"chat at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops it)", flush=True)
        app = create_app(engines, settings)
        gc.freeze()  # looking again and again through all that torch consists of would stop the server for a tenth of a second
        http_server(app).run(sockets=[listener])


def make_settings(config: Config) -> "Settings":
    configurator.check_sampling(config)
    configurator.check_range(0, config, "queue")
    configurator.check_range(1, config, "max_tokens", "num_gpus", "max_batch")
    configurator.check_range(0, config, "port", most=65535)

    from zangchat.server.protocol import LOCAL_HOSTS, Settings

    anywhere = config.host in ("0.0.0.0", "::", "")
    return Settings(
        model_name=f"zangchat-{config.source}",
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        max_batch=config.max_batch,
        queue=config.queue,
        api_key=config.api_key or None,
        hosts=None if anywhere else frozenset({*LOCAL_HOSTS, config.host.lower(), f"[{config.host.lower()}]"}),
    )


def listen(config: Config) -> socket.socket:
    """Take the port before a model is loaded, so that a mistake shows at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=512)
    except OSError as error:
        raise UserError(
            f"--host={config.host} --port={config.port} cannot be listened on ({error.strerror or error}): choose another --port"
        ) from None


def load_engines(config: Config) -> "list[Engine]":
    import torch

    from zangchat.engine import engine_for_chat
    from zangchat.runtime.devices import autodetect_device_type

    if config.num_gpus == 1:
        return [engine_for_chat(config)]
    device_type = config.device_type or autodetect_device_type()
    present = torch.cuda.device_count() if device_type == "cuda" else 0
    if config.num_gpus > present:
        raise UserError(f"--num_gpus={config.num_gpus}, but {present} CUDA devices are present here: lower it, or leave it out")
    return [engine_for_chat(config, torch.device("cuda", i)) for i in range(config.num_gpus)]


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
