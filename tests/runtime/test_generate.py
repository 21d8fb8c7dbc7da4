"""Text from a model: greedy is the largest logit, and a seed repeats a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from optiq.errors import UsageError
from optiq.ops import native
from optiq.runtime import generate, tokens
from optiq.runtime.generate import Request, answer, prompt_tokens, stream
from optiq.runtime.loading import load
from tests.tiny import EOS, tiny_folder

Loaded = tuple[nn.Module, Any]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(str(tiny_folder(tmp_path_factory.mktemp("models"))))


def text_of(loaded: Loaded, request: Request) -> str:
    return "".join(piece.text for piece in stream(*loaded, request))


def test_greedy_is_the_largest_logit(loaded: Loaded) -> None:
    model, tokenizer = loaded
    request = Request("What is the capital of France?", max_tokens=12)
    ids = prompt_tokens(tokenizer, request)
    expected: list[int] = []
    for _ in range(12):
        token = int(mx.argmax(model(mx.array([ids + expected]))[0, -1]).item())
        if token == EOS:
            break
        expected.append(token)
    pieces = list(stream(*loaded, request))
    assert [p.token for p in pieces][: len(expected)] == expected
    assert pieces[-1].prompt_tokens == len(ids)
    assert pieces[-1].generation_tokens <= 12
    assert pieces[-1].finish_reason in ("length", "stop")
    assert "".join(p.text for p in pieces) == tokenizer.decode(expected)
    assert answer(*loaded, request.prompt, max_tokens=12) == tokenizer.decode(expected).strip()


def test_the_chat_template_is_applied(loaded: Loaded) -> None:
    _, tokenizer = loaded
    plain = prompt_tokens(tokenizer, Request("Hello"))
    assert tokenizer.decode(plain) == ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    system = prompt_tokens(tokenizer, Request("Hello", system="Be brief."))
    assert tokenizer.decode(system) == "<|im_start|>system\nBe brief.<|im_end|>\n" + (
        tokenizer.decode(plain)
    )
    raw = prompt_tokens(tokenizer, Request("Hello", raw=True))
    assert tokenizer.decode(raw) == "<|bos|>Hello"


def test_a_seed_repeats_a_sample(loaded: Loaded) -> None:
    hot: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5}
    first, again, other = (text_of(loaded, Request("Hello", seed=s, **hot)) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_step_by_step_gives_what_mlx_lms_generator_gives(
    loaded: Loaded, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where guesses are read: every second one is right, and followed by a wrong one."""
    request = Request("one two three " * 20, max_tokens=40, temperature=temperature, raw=True)
    plain = [p.token for p in stream(*loaded, request)]
    read = []

    def guess(lookup: tokens.Lookup, worth: float, most: int) -> list[int]:
        made = len(lookup._tokens) - len(prompt_tokens(loaded[1], request))
        read.append([*plain[made : made + 1 + made % 2], 5][:most])
        return read[-1]

    monkeypatch.setattr(tokens.Lookup, "guess", guess)
    pieces = list(stream(*loaded, request))
    assert bool(read) == (native.active() is not None)
    monkeypatch.setattr(generate, "can_step", lambda *_: False)
    expected = list(stream(*loaded, request))
    assert [p.token for p in pieces] == [p.token for p in expected]
    assert "".join(p.text for p in pieces) == "".join(p.text for p in expected)
    counts = [
        (p.prompt_tokens, p.generation_tokens, p.finish_reason) for p in (pieces[-1], expected[-1])
    ]
    assert counts[0] == counts[1]


def test_what_cannot_be_asked(tmp_path: Path, loaded: Loaded) -> None:
    _, tokenizer = loaded
    for prompt in ("", " \n"):
        with pytest.raises(UsageError, match="the prompt is empty"):
            prompt_tokens(tokenizer, Request(prompt))
    with pytest.raises(UsageError, match="--system needs a chat template"):
        prompt_tokens(tokenizer, Request("Hello", system="Be brief.", raw=True))

    folder = tiny_folder(tmp_path)
    config = folder / "tokenizer_config.json"
    refusing = '"chat_template": "{{ raise_exception(\'no\\\\nsystem\') }}", "x":'
    config.write_text(config.read_text().replace('"chat_template":', refusing))
    _, tokenizer = load(str(folder))
    with pytest.raises(UsageError, match=r"template refuses these messages \(no system\)") as error:
        prompt_tokens(tokenizer, Request("Hello", system="Be brief."))
    assert "\n" not in str(error.value)


def test_a_model_without_a_chat_template_takes_the_text_as_it_is(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"chat_template":', '"x":'))
    _, tokenizer = load(str(folder))
    assert tokenizer.decode(prompt_tokens(tokenizer, Request("Hello"))) == "<|bos|>Hello"
    with pytest.raises(UsageError, match="--system needs a chat template"):
        prompt_tokens(tokenizer, Request("Hello", system="Be brief."))
