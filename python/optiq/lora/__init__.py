"""Adapters: low-rank terms beside the layers of a model, trained, read, written and merged.

result = optiq.lora.train("out", "data", "adapter")
"""

from .adapter import Adapter, Base, read, write
from .training import Result, train

__all__ = ["Adapter", "Base", "Result", "read", "train", "write"]
