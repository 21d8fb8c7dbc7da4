"""Adapters: low-rank terms beside the layers of a model, trained, read, written and merged.

result = optiq.lora.train("out", "data", "adapter")
model, tokenizer = optiq.load("out", adapter="adapter")
"""

from .adapter import Adapter, Base, write
from .merging import combined, merge
from .mounting import opened as read
from .training import Result, train

__all__ = ["Adapter", "Base", "Result", "combined", "merge", "read", "train", "write"]
