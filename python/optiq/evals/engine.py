"""Ask a model in batches: greedy answers and next-token probabilities through BatchGenerator.

What all prompts of a call begin with (a system message, worked examples, the five questions of a
subject) is run once; every sequence starts from a copy of its cache.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.text import one_line
from ..chat.forms import Messages, Tools
from ..chat.template import chat_text, encode
from ..errors import EvalError
from ..ops import metal
from ..sources.folder import mlx_lm_version

Tokens = list[int]
# Where an answer that is still being written ends for good, or None while it may go on.
Stop = Callable[[str], "int | None"]

See = Callable[[int, int, mx.array], bool]

MIN_SHARED = 16  # tokens; for less, copying caches costs more than it saves
PREFILL = 512  # tokens of the shared beginning that run at a time
PREFILL_BATCH = 8  # prompts that are read at a time


@dataclass(frozen=True)
class Prompt:
    """What one sequence is asked."""

    tokens: Tokens
    max_tokens: int
    stop: Stop | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.asarray(self.tokens, dtype="<i4").tobytes()).hexdigest()


@dataclass(frozen=True)
class Engine:
    """A model, its tokenizer, how many sequences it decodes at a time, and whom to tell of each."""

    model: nn.Module
    tokenizer: Any
    batch: int = 16  # 1: without batches
    finished: Callable[[], None] = lambda: None

    def suited(self, name: str) -> Engine:
        """This one, or one without batches where mlx-lm has none for the model's caches.

        Raises EvalError where it cannot run the model `name` at all.
        """
        start = [0, 1, 2, 3] * (MIN_SHARED // 4 + 1)
        trial = [[*start, 1], [*start, 2], [*start, 2, 3]], [2, 2, 2], lambda *_: False
        for engine in (self, replace(self, batch=1)):
            try:
                replace(engine, finished=lambda: None)._run(*trial)
                return engine
            except Exception as error:  # whatever a model file, a cache or a generator raises
                reason = one_line(error)
        raise EvalError(f"mlx-lm {mlx_lm_version()} cannot generate with {name}: {reason}")

    @property
    def has_chat(self) -> bool:
        return bool(self.tokenizer.has_chat_template)

    def chat(self, messages: Messages, tools: Tools | None = None) -> Tokens:
        """A conversation up to where the model answers, thinking switched off where it can be.

        A template that knows no tools or no system message gets them as text; without a template
        it is "User: ... Assistant:". One BOS, if the tokenizer has one.
        """
        chat = chat_text(messages, self.tokenizer, tools, answer=True)
        return encode(chat.text, self.tokenizer)

    def text(self, text: str) -> Tokens:
        """Bare text, with the BOS that the tokenizer itself puts in front of one, if any."""
        return list(self.tokenizer.encode(text))

    @metal.restarts
    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """The greedy continuation of each prompt, without the token that ended it."""
        written: list[Tokens] = [[] for _ in prompts]
        texts: dict[int, str] = {}
        ends = set(self.tokenizer.eos_token_ids)

        def see(index: int, token: int, _: mx.array) -> bool:
            prompt, tokens = prompts[index], written[index]
            if token not in ends:
                tokens.append(token)
            over = token in ends or len(tokens) == prompt.max_tokens
            if prompt.stop is not None or over:
                text = str(self.tokenizer.decode(tokens))
                cut = prompt.stop(text) if prompt.stop else None
                over = over or cut is not None
                texts[index] = text[:cut]
            return over

        self._run([p.tokens for p in prompts], [p.max_tokens for p in prompts], see)
        return [texts[index] for index in range(len(prompts))]

    @metal.restarts
    def log_likelihoods(
        self, contexts: Sequence[Tokens], endings: Sequence[Sequence[Tokens]]
    ) -> list[list[float]]:
        """log p of each of its endings after each context, summed over the ending's tokens."""

        def key(context: Tokens, written: Tokens) -> tuple[int, ...]:
            return (*context, *written)

        wanted: dict[tuple[int, ...], dict[int, float]] = {}  # per sequence run: tokens asked for
        for context, options in zip(contexts, endings, strict=True):
            for ending in options:
                for k, token in enumerate(ending):
                    wanted.setdefault(key(context, ending[:k]), {})[token] = 0.0
        sequences = [list(sequence) for sequence in wanted]
        found = list(wanted.values())

        def see(index: int, _: int, log_p: mx.array) -> bool:
            tokens = list(found[index])
            values = log_p[mx.array(tokens)].astype(mx.float32).tolist()
            found[index].update(zip(tokens, values, strict=True))  # type: ignore[arg-type]
            return True

        self._run(sequences, [1] * len(sequences), see)
        return [
            [
                sum(wanted[key(context, ending[:k])][token] for k, token in enumerate(ending))
                for ending in options
            ]
            for context, options in zip(contexts, endings, strict=True)
        ]

    def _run(self, sequences: Sequence[Tokens], limits: Sequence[int], see: See) -> None:
        """Decode every sequence until `see` (its index, token, log-probabilities) says it is over.

        Short ones go first, so that those that are padded to one length have similar lengths.
        """
        from mlx_lm.generate import BatchGenerator

        shared = shared_length(sequences)
        if self.batch == 1:
            return self._one_by_one(sequences, limits, see, shared)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        rests = [sequences[index][shared:] for index in order]
        caches = [self._cache(sequences[0][:shared])] * len(order) if shared else None
        generator = BatchGenerator(
            self.model,
            completion_batch_size=self.batch,
            prefill_batch_size=min(self.batch, PREFILL_BATCH),
        )
        uids = generator.insert(rests, [limits[index] for index in order], caches)
        running = dict(zip(uids, order, strict=True))
        try:
            while running:
                over = []
                for response in generator.next()[1]:
                    token, log_p = int(response.token), response.logprobs
                    if see(running[response.uid], token, log_p) or response.finish_reason:
                        over.append(response)
                        del running[response.uid]
                        self.finished()
                generator.remove([r.uid for r in over if r.finish_reason is None])
        finally:
            generator.close()

    def _one_by_one(
        self, sequences: Sequence[Tokens], limits: Sequence[int], see: See, shared: int
    ) -> None:
        begun = self._cache(sequences[0][:shared])
        for index, (tokens, limit) in enumerate(zip(sequences, limits, strict=True)):
            cache = self._cache(tokens[shared:-1], copy.deepcopy(begun))
            token = tokens[-1]
            for _ in range(limit):
                logits = self.model(mx.array([[token]]), cache=cache)[0, -1]
                token = int(np.asarray(logits.astype(mx.float32)).argmax())
                if see(index, token, logits - mx.logsumexp(logits)):  # computed if it is looked at
                    break
            self.finished()

    def _cache(self, tokens: Tokens, cache: list[Any] | None = None) -> list[Any]:
        """The cache after `tokens`. BatchGenerator copies it when it makes a batch."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model) if cache is None else cache
        for start in range(0, len(tokens), PREFILL):
            self.model(mx.array([tokens[start : start + PREFILL]]), cache=cache)
            mx.eval([layer.state for layer in cache])
        return cache


def shared_length(sequences: Sequence[Tokens]) -> int:
    """How many first tokens all sequences share, short of the last of any.

    0 where it is not worth a cache of its own.
    """
    first, last = min(sequences), max(sequences)  # what these two share, all between them do
    most = min(map(len, sequences)) - 1
    differ = (k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    length = min(next(differ, most), most)
    return length if length >= MIN_SHARED and len(sequences) > 1 else 0
