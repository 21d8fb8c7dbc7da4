from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.servers import Asked, scripted, tiny_tokenizer


@pytest.fixture(scope="session")
def server() -> Iterator[Asked]:
    with scripted(aliases=("claude-*", "gpt-*"), ping_seconds=0.2) as asked:
        yield asked


@pytest.fixture(scope="session")
def thinker() -> Iterator[Asked]:
    """Of a model that reasons."""
    with scripted(tiny_tokenizer(thinking=True)) as asked:
        yield asked


@pytest.fixture(scope="session")
def keyed() -> Iterator[Asked]:
    """One that asks for a key."""
    with scripted(api_keys=("a-good-key", "another-key")) as asked:
        yield asked
