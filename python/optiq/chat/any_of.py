"""One pattern for many texts: tokenizers have thousands of special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """What finds the longest of these texts that stands at a place."""
    return _compiled(tuple(sorted(texts)))


@lru_cache(maxsize=32)
def _compiled(texts: tuple[str, ...]) -> re.Pattern[str]:
    tree: dict[str, Any] = {}
    for text in filter(None, texts):
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}  # a text ends here
    return re.compile(_pattern(tree) or "(?!)")


def _pattern(tree: dict[str, Any]) -> str:
    """What matches the texts of a tree, in which a beginning that they share stands once."""
    branches = [re.escape(c) + _pattern(node) for c, node in tree.items() if c]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{joined})?" if "" in tree else joined
