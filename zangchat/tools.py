"""The calculator under the name that nanochat's users know; it lives in engine/tools.py."""

from zangchat.engine.tools import use_calculator

__all__ = ["use_calculator"]
