"""Inference: one engine for the terminal chat, the web server, evaluation and RL."""

from zangchat.engine.batch import RunningBatch
from zangchat.engine.engine import Engine, engine_for_chat, load_for_chat
from zangchat.engine.kv_cache import KVCache
from zangchat.engine.sampling import Request
from zangchat.engine.scoring import score
from zangchat.engine.sequence import Event, Sequence
from zangchat.engine.tools import use_calculator

__all__ = [
    "Engine",
    "Event",
    "KVCache",
    "Request",
    "RunningBatch",
    "Sequence",
    "engine_for_chat",
    "load_for_chat",
    "score",
    "use_calculator",
]
