"""What the engine is asked, and what it answers: plain values, without MLX and without HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    A temperature of 0 is greedy. `top_k` of 0, `top_p` of 1 and `min_p` of 0 leave all words in.
    `repetition_penalty` counts prompt and answer, `presence_penalty` and `frequency_penalty` the
    answer alone. `logit_bias` is added to the logits of the tokens that it names. Equal requests
    with the same `seed` have the same answer; None draws another one each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


class Guide(Protocol):
    """Decides which tokens may come next in one answer: a grammar, a budget of reasoning.

    A guide belongs to one answer. Whatever it raises ends that answer alone.
    """

    def allow(self, words: npt.NDArray[np.uint32]) -> bool:
        """Set the bits of the tokens that may come next.

        `words` is `[ceil(vocabulary / 32)]`, all bits clear; token t is bit t % 32 of word t // 32.
        False says that any token may come, and leaves `words` as they are.
        """
        ...

    def accept(self, token: int) -> None:
        """Note the token that was drawn."""
        ...

    @property
    def done(self) -> bool:
        """Whether the answer is complete, and no token may follow."""
        ...


@dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    `tokens` is the prompt. `boundaries` are lengths of it at which a message ends: there the prefix
    cache keeps a snapshot. `stop` are texts that end the answer; they are not part of it. With
    `top_logprobs` (0 to 20) each token comes with its log-probability and those of so many likely
    others. `deadline` is in seconds from submission. Clients of different names take turns.
    `adapter` is the name of one that is mounted, or a sum of several: `one=0.5+two=0.25`.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    guide: Guide | None = None
    boundaries: tuple[int, ...] = ()
    deadline: float | None = None
    client: str = ""
    adapter: str | None = None


@dataclass(frozen=True)
class Token:
    """A token of the answer.

    Log-probabilities are those of the model, before sampling; `top` has (token, log-probability),
    likeliest first. Both only where the request asks for them.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reading:
    """`done` of `total` tokens of the prompt are read; `cached` of them came from the cache."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Piece:
    """What one step adds.

    `text` has whole characters only and nothing of a stop text; so it may be empty, and lag behind
    `tokens`. Texts of special tokens are part of it, but for those that end an answer.
    """

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The answer is complete. No event follows.

    `reason` is "stop" (the model ended it, or its guide), "stop_text" (`stop` is the text),
    "length" or "cancelled". `prompt_tokens` include `cached_tokens`.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    stop: str | None = None


@dataclass(frozen=True)
class Failed:
    """The answer cannot be completed. No event follows; `error` is a `ServeError`."""

    error: Exception


Event = Reading | Piece | Finished | Failed
