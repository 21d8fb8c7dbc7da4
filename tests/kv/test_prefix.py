"""Caches in a file: what they hold is there again, and nothing else is taken for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from optiq import kv
from optiq.cli import main
from optiq.errors import KVError
from optiq.kv import KVConfig
from optiq.kv.prefix import Key, PrefixFile, load, save
from tests.kv.models import KINDS, logits, model_of, prompts
from tests.tiny import tiny_folder

KEY = Key("model", config="config")


def attached(kind: str) -> nn.Module:
    model = model_of(kind)
    config = KVConfig.uniform(kv.entries(model), "8/4")
    return kv.attach(model, replace(config, fp_recent=3, fp_sink=2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_goes_on_as_the_one_in_memory(kind: str, tmp_path: Path) -> None:
    for model in (attached(kind), model_of(kind)):
        caches, tokens = make_prompt_cache(model), prompts(21)[0]
        logits(model, caches)
        save(tmp_path / "p", caches, tokens, KEY)
        again = make_prompt_cache(model)
        assert load(tmp_path / "p", again, KEY) == tokens
        assert [type(c) for c in again] == [type(c) for c in caches]
        assert [c.nbytes for c in again] == [c.nbytes for c in caches]
        for steps in ((1,), (4,), (1, 1)):
            assert mx.array_equal(logits(model, again, steps), logits(model, caches, steps))
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_a_prompt_that_begins_the_same(tmp_path: Path) -> None:
    model, tokens = attached("mistral"), prompts(12)[0]
    file = PrefixFile(tmp_path / "p", KEY)
    caches = file.start(model, tokens)
    assert file.reused == 0
    model(mx.array([tokens]), cache=caches)
    file.store(caches, tokens)
    for prompt, common in (
        ([*tokens, 7, 8], 12),
        ([*tokens[:9], 1, 2, 3], 9),
        (tokens, 11),  # at least one token has to be read
        ([1, *tokens], 0),
    ):
        caches = file.start(model, prompt)
        assert file.reused == common
        assert [c.offset for c in caches] == [common, common]


def test_a_window_that_turned_over_cannot_be_trimmed(tmp_path: Path) -> None:
    model, tokens = attached("gpt_oss"), prompts(12)[0]
    file = PrefixFile(tmp_path / "p", KEY)
    caches = file.start(model, tokens)
    for token in tokens:
        model(mx.array([[token]]), cache=caches)
    file.store(caches, tokens)
    caches = file.start(model, [*tokens, 5])
    assert (file.reused, caches[0].offset) == (12, 12)
    caches = file.start(model, [*tokens[:9], 5])
    assert (file.reused, caches[0].offset) == (0, 0)


def edited(path: Path, change: Callable[[Any, Any], None]) -> None:
    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    header = json.loads(metadata["optiq"])
    change(header, arrays)
    other = path.with_suffix(".safetensors")
    mx.save_safetensors(str(other), arrays, {"optiq": json.dumps(header)})
    other.replace(path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda h, a: h.update(version=2), "not a prompt cache"),
        (lambda h, a: h.pop("key"), "not a prompt cache"),
        (lambda h, a: h["caches"].pop(), "damaged"),
        (lambda h, a: h["caches"][0].update(cache="KVCache"), "a KVCache for a KVRecords"),
        (lambda h, a: h["caches"][0]["holds"].update(other=1), "has no other"),
        (lambda h, a: h["caches"][0]["holds"].update(offset=99), "damaged"),
        (lambda h, a: a.update({"0.keys": a["0.keys"][..., 1:]}), "damaged"),
        (lambda h, a: a.pop("0.keys"), "damaged"),
        (lambda h, a: a.pop("tokens"), "damaged"),
    ],
)
def test_damaged_files(change: Callable[[Any, Any], None], error: str, tmp_path: Path) -> None:
    model, tokens = attached("mistral"), prompts(5)[0]
    caches = make_prompt_cache(model)
    model(mx.array([tokens]), cache=caches)
    save(tmp_path / "p", caches, tokens, KEY)
    edited(tmp_path / "p", change)
    with pytest.raises(KVError, match=error) as raised:
        load(tmp_path / "p", make_prompt_cache(model), KEY)
    assert "delete it" in str(raised.value)


def test_other_files(tmp_path: Path) -> None:
    model = attached("mistral")
    save(tmp_path / "p", make_prompt_cache(model), [], KEY)
    for key, what in (
        (Key("other", config="config"), "model"),
        (Key("model", "adapter", "config"), "adapter"),
        (Key("model"), "KV configuration"),
    ):
        with pytest.raises(KVError, match=f"another {what}"):
            load(tmp_path / "p", make_prompt_cache(model), key)
    (tmp_path / "text").write_text("no cache")
    for name in ("text", "missing"):
        with pytest.raises(KVError, match="not a prompt cache"):
            load(tmp_path / name, make_prompt_cache(model), KEY)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, cache = str(tiny_folder(tmp_path)), str(tmp_path / "cache")

    def run(prompt: str, *options: str) -> Any:
        capsys.readouterr()
        code = main(["generate", folder, "-p", prompt, "-m", "4", "--raw", "--json", *options])
        printed = capsys.readouterr()
        return json.loads(printed.out) if code == 0 else printed.err

    alone, first, again = (
        run("one two three", "--kv", "8/4", *options)
        for options in ((), ("--prompt-cache", cache), ("--prompt-cache", cache))
    )
    assert alone["text"] == first["text"] == again["text"]
    assert alone["prompt_tokens"] == first["prompt_tokens"] == again["prompt_tokens"]
    reused = [each["prompt_tokens_from_cache"] for each in (alone, first, again)]
    assert reused == [0, 0, first["prompt_tokens"] - 1]
    longer = run("one two three" + first["text"] + " four", "--kv", "8/4", "--prompt-cache", cache)
    assert longer["prompt_tokens_from_cache"] >= first["prompt_tokens"]
    assert "another KV configuration" in run("one", "--prompt-cache", cache)
    assert "another KV configuration" in run("one", "--kv", "8/8", "--prompt-cache", cache)
    assert "no format 7g" in run("one", "--kv", "7/4")
    assert "neither a file nor bits" in run("one", "--kv", "kv_config.json")
