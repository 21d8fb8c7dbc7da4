from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.servers import Asked, doubled, scripted, tiny_tokenizer

NAMES = ("claude-*", "gpt-*")


@pytest.fixture(scope="session")
def server() -> Iterator[Asked]:
    """The engine, with a model that follows the script."""
    with scripted(aliases=NAMES, ping_seconds=0.2) as asked:
        yield asked


@pytest.fixture(scope="session")
def thinker() -> Iterator[Asked]:
    """Of a model that reasons."""
    with scripted(tiny_tokenizer(thinking=True)) as asked:
        yield asked


@pytest.fixture(scope="session")
def double() -> Iterator[Asked]:
    """The double of the engine, for what the engine does not do when it is told to."""
    with doubled(aliases=NAMES, ping_seconds=0.2) as asked:
        yield asked


@pytest.fixture(scope="session")
def keyed() -> Iterator[Asked]:
    """One that asks for a key."""
    with doubled(api_keys=("a-good-key", "another-key")) as asked:
        yield asked
