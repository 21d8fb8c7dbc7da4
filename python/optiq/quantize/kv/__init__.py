"""Formats for the keys and values of a model's caches: the job of `optiq kv`."""
