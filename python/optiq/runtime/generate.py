"""Text from a model, through mlx-lm's generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ..base.text import one_line
from ..errors import UsageError

if TYPE_CHECKING:
    from ..kv.prefix import PrefixFile


@dataclass(frozen=True)
class Request:
    """One prompt; a temperature of 0 is greedy, `raw` leaves the chat template out."""

    prompt: str
    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    raw: bool = False


def stream(
    model: nn.Module, tokenizer: Any, request: Request, prefix: PrefixFile | None = None
) -> Iterator[Any]:
    """mlx-lm's GenerationResponse for each piece of text, the last one with the counts.

    What `prefix` holds of the prompt is not read again; afterwards it holds prompt and answer.

    Raises UsageError for an empty prompt, or a system message the model's template has no place
    for; KVError for a `prefix` of another model.
    """
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    tokens = prompt_tokens(tokenizer, request)
    caches = prefix.start(model, tokens) if prefix else None
    mx.random.seed(request.seed)
    pieces = stream_generate(
        model,
        tokenizer,
        tokens[prefix.reused if prefix else 0 :],
        max_tokens=request.max_tokens,
        sampler=make_sampler(temp=request.temperature),
        prompt_cache=caches,
    )
    for piece in pieces:
        tokens.append(piece.token)
        yield piece
    if prefix and caches:
        prefix.store(caches, tokens)


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
