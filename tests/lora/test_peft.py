"""Adapters of PEFT, there and back; what is not understood is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from optiq.errors import AdapterError
from optiq.kv.prefix import Key
from optiq.lora import peft
from optiq.lora.adapter import Adapter
from optiq.lora.layers import put
from optiq.lora.mounting import opened
from optiq.serve.engine.adapters import Mounted
from optiq.serve.engine.prefix import PrefixCache
from optiq.sources import load, resolve
from tests.lora.models import mixed_folder
from tests.lora.test_adapter import random_adapter, random_dora, same
from tests.tiny import tiny_folder

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def theirs(folder: Path, ranks: dict[str, int], **config: Any) -> dict[str, mx.array]:
    """A folder as PEFT writes it: square matrices too, which do not show that they are turned."""
    folder.mkdir()
    tensors = {}
    for i, (path, rank) in enumerate(ranks.items()):
        keys = mx.random.split(mx.random.key(i))
        tensors[f"base_model.model.{path}.lora_A.weight"] = mx.random.normal(
            (rank, 64), key=keys[0]
        )
        out = 64 if path == Q else 32
        tensors[f"base_model.model.{path}.lora_B.weight"] = mx.random.normal(
            (out, rank), key=keys[1]
        )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    return tensors


def changes(tensors: dict[str, mx.array], path: str, scale: float) -> Any:
    a, b = (np.asarray(tensors[f"base_model.model.{path}.lora_{x}.weight"]) for x in "AB")
    return scale * (b @ a)


def change(folder: Path, path: str) -> Any:
    adapter = opened(folder)
    a, b = (np.asarray(m) for m in adapter.terms[path])
    return adapter.scale * (a @ b).T


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, {Q: 2.0, V: 2.0}),
        ({"use_rslora": True}, {Q: 4.0, V: 4.0}),
        ({"r": 9, "rank_pattern": {"q_proj": 4, V: 4}}, {Q: 2.0, V: 2.0}),
        ({"alpha_pattern": {"v_proj": 2}}, {Q: 2.0, V: 0.5}),
        ({"alpha_pattern": {r"layers\.1\..*": 12}, "use_rslora": True}, {Q: 4.0, V: 6.0}),
    ],
)
def test_scales_are_those_of_peft(
    tmp_path: Path, config: dict[str, Any], scales: dict[str, float]
) -> None:
    tensors = theirs(tmp_path / "p", {Q: 4, V: 4}, **config)
    for path, scale in scales.items():
        assert np.abs(change(tmp_path / "p", path) - changes(tensors, path, scale)).max() < 1e-4


def test_ranks_may_differ(tmp_path: Path) -> None:
    tensors = theirs(tmp_path / "p", {Q: 4, V: 2}, rank_pattern={"v_proj": 2}, lora_alpha=4)
    assert opened(tmp_path / "p").ranks == {Q: 4, V: 2}
    for path, scale in ((Q, 1.0), (V, 2.0)):
        assert np.abs(change(tmp_path / "p", path) - changes(tensors, path, scale)).max() < 1e-4


def test_there_and_back(tmp_path: Path) -> None:
    adapter = random_adapter(mixed_folder(tmp_path), scale=0.75)
    peft.write(adapter, tmp_path / "p")
    found = opened(tmp_path / "p")
    assert found.scale == adapter.scale
    assert same(found, adapter)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_dora": True}, "magnitudes of .* do not fit"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 1]]}, "layer replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"alora_invocation_tokens": "<go>"}, "alora_invocation_tokens"),
        ({"r": 8}, "rank 4"),
        ({"lora_alpha": None}, "no lora_alpha"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    theirs(tmp_path / "p", {Q: 4}, **config)
    with pytest.raises(AdapterError, match=reason):
        peft.read(tmp_path / "p")


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_C.weight"])
def test_other_tensors_are_named(tmp_path: Path, name: str) -> None:
    tensors = theirs(tmp_path / "p", {Q: 4})
    tensors[f"base_model.model.{Q}.{name}"] = mx.zeros((4, 4))
    mx.save_safetensors(str(tmp_path / "p" / "adapter_model.safetensors"), tensors)
    with pytest.raises(AdapterError, match=name.split(".")[0]):
        peft.read(tmp_path / "p")


IDS = [[5, 6, 7, 8, 9, 7, 8, 5]]


@pytest.fixture
def real(tmp_path: Path) -> Any:
    """PEFT itself, and a model of transformers to put adapters beside."""
    torch: Any = pytest.importorskip("torch", reason="torch and peft are not installed")
    found: Any = pytest.importorskip("peft", reason="torch and peft are not installed")
    transformers: Any = pytest.importorskip("transformers")
    folder = tiny_folder(tmp_path)
    torch.manual_seed(0)

    def base(folder: Path = folder) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(model: Any, **options: Any) -> Any:
        with torch.no_grad():
            return model(torch.tensor(IDS), **options).logits.numpy()

    return SimpleNamespace(peft=found, folder=folder, base=base, logits=logits)


def ours(folder: Path, adapter: Adapter) -> Any:
    model = load(resolve(str(folder)), allow_quantized=True).model
    put(model, adapter.terms, adapter.scale, magnitudes=adapter.magnitudes)
    return np.asarray(model(mx.array(IDS)))


def assert_close(got: Any, expected: Any) -> None:
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("make", [random_adapter, random_dora])
def test_peft_computes_what_we_do(tmp_path: Path, real: Any, make: Any) -> None:
    adapter = make(real.folder)
    peft.write(adapter, tmp_path / "p")
    model = real.peft.PeftModel.from_pretrained(real.base(), tmp_path / "p")
    assert_close(ours(real.folder, adapter), real.logits(model))

    model.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    for path in adapter.terms:
        assert np.abs(change(tmp_path / "again", path) - change(tmp_path / "p", path)).max() < 1e-5
    assert again.ranks == adapter.ranks
    assert_close(ours(real.folder, again), ours(real.folder, adapter))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 12}},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 6}},
        {"use_dora": True, "rank_pattern": {"q_proj": 6}},
    ],
    ids=["plain", "rslora", "patterns", "some layers", "all-linear", "dora"],
)
def test_we_compute_what_peft_does(tmp_path: Path, real: Any, config: dict[str, Any]) -> None:
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    made = real.peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **targets
    )
    model = real.peft.get_peft_model(real.base(), made).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # at first they change nothing
            parameter.data *= 0.5 + np.random.default_rng(0).random(len(parameter), np.float32)
    model.save_pretrained(tmp_path / "p")
    expected = real.logits(model)
    assert np.abs(expected - real.logits(real.base())).max() > 0.01  # it does something
    assert_close(ours(real.folder, opened(tmp_path / "p")), expected)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "trained tokens"),
    ],
)
def test_what_peft_writes_and_we_do_not_read(
    tmp_path: Path, real: Any, config: dict[str, Any], reason: str
) -> None:
    made = real.peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **config})
    real.peft.get_peft_model(real.base(), made).save_pretrained(tmp_path / "p")
    with pytest.raises(AdapterError, match=reason):
        opened(tmp_path / "p")


def test_we_compute_what_peft_does_to_an_embedding(tmp_path: Path, real: Any) -> None:
    targets = ["q_proj", "embed_tokens", "lm_head"]
    made = real.peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    folder = tiny_folder(tmp_path, name="untied", tie_word_embeddings=False)
    model = real.peft.get_peft_model(real.base(folder), made).eval()
    model.save_pretrained(tmp_path / "p")
    adapter = opened(tmp_path / "p")
    assert_close(ours(folder, adapter), real.logits(model))
    peft.write(adapter, tmp_path / "again")
    again = real.peft.PeftModel.from_pretrained(real.base(folder), tmp_path / "again")
    assert_close(real.logits(again), real.logits(model))


def test_peft_activates_an_adapter_where_we_do(tmp_path: Path, real: Any) -> None:
    invocation = (7, 8)
    adapter = replace(random_adapter(real.folder), invocation=invocation)
    peft.write(adapter, tmp_path / "p")
    model = real.peft.PeftModel.from_pretrained(real.base(), tmp_path / "p")
    expected = real.logits(model, alora_offsets=[3])
    start = Mounted("a", adapter, PrefixCache(Key(""), 0)).start(IDS[0])
    assert start == len(IDS[0]) - 3 == 5
    plain = load(resolve(str(real.folder)), allow_quantized=True).model
    adapted = load(resolve(str(real.folder)), allow_quantized=True).model
    put(adapted, adapter.terms, adapter.scale)
    caches: list[Any] = make_prompt_cache(plain)
    before = plain(mx.array([IDS[0][:start]]), cache=caches)
    after = adapted(mx.array([IDS[0][start:]]), cache=caches)
    assert_close(np.asarray(mx.concatenate([before, after], axis=1)), expected)
