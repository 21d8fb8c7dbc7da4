"""OpenAI's protocol: chat completions, completions, models; and vLLM's for adapters."""

from .adapters import load, unload
from .chat import chat
from .completions import complete
from .dialect import DIALECT

__all__ = ["DIALECT", "chat", "complete", "load", "unload"]
