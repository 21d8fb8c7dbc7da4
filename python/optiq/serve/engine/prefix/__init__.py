"""What has been read once is not read again: the caches of prompts and answers, by their tokens."""

from .cache import PrefixCache

__all__ = ["PrefixCache"]
