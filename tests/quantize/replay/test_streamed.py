"""Weights that are given up are read again, the same; and a pass over blocks holds few of them."""

from __future__ import annotations

import gc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from optiq.models.roles import quantizable
from optiq.nn.accelerate import accelerate
from optiq.nn.replay import Replay
from optiq.quantize.replay.streamed import Passing, Streamed
from optiq.quantize.rounding.importance import column_squares
from optiq.sources import load, resolve
from tests.quantize.sensitivity.cases import MODELS, sequences, tiny_source
from tests.tiny import tiny_folder

TEXTS = sequences(12, 9, 20)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_drops_every_block_is_the_run_of_the_model(tmp_path: Path, name: str) -> None:
    source = tiny_source(tmp_path, name)
    plain, streamed = (load(source).model for _ in range(2))
    modules = quantizable(plain)
    for model in (plain, streamed):
        accelerate(model, blocks=False)
    with Replay(plain, modules) as replay:
        expected = [replay.record(tokens) for tokens in TEXTS]
    drop = Streamed(source, streamed).drop
    with Replay(streamed, modules) as replay:
        for _ in range(3):  # weights are read again each time
            found = replay.record_together(TEXTS, after=drop)
            for a, b in zip(expected, found, strict=True):
                assert mx.array_equal(a.hidden, b.hidden)
                for x, y in zip(a.outputs, b.outputs, strict=True):
                    assert mx.array_equal(x, y)
        thin = replay.record_together(TEXTS, after=drop, thin=True)
    for a, b in zip(expected, thin, strict=True):
        assert mx.array_equal(a.hidden, b.hidden)
        assert [x.shape for x in b.outputs] == [x.shape for x in a.outputs]
    original = dict(tree_flatten(load_model(source.path)[0].parameters()))
    for path, array in tree_flatten(streamed.parameters()):
        np.testing.assert_array_equal(np.array(array), np.array(original[path]), err_msg=path)


def test_a_pass_holds_one_block_and_no_more(tmp_path: Path) -> None:
    folder = tiny_folder(
        tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=12, shards=4
    )
    source = resolve(str(folder))
    model = load(source).model
    modules = quantizable(model)
    accelerate(model, blocks=False)
    streamed = Streamed(source, model)
    gc.collect()
    block = sum(a.nbytes for _, a in tree_flatten(model.layers[0].parameters()))
    for _ in range(2):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        column_squares(model, modules, TEXTS, drop=streamed.drop, progress=False)
        assert block < mx.get_peak_memory() - before < 3 * block  # of 12
        assert mx.get_active_memory() - before < 0.2 * block


def test_a_model_that_passes_forgets_its_blocks(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama tied")
    model = load(source).model
    head = np.array(model.model.embed_tokens.weight)
    with Replay(model, quantizable(model)) as replay:
        replay.record_together(TEXTS, after=Passing(model).drop)
    assert not any(a.size for _, a in tree_flatten(model.layers[1].parameters()))
    np.testing.assert_array_equal(np.array(model.model.embed_tokens.weight), head)
