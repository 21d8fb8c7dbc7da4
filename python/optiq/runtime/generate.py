"""Text from a model: step by step on the CPU, elsewhere through mlx-lm's generator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..base.files import check_writable
from ..base.text import one_line
from ..errors import UsageError
from ..kv import KVConfig
from ..kv.half import empty_caches
from ..kv.model import digest
from ..kv.prefix import Key, PrefixFile
from ..lora.adapter import Adapter
from ..lora.mounting import opened
from ..ops import metal
from ..sources import resolve
from .experts import Reads, reads_of
from .loading import open_source
from .tokens import can_step, tokens

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RequestFields(TypedDict, total=False):
    """What may be asked beside the prompt, see `Request`."""

    system: str | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    raw: bool


@dataclass(frozen=True)
class Request:
    """One prompt; a temperature of 0 is greedy, `raw` leaves the chat template out.

    Of the words that may be drawn, `top_p` keeps the likeliest up to this probability in all,
    `top_k` so many, and `min_p` those at least that likely beside the likeliest.
    """

    prompt: str
    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    raw: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise UsageError(
                f"a temperature of {self.temperature} cannot be sampled with; give 0 or more"
            )
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not 0 <= share <= 1:
                raise UsageError(f"{name} is {share}; give a share from 0 to 1")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; give 0 (all words) or more")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}; give at least 1")


@dataclass(frozen=True)
class Piece:
    """A piece of an answer with the counts so far, named as in mlx-lm's GenerationResponse."""

    text: str
    token: int
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    finish_reason: str | None


def stream(
    model: nn.Module, tokenizer: Any, request: Request, prefix: PrefixFile | None = None
) -> Iterator[Any]:
    """A Piece, or mlx-lm's GenerationResponse, for each piece of text.

    What `prefix` holds of the prompt is not read again; afterwards it holds prompt and answer. An
    answer in which a Metal kernel of ours raises goes on with stock MLX: prompt and answer so far
    are read again.

    Raises UsageError for an empty prompt, or a system message the model's template has no place
    for; KVError for a `prefix` of another model.
    """
    read = prompt_tokens(tokenizer, request)
    caches = prefix.start(model, read) if prefix else empty_caches(model)
    mx.random.seed(request.seed)
    prompt = _Prompt(tuple(read), prefix.reused if prefix else 0, caches)
    run = _stepwise if can_step(model, caches) else _through_mlx_lm
    for piece in run(model, tokenizer, prompt, request):
        read.append(piece.token)
        yield piece
    if prefix:
        prefix.store(caches, read[: caches[0].offset])


@dataclass(frozen=True)
class _Prompt:
    """The tokens of a prompt, of which `caches` hold the first `reused`."""

    tokens: tuple[int, ...]
    reused: int
    caches: list[Any]

    @property
    def unread(self) -> list[int]:
        return list(self.tokens[self.reused :])


def _sampler(request: Request) -> Any:
    from mlx_lm.sample_utils import make_sampler

    return make_sampler(
        temp=request.temperature, top_p=request.top_p, top_k=request.top_k, min_p=request.min_p
    )


def _stepwise(
    model: nn.Module, tokenizer: Any, prompt: _Prompt, request: Request
) -> Iterator[Piece]:
    text = tokenizer.detokenizer
    started = time.perf_counter()
    reading = 0.0
    sampler = _sampler(request) if request.temperature else None
    unread = prompt.unread
    found = tokens(model, unread, prompt.caches, request.max_tokens, sampler)
    for made, token in enumerate(found, 1):
        now = time.perf_counter()
        if made == 1:
            reading, started = now - started, now
        ended = token in tokenizer.eos_token_ids
        if not ended:
            text.add_token(token)
        reason = "stop" if ended else "length" if made == request.max_tokens else None
        if reason:
            text.finalize()
        speed = made / max(time.perf_counter() - started, 1e-9)
        segment = text.last_segment
        yield Piece(segment, token, len(unread), len(unread) / reading, made, speed, reason)
        if reason:
            return


