"""Inference: one engine for the terminal chat, the web server, evaluation and RL."""

from zangchat.engine.batch import Engine, Event, Generation, Request, Result, RunningBatch, engine_for_chat, load_for_chat
from zangchat.engine.kv_cache import KVCache
from zangchat.engine.tools import use_calculator

__all__ = [
    "Engine",
    "Event",
    "Generation",
    "KVCache",
    "Request",
    "Result",
    "RunningBatch",
    "engine_for_chat",
    "load_for_chat",
    "use_calculator",
]
