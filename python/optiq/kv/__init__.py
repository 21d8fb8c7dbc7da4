"""KV caches in few bits, with own formats for K and V of each layer.

config = kv.KVConfig.uniform(kv.entries(model), "8/4")
cache = kv.make_cache(model, config)          # in place of mlx-lm's make_prompt_cache(model)
model = kv.attach(model, config)              # or once for all that asks the model for caches
"""

from .config import Entry, KVConfig
from .model import attach, entries, identity, make_cache
from .routing import route

__all__ = ["Entry", "KVConfig", "attach", "entries", "identity", "make_cache", "route"]