def _through_mlx_lm(
    model: nn.Module, tokenizer: Any, prompt: _Prompt, request: Request
) -> Iterator[Any]:
    from mlx_lm import stream_generate

    sampler, caches = _sampler(request), prompt.caches
    read, unread = list(prompt.tokens), prompt.unread
    left, before = request.max_tokens, 0
    while True:
        pieces = stream_generate(
            model, tokenizer, unread, max_tokens=left, sampler=sampler, prompt_cache=caches
        )
        try:
            for piece in pieces:
                read.append(piece.token)
                left -= 1
                piece.prompt_tokens -= before
                piece.generation_tokens += before
                yield piece
            return
        except (RuntimeError, ValueError) as error:
            if not metal.give_up(error):
                raise
            # What is in the caches was perhaps never computed.
            caches[:] = make_prompt_cache(model)
            unread, before = read, request.max_tokens - left


def prompt_tokens(tokenizer: Any, request: Request) -> list[int]:
    """The prompt as tokens: through the chat template if there is one and `raw` is not set."""
    if not request.prompt.strip():
        raise UsageError("the prompt is empty; give some text")
    if request.raw or tokenizer.chat_template is None:
        if request.system is not None:
            raise UsageError("--system needs a chat template; put the text into the prompt")
        return list(tokenizer.encode(request.prompt))
    messages = [{"role": "user", "content": request.prompt}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    except Exception as error:  # whatever a template raises
        raise UsageError(
            f"the model's chat template refuses these messages ({one_line(error)}); try --raw"
        ) from error


def answer(model: nn.Module, tokenizer: Any, prompt: str, max_tokens: int = 64) -> str:
    """The greedy answer to one prompt."""
    request = Request(prompt, max_tokens=max_tokens)
    return "".join(piece.text for piece in stream(model, tokenizer, request)).strip()


@dataclass(frozen=True)
class Answer:
    """The text, and what it took; `prompt_tokens_from_cache` of `prompt_tokens` were not read.

    `experts` says what was read of experts that stay on disk.
    """

    text: str
    prompt_tokens: int
    prompt_tokens_from_cache: int
    prompt_tokens_per_second: float
    generated_tokens: int
    generated_tokens_per_second: float
    finish_reason: str
    experts: Reads | None = None


def generate(
    model: str | Path | tuple[nn.Module, Any],
    prompt: str,
    *,
    kv: KVConfig | Path | str | None = None,
    adapter: Adapter | Path | str | None = None,
    expert_memory: int | str | None = None,
    prompt_cache: str | Path | None = None,
    revision: str | None = None,
    show: Callable[[str], object] = lambda text: None,
    **request: Unpack[RequestFields],
) -> Answer:
    """Answer `prompt` with `model`: a folder, hub id or .gguf file, or what `optiq.load` returned.

    `kv`, `adapter` and `expert_memory` are those of `load`. What the file `prompt_cache` holds of
    the prompt is not read again; prompt and answer are kept in it. `show` gets each piece of text
    as it comes. `request` are the fields of `Request`, such as `max_tokens=20`.

    Raises UsageError for what the model cannot honour, SourceError, and KVError for `kv` or a
    cache of another model.
    """
    asked = Request(prompt, **request)
    if isinstance(model, tuple):
        if any(g is not None for g in (kv, adapter, expert_memory, prompt_cache, revision)):
            raise UsageError(
                "kv, adapter, expert_memory, prompt_cache and revision are for a model given by "
                "its name"
            )
        return _answered(*model, asked, None, show)
    source = resolve(str(model), revision=revision)
    if prompt_cache is not None:
        prompt_cache = Path(prompt_cache).expanduser().resolve()
        check_writable(prompt_cache)
    adapter = None if adapter is None else opened(adapter)
    loaded, tokenizer = open_source(source, kv=kv, adapter=adapter, expert_memory=expert_memory)
    prefix = None
    if prompt_cache is not None:
        prefix = PrefixFile(
            prompt_cache, Key(source.fingerprint, adapter.digest if adapter else "", digest(loaded))
        )
    return _answered(loaded, tokenizer, asked, prefix, show)


def _answered(
    model: nn.Module,
    tokenizer: Any,
    request: Request,
    prefix: PrefixFile | None,
    show: Callable[[str], object],
) -> Answer:
    text, last = "", None
    for last in stream(model, tokenizer, request, prefix):
        text += last.text
        show(last.text)
    assert last is not None  # max_tokens is at least 1
    reused = prefix.reused if prefix else 0
    return Answer(
        text,
        last.prompt_tokens + reused,
        reused,
        last.prompt_tps,
        last.generation_tokens,
        last.generation_tps,
        last.finish_reason,
        reads_of(model),
    )
