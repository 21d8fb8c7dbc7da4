"""Adapters of the embedding and the head, which come from PEFT or mlx-lm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as stock_load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import optiq
from optiq.errors import AdapterError
from optiq.kv.prefix import Key
from optiq.lora import peft
from optiq.lora.adapter import Adapter, read, write
from optiq.lora.layers import LowRank
from optiq.lora.merging import merge
from optiq.lora.mounting import mount, opened
from optiq.serve.engine.adapters import Adapters
from optiq.serve.engine.prefix import PrefixCache
from optiq.sources import load, resolve
from tests.lora.models import mixed_folder
from tests.lora.test_adapter import same
from tests.tiny import tiny_folder

EMBEDDING, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.1.self_attn.q_proj"
IDS = mx.array([[5, 6, 7, 8, 9, 7]])


def adapter_of(folder: Path, *paths: str, scale: float = 1.5) -> Adapter:
    """Ranks 1, 2, ... of these layers; the embedding's first matrix has a row for each word."""
    model = load_model(folder)[0]
    modules = dict(model.named_modules())
    terms = {}
    for i, path in enumerate(paths):
        out, width = dense(modules[path]).shape
        sides = (out, width) if path == EMBEDDING else (width, out)
        keys = mx.random.split(mx.random.key(i))
        a, b = (
            mx.random.normal(s, key=k)
            for s, k in zip(((sides[0], i + 1), (i + 1, sides[1])), keys, strict=True)
        )
        terms[path] = LowRank(0.3 * a, b)
    return Adapter(terms, scale, blocks=len(model.layers))


def dense(layer: Any) -> mx.array:
    if "scales" not in layer:
        return layer.weight
    return mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)


def logits(folder: Path, adapter: Adapter | None = None) -> mx.array:
    model = load(resolve(str(folder)), allow_quantized=True).model
    if adapter:
        mount(model, adapter)
    return model(IDS)


def by_hand(folder: Path, adapter: Adapter) -> mx.array:
    """Stock mlx-lm with each term added to a weight, none of which is quantized."""
    model = load_model(folder)[0]
    for path, (a, b) in adapter.terms.items():
        layer = dict(model.named_modules())[path]
        change = adapter.scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        weight = layer.weight + mx.array(change if path == EMBEDDING else change.T, mx.float32)
        layer.weight = weight
    return model(IDS)


def close(a: mx.array, b: mx.array) -> bool:
    return bool((mx.abs(a - b).max() <= 1e-4 * mx.abs(b).max()).item())


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path, tie_word_embeddings=False)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return mixed_folder(tmp_path, tie_word_embeddings=False)


def test_the_fast_model_computes_the_same(mixed: Path) -> None:
    adapter = adapter_of(mixed, EMBEDDING, Q, HEAD)
    assert close(optiq.load(mixed, adapter=adapter)[0](IDS), logits(mixed, adapter))


@pytest.mark.parametrize("paths", [(EMBEDDING,), (HEAD,), (EMBEDDING, Q, HEAD)])
def test_it_adds_what_its_matrices_say(plain: Path, paths: tuple[str, ...]) -> None:
    adapter = adapter_of(plain, *paths)
    assert close(logits(plain, adapter), by_hand(plain, adapter))
    assert not close(logits(plain), by_hand(plain, adapter))


def test_stock_mlx_lm_computes_the_same(tmp_path: Path, mixed: Path) -> None:
    adapter = adapter_of(mixed, EMBEDDING, Q, HEAD)
    write(adapter, tmp_path / "adapter")
    stock, _ = stock_load(str(mixed), adapter_path=str(tmp_path / "adapter"))
    assert close(logits(mixed, read(tmp_path / "adapter")), stock(IDS))


def test_peft_has_it_there_and_back(tmp_path: Path, plain: Path) -> None:
    adapter = adapter_of(plain, EMBEDDING, Q, HEAD)
    peft.write(adapter, tmp_path / "p")
    names = set(mx.load(str(tmp_path / "p" / peft.WEIGHTS)))
    assert f"base_model.model.{EMBEDDING}.lora_embedding_A" in names
    assert f"base_model.model.{HEAD}.lora_A.weight" in names
    assert same(opened(tmp_path / "p"), adapter)


def test_a_weight_of_the_base_beside_other_layers_is_named(tmp_path: Path, plain: Path) -> None:
    """PEFT copies embeddings also when their size was changed, and then they are not the base's."""
    peft.write(adapter_of(plain, Q), tmp_path / "p")
    file = tmp_path / "p" / peft.WEIGHTS
    tensors: Any = mx.load(str(file))
    mx.save_safetensors(str(file), {**tensors, f"base_model.model.{EMBEDDING}.weight": mx.ones(2)})
    with pytest.raises(AdapterError, match=r"holds base_model\.model\.model\.embed_tokens\.weight"):
        opened(tmp_path / "p")


def test_merged_it_computes_the_same(tmp_path: Path, mixed: Path) -> None:
    adapter = adapter_of(mixed, EMBEDDING, Q, HEAD)
    merge(mixed, [(adapter, 1.0)], tmp_path / "dense", dense=True)
    assert close(logits(tmp_path / "dense"), logits(mixed, adapter))
    merge(mixed, [(adapter, 1.0)], tmp_path / "merged")
    merged = load_model(tmp_path / "merged")[0]
    before = load_model(mixed)[0]
    for path in (EMBEDDING, HEAD):
        old, new = (dict(m.named_modules())[path] for m in (before, merged))
        assert (old.bits, old.group_size) == (new.bits, new.group_size)
        wanted = dense(dict(load_model(tmp_path / "dense")[0].named_modules())[path])
        assert mx.abs(dense(new) - wanted).max() <= mx.abs(new.scales).max()  # of one step


def test_an_embedding_that_is_the_head_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="the embedding and the head of this model"):
        logits(folder, adapter_of(folder, EMBEDDING))


def test_dora_of_an_embedding_is_refused(plain: Path) -> None:
    adapter = adapter_of(plain, EMBEDDING)
    width = adapter.terms[EMBEDDING].b.shape[1]
    with pytest.raises(AdapterError, match="by DoRA"):
        logits(plain, replace(adapter, magnitudes={EMBEDDING: mx.ones(width)}))


@pytest.mark.parametrize("path", [EMBEDDING, HEAD])
def test_a_matrix_for_another_vocabulary_is_named(plain: Path, path: str) -> None:
    adapter = adapter_of(plain, path)
    a, b = adapter.terms[path]
    term = LowRank(a[:-1], b) if path == EMBEDDING else LowRank(a, b[:, :-1])
    with pytest.raises(AdapterError, match="383"):
        logits(plain, replace(adapter, terms={path: term}))


@pytest.mark.parametrize("path", [EMBEDDING, HEAD])
def test_a_server_says_what_to_do(plain: Path, path: str) -> None:
    model = load(resolve(str(plain)), allow_quantized=True).model
    adapters = Adapters(
        model, None, lambda: make_prompt_cache(model), slots=1, nbytes=1 << 24,
        prefix=lambda digest: PrefixCache(Key(digest), 0),
    )  # fmt: skip
    with pytest.raises(AdapterError, match=f"changes {path}; write a model"):
        adapters.mount("a", adapter_of(plain, path))
