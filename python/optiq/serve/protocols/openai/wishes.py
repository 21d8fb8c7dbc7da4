"""The fields that chat completions and completions share."""

from __future__ import annotations

from ...asked import Wishes
from ...engine.request import Sampling
from ..fields import Fields, kind

MAX_STOPS = 4
MAX_BIASES = 1024
MAX_CHOICES = 128

# Fields that ask for something that is not done here, and the values that ask for nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_INSTEAD = {"functions": "; use 'tools'", "function_call": "; use 'tool_choice'"}


def wishes(body: Fields, client: str, adapter: str | None, *, top_logprobs: int | None) -> Wishes:
    for name, harmless in _REFUSED.items():
        if name in body and body.values[name] not in harmless:
            raise body.wrong(name, f"cannot be honoured by this server{_INSTEAD.get(name, '')}")
    limits = [
        body.integer(name, 1)
        for name in ("max_tokens", "max_completion_tokens")  # the smaller one holds
    ]
    return Wishes(
        max_tokens=min((limit for limit in limits if limit is not None), default=None),
        sampling=sampling(body),
        stop=body.texts("stop", MAX_STOPS),
        top_logprobs=top_logprobs,
        n=body.integer("n", 1, MAX_CHOICES) or 1,
        client=f"{client}/{body.text('user') or body.text('safety_identifier') or ''}",
        adapter=adapter,
    )


def sampling(body: Fields) -> Sampling:
    """OpenAI's parameters, and those that other servers have added to its protocol."""
    top_k = body.integer("top_k", -1) or 0
    return Sampling(
        temperature=body.number("temperature", 1.0, 0.0, 2.0),
        top_p=body.number("top_p", 1.0, 0.0, 1.0),
        top_k=max(top_k, 0),  # -1 is "all", as in vLLM
        min_p=body.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=body.number("repetition_penalty", 1.0, 0.01, 100.0),
        presence_penalty=body.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=body.number("frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(body),
        seed=body.integer("seed", -(2**63), 2**63 - 1),
    )


def _logit_bias(body: Fields) -> dict[int, float]:
    given = body.object("logit_bias")
    if given is None:
        return {}
    if len(given.values) > MAX_BIASES:
        raise body.wrong("logit_bias", f"has more than {MAX_BIASES} entries")
    found = {}
    for token, value in given.values.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise body.wrong("logit_bias", f"has {token[:20]!r}, which is not a token id")
        if value is None:
            raise body.wrong("logit_bias", f"has {kind(value)} for token {token}")
        found[int(token)] = given.number(token, 0.0, -100.0, 100.0)
    return found


def wants_usage(body: Fields) -> bool:
    """Whether the last chunk of a stream has the usage."""
    options = body.object("stream_options")
    return options is not None and options.flag("include_usage")
