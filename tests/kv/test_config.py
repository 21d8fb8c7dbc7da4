"""`kv_config.json`: what is written is read, and what does not fit says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.errors import KVError, UsageError
from optiq.formats import DENSE, KV_BITS, KV_GROUPS, Format
from optiq.kv import Entry, KVConfig
from optiq.kv.config import Identity
from optiq.ops.attention import record_words

FORMATS = st.one_of(
    st.just(DENSE),
    st.builds(Format, st.just("affine"), st.sampled_from(KV_BITS), st.sampled_from(KV_GROUPS)),
)
DIMS = st.integers(1, 32).map(lambda n: 8 * n)
ENTRIES = st.one_of(
    st.builds(
        Entry, st.tuples(st.integers(0, 99)), st.sampled_from(("full", "mla")), FORMATS, FORMATS,
        st.integers(1, 16), DIMS, DIMS,
    ),
    st.builds(
        Entry, st.just((1, 3)), st.just("sliding"), FORMATS, FORMATS, st.integers(1, 16), DIMS,
        DIMS, st.integers(1, 4096),
    ),
    st.builds(Entry, st.just(()), st.just("recurrent")),
)  # fmt: skip
TEXT = st.none() | st.text(min_size=1)
IDENTITIES = st.builds(Identity, TEXT, TEXT, TEXT)
CONFIGS = st.builds(
    KVConfig, st.lists(ENTRIES, max_size=6).map(tuple), st.integers(0, 99), st.integers(0, 9),
    IDENTITIES, st.dictionaries(st.text(), st.floats(allow_nan=False)),
)  # fmt: skip
FULL = Entry((0,), "full", kv_heads=2, k_dim=128, v_dim=96)
STATE = Entry((1,), "recurrent")
SLIDING = Entry((2, 3), "sliding", kv_heads=1, k_dim=256, v_dim=256, window=512)
MLA = Entry((4,), "mla", kv_heads=1, k_dim=512, v_dim=64)
CACHES = (FULL, STATE, SLIDING, MLA)


def fmt(bits: int, group: int = 64) -> Format:
    return Format("affine", bits, group)


@settings(max_examples=60, deadline=None)
@given(CONFIGS)
def test_what_is_written_is_read(config: KVConfig) -> None:
    text = json.dumps(config.to_json())
    assert KVConfig.from_json(json.loads(text)) == config
    config.check(config.entries, config.model)


def test_files(tmp_path: Path) -> None:
    config = replace(
        KVConfig.uniform(CACHES, "8/4"), fp_recent=32, model=Identity(fingerprint="ab")
    )
    config.save(tmp_path / "kv_config.json")
    assert KVConfig.load(tmp_path / "kv_config.json") == config
    assert [p.name for p in tmp_path.iterdir()] == ["kv_config.json"]


@pytest.mark.parametrize(
    ("text", "k", "v"),
    [
        ("8/4", fmt(8), fmt(4, 32)),  # v of 96 elements
        ("k8v4", fmt(8), fmt(4, 32)),
        (" K8G64V4G32 ", fmt(8), fmt(4, 32)),
        ("k8g32v4g64", fmt(8, 32), fmt(4)),
        ("5", fmt(5), fmt(5, 32)),
        ("6g32", fmt(6, 32), fmt(6, 32)),
        ("16/3", DENSE, fmt(3, 32)),
        ("8/16", fmt(8), DENSE),
    ],
)
def test_widths_for_all(text: str, k: Format, v: Format) -> None:
    full, state, sliding, mla = KVConfig.uniform(CACHES, text).entries
    assert (full.k, full.v) == (k, v)
    assert state == STATE
    assert sliding.k.bits == k.bits
    assert mla.k.bits == k.bits
    assert mla.v == DENSE  # the rotated key


@pytest.mark.parametrize("text", ["8/", "/4", "8:4", "", "8/4/2", "v4k8", "-8/4"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        KVConfig.uniform(CACHES, text)


@pytest.mark.parametrize("text", ["7/4", "8/2", "8g128/4", "4g16", "16g64/4", "0"])
def test_widths_that_keys_and_values_do_not_have(text: str) -> None:
    with pytest.raises(KVError, match=r"no format .* use 3, 4, 5, 6 or 8 bits .* or 16 bits"):
        KVConfig.uniform(CACHES, text)


def test_bytes() -> None:
    config = KVConfig.uniform(CACHES, "8/4")
    full, state, sliding, mla = config.entries
    assert full.bytes_per_token == 2 * 4 * (
        record_words(128, fmt(8)) + record_words(96, fmt(4, 32))
    )
    assert full.bytes_per_token == 2 * (128 + 4 * 2 + 48 + 4 * 3)
    assert state.bytes_per_token == 0
    assert mla.bytes_per_token == 512 + 4 * 8 + 2 * 64
    assert config.bytes_per_token == full.bytes_per_token + mla.bytes_per_token
    assert sliding.nbytes(10_000) == 512 * sliding.bytes_per_token
    assert config.nbytes(100) == sum(e.bytes_per_token for e in config.entries) * 100
    assert FULL.bytes_per_token == 2 * 2 * (128 + 96)


def test_the_list_of_mlx_optiq() -> None:
    rows = [
        {"layer_idx": 0, "bits": 8, "group_size": 64},
        {"layer_idx": 2, "bits": 4, "group_size": 32},
        {"layer_idx": 3, "bits": 8, "group_size": 64},
    ]
    full, state, sliding, mla = KVConfig.from_json(rows, CACHES).entries
    assert (full.k, full.v) == (fmt(8), fmt(8))
    assert (sliding.k, sliding.v) == (fmt(4, 32), fmt(4, 32))
    assert (mla.k, mla.v) == (fmt(8), DENSE)
    assert state == STATE
    for change, error in (
        ({"layer_idx": 9}, "the model has no cache 9"),
        ({"bits": 7}, "no format 7g64"),
        ({"group_size": 128}, r"no format .g128"),
        ({"bits": None}, "is no {layer_idx"),
        ({"layer_idx": 1}, "recurrent"),
    ):
        with pytest.raises(KVError, match=error):
            KVConfig.from_json([rows[0] | change], CACHES)
    with pytest.raises(KVError, match="give the model"):
        KVConfig.from_json(rows)


def test_another_model() -> None:
    made = replace(KVConfig.uniform(CACHES, "8/4"), model=Identity(fingerprint="aa", tokenizer="t"))
    made.check(CACHES, Identity(fingerprint="aa", tokenizer="t"))
    made.check(CACHES)
    for key in ("fingerprint", "tokenizer"):
        with pytest.raises(KVError, match=f"another model .{key}"):
            made.check(CACHES, replace(made.model, **{key: "zz"}))
    with pytest.raises(KVError, match="has 4 caches and the model 3"):
        made.check(CACHES[:3])
    for name, value in (("k_dim", 64), ("v_dim", 64), ("kv_heads", 4), ("kind", "mla")):
        with pytest.raises(KVError, match=f"cache 0 has {name}"):
            made.check((replace(FULL, **{name: value}), *CACHES[1:]))
    with pytest.raises(KVError, match=r"cache 2 has window 512 .* and 256"):
        made.check((*CACHES[:2], replace(SLIDING, window=256), MLA))


def _changed(data: Any, path: str, value: Any) -> Any:
    at = data = json.loads(json.dumps(data))
    *parents, last = path.split(".")
    for part in parents:
        at = at[int(part) if isinstance(at, list) else part]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("format", "other", "not a KV configuration of this version"),
        ("version", 2, "not a KV configuration of this version"),
        ("entries", None, "incomplete"),
        ("entries", 7, "incomplete"),
        ("entries.0.k", None, "incomplete"),
        ("entries.0.layers", ["x"], "incomplete"),
        ("entries.1.cache", 5, "in order"),
        ("entries.0.k.bits", 2, "no format 2g"),
        ("entries.0.k.group", 128, r"no format .g128"),
        ("entries.0.k.mode", "nvfp4", "no mode 'nvfp4'"),
        ("entries.0.k_dim", 100, "100 elements"),
        ("entries.0.kind", "linear", "not a kind of cache"),
        ("entries.1.k", {"bits": 8, "group": 64, "mode": "affine"}, "recurrent"),
        ("fp_recent", -1, "fp_recent is -1"),
        ("fp_sink", 10**9, "fp_sink"),
        ("model", None, "incomplete"),
    ],
)
def test_damaged_files(tmp_path: Path, path: str, value: Any, error: str) -> None:
    data = _changed(KVConfig.uniform(CACHES, "8/4").to_json(), path, value)
    file = tmp_path / "kv.json"
    file.write_text(json.dumps(data))
    with pytest.raises(KVError, match=error) as raised:
        KVConfig.load(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(KVError, match=r"cannot be read|is neither a file nor bits"):
        KVConfig.load(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("8/4")
    with pytest.raises(KVError, match="cannot be read"):
        KVConfig.load(tmp_path / "text.json")
    (tmp_path / "number.json").write_text("8")
    with pytest.raises(KVError, match="not a KV configuration"):
        KVConfig.load(tmp_path / "number.json")
