"""Adapters on a server: every answer is what its adapter alone gives, in any company."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from optiq.errors import AdapterError
from optiq.kv.prefix import Key
from optiq.lora import peft
from optiq.lora.adapter import write
from optiq.lora.gathered import Halved, Shadow, halved
from optiq.lora.layers import put
from optiq.lora.merging import combined, merge
from optiq.models.adaptable import adaptable
from optiq.runtime.loading import load
from optiq.serve.engine.adapters import Adapters
from optiq.serve.engine.engine import Engine
from optiq.serve.engine.prefix import PrefixCache
from optiq.serve.engine.request import Request, Sampling
from optiq.serve.engine.scheduler import Pace
from optiq.serve.opening import open_model
from tests.lora.models import mixed_folder
from tests.lora.test_adapter import random_adapter, random_dora
from tests.serve import cases
from tests.serve.cases import NEVER_ENDS, ask
from tests.serve.servers import MODEL, Asked, read_options, served

KEY = "an-admin-key"
ADMIN = {"authorization": f"Bearer {KEY}"}
ON = {str(token): bias for token, bias in NEVER_ENDS.items()}
NAMES = ("a", "b", "c")
ALL = (*NAMES, "dora")
PROMPTS = ("Where?", "Tell me of the river", "7 boxes, 12 pens")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, and adapters of it."""
    parent = tmp_path_factory.mktemp("adapters")
    found = {"model": mixed_folder(parent)}
    for seed, name in enumerate(NAMES):
        found[name] = parent / name
        write(random_adapter(found["model"], 0.2, seed), found[name])
    found["dora"] = parent / "dora"
    write(replace(random_dora(found["model"]), scale=0.2), found["dora"])
    return found


@contextmanager
def serving(folders: dict[str, Path], *names: str, **options: Any) -> Iterator[Asked]:
    mounted = tuple((name, str(folders[name])) for name in names)
    kv = options.pop("kv", None)
    read = read_options({"adapters": mounted, "admin_keys": (KEY,), **options})
    with served(open_model(str(folders["model"]), read, kv=kv), read) as asked:
        yield asked


def say(asked: Asked, name: str | None, prompt: str, **fields: Any) -> str:
    model = MODEL if name is None else f"{MODEL}:{name}"
    body = {"model": model, "temperature": 0, "max_tokens": 14, "logit_bias": ON, **fields}
    answer = asked.chat(prompt, **body)
    assert answer.model == model or fields.keys() & {"adapter", "lora"}
    return str(answer.choices[0].message.content)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[tuple[str | None, str], str]:
    """What each says on a server of its own; the model on one that knows no adapters."""
    found: dict[tuple[str | None, str], str] = {}
    for name in (None, *ALL):
        keys = {"admin_keys": ()} if name is None else {}
        with serving(folders, *([name] if name else []), **keys) as asked:
            found |= {(name, prompt): say(asked, name, prompt) for prompt in PROMPTS}
    assert len(set(found.values())) == len(found)
    return found


def test_any_mix_gives_what_each_alone_gives(
    folders: dict[str, Path], alone: dict[tuple[str | None, str], str]
) -> None:
    draw = random.Random(5)
    wanted = [(draw.choice((None, *ALL)), draw.choice(PROMPTS)) for _ in range(30)]
    assert {name for name, _ in wanted} == {None, *ALL}
    with serving(folders, *ALL) as asked, ThreadPoolExecutor(10) as pool:
        said = list(pool.map(lambda one: say(asked, *one), wanted))
    assert said == [alone[one] for one in wanted]


def test_with_keys_and_values_in_few_bits_too(folders: dict[str, Path]) -> None:
    wanted = [(name, prompt) for prompt in PROMPTS[:2] for name in ("a", None, "b")]
    with serving(folders, "a", "b", kv="8/4") as asked:
        one_by_one = [say(asked, *one) for one in wanted]
        assert len(set(one_by_one)) == len(wanted)
    with serving(folders, "a", "b", kv="8/4") as asked, ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda one: say(asked, *one), wanted)) == one_by_one


def test_more_adapters_than_places_take_turns(
    folders: dict[str, Path], alone: dict[tuple[str | None, str], str]
) -> None:
    with serving(folders, *NAMES, max_concurrent=2) as asked, ThreadPoolExecutor(6) as pool:
        wanted = [(name, prompt) for prompt in PROMPTS for name in (*NAMES, None)]
        said = list(pool.map(lambda one: say(asked, *one), wanted))
    assert said == [alone[one] for one in wanted]


def test_the_least_recently_used_gives_its_place_and_one_in_use_never(
    folders: dict[str, Path],
) -> None:
    model, _ = load(str(folders["model"]))
    adapters = Adapters(
        model, None, lambda: make_prompt_cache(model), slots=2, nbytes=1 << 20,
        prefix=lambda _: PrefixCache(Key(""), 0),
    )  # fmt: skip
    a, b, c = (adapters.mount(name, random_adapter(folders["model"], 0.2, i))
               for i, name in enumerate(NAMES))  # fmt: skip

    def beside() -> set[str]:
        return {m.name for m in (a, b, c) if m.slot is not None}

    adapters.model([a, b], ())
    assert beside() == {"a", "b"}
    adapters.model([b, a], ())
    adapters.model([c], ())  # b was used less recently than a
    assert beside() == {"a", "c"}
    adapters.model([b], in_use=(a,))  # a is the oldest, but an answer that waits has it
    assert beside() == {"a", "b"}
    assert len({a.slot, b.slot}) == 2


def test_mounting_never_changes_an_answer_that_runs(
    folders: dict[str, Path], alone: dict[tuple[str | None, str], str]
) -> None:
    """The name `a` comes to mean another adapter while answers are made."""
    with serving(folders, "a") as asked, ThreadPoolExecutor(4) as pool:
        began = threading.Event()
        long = {"max_tokens": 14}

        def ask() -> str:
            began.set()
            return say(asked, "a", PROMPTS[0], **long)

        first = pool.submit(ask)
        began.wait()
        for name in ("b", "c", "b"):
            mounted = asked.post(
                "/v1/load_lora_adapter",
                {"lora_name": "a", "lora_path": str(folders[name])},
                **ADMIN,
            )
            assert mounted["name"] == f"{MODEL}:a"
        assert first.result() in {alone[name, PROMPTS[0]] for name in NAMES}  # of one, whole
        # and never what the prompt cache holds of another
        for prompt in PROMPTS:
            assert say(asked, "a", prompt) == say(asked, "a", prompt) == alone["b", prompt]


SUM = "x+y=0.5"


def test_random_mixes_joins_and_mounts_equal_isolated_runs(folders: dict[str, Path]) -> None:
    """Names come to mean other adapters, or none, while answers begin, end and are cut off."""
    draw = random.Random(19)
    meant: dict[str, list[str | None]] = {"x": ["a"], "y": ["b"]}  # so far, by name
    mounted = dict.fromkeys(meant, 0)  # the first of these that may still be what is mounted
    over = threading.Event()

    def changes(asked: Asked) -> None:
        while not over.is_set():
            name, which = draw.choice("xy"), draw.choice((*NAMES, *NAMES, None))
            if which is meant[name][-1] is None:
                continue
            meant[name].append(which)
            verb, body = "unload", {"lora_name": name}
            if which:
                verb, body["lora_path"] = "load", str(folders[which])
            asked.post(f"/v1/{verb}_lora_adapter", body, **ADMIN)
            mounted[name] = len(meant[name]) - 1
            over.wait(draw.random() / 5)

    def one(asked: Asked, seed: int) -> tuple[str | None, str, str | None, dict[str, set[Any]]]:
        """What was asked, what was said (None: nothing is mounted), what names could mean."""
        draw = random.Random(seed)
        name, prompt = draw.choice((None, "x", "x", "y", "y", SUM)), draw.choice(PROMPTS[:2])
        body = {"model": f"{MODEL}:{name}" if name else MODEL, "temperature": 0, "logit_bias": ON}
        body |= {"max_tokens": 14, "messages": [{"role": "user", "content": prompt}]}
        if draw.random() < 0.3:
            with asked.http.stream(
                "POST", "/v1/chat/completions", json={**body, "stream": True}
            ) as s:
                next(s.iter_lines())
        before = dict(mounted)
        answer = asked.http.post("/v1/chat/completions", json=body)
        could = {n: set(meant[n][before[n] :]) for n in meant if name and n in name}
        if answer.status_code != 200:
            assert "is mounted" in answer.text
            return name, prompt, None, could
        return name, prompt, str(answer.json()["choices"][0]["message"]["content"]), could

    both = {**folders, "x": folders["a"], "y": folders["b"]}
    with serving(both, "x", "y", max_concurrent=3) as asked:
        with ThreadPoolExecutor(8) as pool:
            changing = pool.submit(changes, asked)
            found = list(pool.map(lambda seed: one(asked, seed), range(40)))
            over.set()
            changing.result()
        assert sum(said is not None for *_, said, _ in found) > 20
    with serving(both, "x", "y", prefix_memory=0) as asked:
        said_alone: dict[Any, str | None] = {}

        def truth(name: str | None, prompt: str, means: dict[str, str | None]) -> str | None:
            key = name, prompt, tuple(means.items())
            if None in means.values():
                return None
            if key not in said_alone:
                for each, which in means.items():
                    body = {"lora_name": each, "lora_path": str(folders[str(which)])}
                    asked.post("/v1/load_lora_adapter", body, **ADMIN)
                said_alone[key] = say(asked, name, prompt)
            return said_alone[key]

        for name, prompt, said, could in found:
            every = [dict(zip(could, which, strict=True)) for which in product(*could.values())]
            assert said in {truth(name, prompt, means) for means in every}, (name, prompt)
        assert len(set(said_alone.values())) > 5


def test_adapters_are_listed_asked_for_and_unmounted(
    folders: dict[str, Path], alone: dict[tuple[str | None, str], str]
) -> None:
    peft.write(random_adapter(folders["model"], 0.2, 2), folders["c"].with_name("peft"))
    with serving(folders, "a") as asked:
        load_c = {"lora_name": "c", "lora_path": str(folders["c"].with_name("peft"))}
        asked.post("/v1/load_lora_adapter", load_c, **ADMIN)
        prints = {
            asked.chat("hi", model=name, max_tokens=1).system_fingerprint
            for name in (MODEL, f"{MODEL}:a", f"{MODEL}:c")
        }
        assert len(prints) == 3
        ids = [model.id for model in asked.openai.models.list()]
        assert ids == [MODEL, f"{MODEL}:a", f"{MODEL}:c"]
        assert asked.openai.models.retrieve(f"{MODEL}:c").id == f"{MODEL}:c"
        assert say(asked, None, PROMPTS[0], adapter="c") == alone["c", PROMPTS[0]]
        message = asked.message(PROMPTS[0], model=f"{MODEL}:c", max_tokens=4)
        assert message.model == f"{MODEL}:c"
        unloaded = asked.post("/v1/unload_lora_adapter", {"lora_name": "c"}, **ADMIN)
        assert unloaded["mounted"] == ["a"]
        body = {"model": f"{MODEL}:c", "messages": [{"role": "user", "content": "hi"}]}
        refused = asked.post("/v1/chat/completions", body, status=404)
        assert refused["error"]["code"] == "model_not_found"
        body = {**body, "model": MODEL, "adapter": "c"}
        refused = asked.post("/v1/chat/completions", body, status=404)
        assert "mounted are a" in refused["error"]["message"]
        again = asked.post("/v1/unload_lora_adapter", {"lora_name": "c"}, status=400, **ADMIN)
        assert "no adapter 'c'" in again["error"]["message"]


def test_every_protocol_takes_an_adapter_in_the_name_or_by_its_field(
    folders: dict[str, Path],
) -> None:
    """With its most likely tokens, each says the same as chat completions."""
    hi = {"role": "user", "content": PROMPTS[1]}
    with serving(folders, *NAMES) as asked:

        def said(path: str, name: str, short: str, **fields: Any) -> str:
            texts = []
            for model in ({"model": f"{MODEL}:{name}"}, {"model": MODEL, "adapter": name}):
                answer = asked.post(path, {**model, "temperature": 0, **fields})
                assert answer["model"] == f"{MODEL}:{name}"
                found = answer
                for key in short.split("."):
                    found = found[int(key) if key.isdigit() else key]
                texts.append(str(found))
            assert texts[0] == texts[1]
            return texts[0]

        for name in NAMES:
            expected = said(
                "/v1/chat/completions", name, "choices.0.message.content",
                messages=[hi], max_tokens=6,
            )  # fmt: skip
            assert expected == said(
                "/v1/messages", name, "content.0.text", messages=[hi], max_tokens=6
            )
            assert expected == said(
                "/v1/responses", name, "output.0.content.0.text", input=[hi], max_output_tokens=6
            )
            said("/v1/completions", name, "choices.0.text", prompt=PROMPTS[1], max_tokens=6)
        for path, body in (
            ("/v1/responses", {"input": [hi]}),
            ("/v1/responses/input_tokens", {"input": [hi]}),
            ("/v1/messages", {"messages": [hi], "max_tokens": 6}),
            ("/v1/messages/count_tokens", {"messages": [hi]}),
            ("/v1/completions", {"prompt": "x"}),
        ):
            refused = asked.post(path, {"model": MODEL, "adapter": "z", **body}, status=404)
            assert "no adapter 'z' is mounted" in refused["error"]["message"]


def test_a_weighted_sum_is_mounted(
    folders: dict[str, Path], alone: dict[tuple[str | None, str], str]
) -> None:
    paths = {name: str(folders[name]) for name in NAMES}
    with serving(folders) as asked:
        for name, sum_ in (
            ("all-of-b", {paths["a"]: 0, paths["b"]: 1}),
            ("none", {paths["a"]: 0}),
            ("half", {paths["a"]: 0.5, paths["b"]: 0.5}),
        ):
            body = {"lora_name": name, "lora_path": sum_}
            asked.post("/v1/load_lora_adapter", body, **ADMIN)
        said = {name: say(asked, name, PROMPTS[0]) for name in ("all-of-b", "none", "half")}
        assert said["all-of-b"] == alone["b", PROMPTS[0]]
        assert said["half"] not in {alone[name, PROMPTS[0]] for name in (None, *NAMES)}
        for wrong in ({}, {paths["a"]: "x"}, {paths["a"]: 1e9}, 7):
            body = {"lora_name": "x", "lora_path": wrong}
            asked.post("/v1/load_lora_adapter", body, status=400, **ADMIN)


def test_a_request_names_a_weighted_sum(
    folders: dict[str, Path], alone: dict[tuple[str | None, str], str]
) -> None:
    """In the name, by the field, or as llama.cpp has it: what a sum says that was mounted."""
    half = {str(folders["a"]): 0.5, str(folders["b"]): 0.5}
    name = f"{MODEL}:a=0.5+b=0.5"
    with serving(folders, *NAMES) as asked, ThreadPoolExecutor(6) as pool:
        body = {"lora_name": "half", "lora_path": half}
        asked.post("/v1/load_lora_adapter", body, **ADMIN)
        expected = {prompt: say(asked, "half", prompt) for prompt in PROMPTS}
        ways: list[dict[str, Any]] = [
            {"model": f"{MODEL}:b=0.5+a=0.5"},
            {"model": MODEL, "adapter": "a=0.5+b=0.5+c=0"},
            {"model": MODEL, "lora": [{"id": "a", "scale": 0.5}, {"id": "b", "scale": 0.5}]},
        ]
        for way in ways:
            answer = asked.chat(PROMPTS[0], **way, max_tokens=14, temperature=0, logit_bias=ON)
            assert answer.model == name
            assert answer.choices[0].message.content == expected[PROMPTS[0]]
        mixed = [(one, prompt) for prompt in PROMPTS for one in ("a=0.5+b=0.5", "a", None)]
        said = list(pool.map(lambda of: say(asked, *of), mixed))
        assert said == [
            alone[one, prompt] if one in (None, "a") else expected[prompt] for one, prompt in mixed
        ]
        # A single one is itself, nothing is the model, and a part that is mounted anew is heard.
        assert say(asked, None, PROMPTS[0], lora=[{"id": "a"}]) == alone["a", PROMPTS[0]]
        assert (
            say(asked, None, PROMPTS[0], lora=[{"id": "a", "scale": 0}])
            == (alone[None, PROMPTS[0]])
        )
        body = {"lora_name": "b", "lora_path": str(folders["c"])}
        asked.post("/v1/load_lora_adapter", body, **ADMIN)
        assert say(asked, "a=0.5+b=0.5", PROMPTS[0]) != expected[PROMPTS[0]]


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"adapter": "a=0.5+z=0.5"}, 404, "no adapter 'z' is mounted"),
        ({"adapter": "a=0.5+a=0.5"}, 400, "name each once"),
        ({"adapter": "a=x+b"}, 400, "'a' with 'x'"),
        ({"adapter": "a=101"}, 400, "from -100 to 100"),
        ({"adapter": "a=nan"}, 400, "'nan'"),
        ({"adapter": "a+"}, 400, "''"),
        ({"adapter": "a", "lora": [{"id": "b"}]}, 400, "cannot be combined"),
        ({"lora": [{"scale": 1}]}, 400, "'lora[0].id' is required"),
        ({"lora": [{"id": 0}]}, 400, "must be a string"),
        ({"lora": [{"id": "a", "scale": 1e9}]}, 400, "at most 100"),
        ({"adapter": "a+b"}, 400, "--adapter-memory"),
    ],
)
def test_sums_that_cannot_be_are_refused(
    small: Asked, fields: dict[str, Any], status: int, reason: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **fields}
    refused = small.post("/v1/chat/completions", body, status=status)
    assert reason in refused["error"]["message"]


@pytest.fixture(scope="module")
def small(folders: dict[str, Path]) -> Iterator[Asked]:
    """Room for two adapters, and not for their sum."""
    opened = open_model(str(folders["model"]), read_options({"admin_keys": (KEY,)}))
    assert opened.adapters is not None
    nbytes = sum(
        opened.adapters.mount(n, random_adapter(folders["model"], 0.2, i)).nbytes
        for i, n in enumerate(NAMES[:2])
    )
    with serving(folders, "a", "b", adapter_memory=nbytes + 100) as asked:
        yield asked


def test_who_may_mount(folders: dict[str, Path]) -> None:
    body = {"lora_name": "b", "lora_path": str(folders["b"])}
    with serving(folders, "a", admin_keys=()) as asked:
        refused = asked.post("/v1/load_lora_adapter", body, status=403)
        assert "--admin-key-file" in refused["error"]["message"]
    with serving(folders, api_keys=("an-api-key",)) as asked:
        for key in ("none", "an-api-key"):
            given = {"authorization": f"Bearer {key}"}
            asked.post("/v1/load_lora_adapter", body, status=401, **given)
        asked.post("/v1/load_lora_adapter", body, **ADMIN)


def test_what_does_not_fit_is_refused_with_the_reason(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    other = mixed_folder(tmp_path, name="other", seed=3)
    write(random_adapter(other), tmp_path / "foreign")
    with serving(folders, "a", adapter_memory=50_000) as asked:
        for name, path, reason in (
            ("x", tmp_path / "foreign", "was made for"),
            ("x", tmp_path / "nowhere", "is not a folder"),
            ("x y", folders["b"], "not a name for an adapter"),
            ("b", folders["b"], "--adapter-memory"),
        ):
            body = {"lora_name": name, "lora_path": str(path)}
            refused = asked.post("/v1/load_lora_adapter", body, status=400, **ADMIN)
            assert reason in refused["error"]["message"]
        assert say(asked, "a", PROMPTS[0])
    with (
        pytest.raises(AdapterError, match="was made for"),
        serving({**folders, "x": tmp_path / "foreign"}, "x"),
    ):
        pass


def test_a_shadow_shares_weights_and_computes_each_row_with_its_adapter(
    folders: dict[str, Path],
) -> None:
    model, _ = load(str(folders["model"]))
    adapters = [random_adapter(folders["model"], 0.2, seed) for seed in range(2)]
    adapters.append(random_dora(folders["model"]))
    before = mx.get_active_memory()
    shadow = Shadow(model, 4)
    assert mx.get_active_memory() - before < 100_000
    ids = mx.array([[5, 6, 7, 8]])
    plain = model(ids)
    for slot in (1, 3, 2):
        shadow.fill(slot, halved(adapters[slot - 1], model))
    shadow.select([0, 3, 1, 2])
    got = shadow.model(mx.concatenate([ids] * 4))
    assert mx.array_equal(model(ids), plain)
    for row, adapter in ((0, None), (1, adapters[2]), (2, adapters[0]), (3, adapters[1])):
        truth, _ = load(str(folders["model"]))
        if adapter is not None:
            put(truth, adapter.terms, adapter.scale, magnitudes=adapter.magnitudes)
        expected = truth(ids)[0]
        assert mx.abs(got[row] - expected).max() <= 2e-3 * mx.abs(expected).max(), row
    assert len(adaptable(model)) == 14
    shadow.fill(2, Halved({}, {}))
    shadow.select([2])
    assert mx.abs(shadow.model(ids) - plain).max() <= 2e-3 * mx.abs(plain).max()


def test_an_activated_adapter_keeps_what_the_model_has_read(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """It works from the last invocation on, as PEFT's do; before, prompts are the base's."""
    invocation = (20, 21)
    adapter = replace(random_adapter(folders["model"], 0.2, 1), invocation=invocation)
    peft.write(adapter, tmp_path / "a")
    read = read_options({"adapters": (("a", str(tmp_path / "a")),)})
    opened = open_model(str(folders["model"]), read)
    engine = opened.engine
    engine.start()
    try:
        before = (*range(30, 60), *invocation, *range(60, 90))
        prompt = (*before, *invocation, 7, 8)
        sampling = Sampling(temperature=0, logit_bias=NEVER_ENDS)

        def said(tokens: tuple[int, ...], adapter: str | None) -> Any:
            request = Request(tokens, max_tokens=10, sampling=sampling, adapter=adapter)
            return ask(engine, request)

        base = said(prompt, None)
        first = said(prompt, "a")
        assert first.last.cached_tokens == len(before)
        again = said(prompt, "a")
        assert again.last.cached_tokens == len(prompt) - 1
        assert first.answer == again.answer != base.answer
        # Where the prompt has no invocation, it is the model itself.
        assert said(before[:30], "a").answer == said(before[:30], None).answer

        model, _ = load(str(folders["model"]))
        adapted, _ = load(str(folders["model"]))
        put(adapted, adapter.terms, adapter.scale)
        caches: list[Any] = make_prompt_cache(model)
        model(mx.array([before]), cache=caches)
        tokens, expected = list(prompt[len(before) :]), []
        for _ in range(10):
            logits = adapted(mx.array([tokens]), cache=caches)[0, -1]
            logits[mx.array(list(NEVER_ENDS))] = -mx.inf
            tokens = [int(mx.argmax(logits).item())]
            expected += tokens
        assert first.ids == expected
    finally:
        engine.close()


def test_prompts_and_guesses_are_read_in_the_steps_of_rows_with_any_adapters(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in passes of their own, which take as long as a step even for a few tokens."""
    monkeypatch.setattr("optiq.serve.engine.steps.worthwhile", lambda *_: 0.0)
    sampling = Sampling(temperature=0, logit_bias=NEVER_ENDS)
    asked = [
        Request(tuple(range(30 + i, 70 + 3 * i)), 60, sampling, top_logprobs=2, adapter=name)
        for i, name in enumerate((*NAMES[:2], None, "activated"))
    ]
    with_all = [
        ("activated", replace(random_adapter(folders["model"], 0.2, 2), invocation=(50, 51)))
    ]
    with_all += [(n, random_adapter(folders["model"], 0.2, i)) for i, n in enumerate(NAMES)]

    def engine_of_all() -> Engine:
        opened = open_model(str(folders["model"]), read_options({"admin_keys": (KEY,)}))
        assert opened.adapters is not None
        for name, adapter in with_all:
            opened.adapters.mount(name, adapter)
        return opened.engine

    alone = engine_of_all()
    assert alone._measured.beside
    assert alone._measured.drafts
    alone._measured = replace(alone._measured, drafts=False)
    alone.start()
    expected = [ask(alone, request).answer for request in asked]
    alone.close()
    assert len(set(map(str, expected))) == len(asked)

    engine = engine_of_all()  # not started: this thread takes the steps
    steps, sequences = engine._steps, engine._sequences
    plan, pace = engine._scheduler.plan, Pace(step=1.0, token=0.25)  # slices of eight tokens
    monkeypatch.setattr(engine._scheduler, "plan", lambda _: plan(pace))
    told = [cases.Asked(engine, request) for request in asked[:3]]
    while min(len(engine._answers[t.ticket].generated) for t in told) < 2:
        steps.take()
    read, beside = sequences.read, sequences.logits
    passes: list[tuple[int, int]] = []  # rows that decode beside it, tokens

    def reading(ticket: int, begin: int, tokens: Any) -> None:
        passes.append((0, len(tokens)))
        read(ticket, begin, tokens)

    def decoding(tickets: Any, inputs: Any, *reader: Any) -> Any:
        if reader:
            passes.append((len(tickets), len(reader[2])))
        return beside(tickets, inputs, *reader)

    monkeypatch.setattr(sequences, "read", reading)
    monkeypatch.setattr(sequences, "logits", decoding)
    told.append(cases.Asked(engine, asked[3]))
    while engine.stats().running:
        steps.take()
    assert [t.result().answer for t in told] == expected
    assert {rows for rows, _ in passes} == {3}
    assert [tokens for _, tokens in passes] == [8, 8, 1, 8, 8, 8, 4]  # the 18th is the invocation
    assert 0 < engine.stats().accepted_tokens < engine.stats().drafted_tokens


def test_an_activated_adapter_is_refused_where_it_would_always_work(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = replace(random_adapter(folders["model"]), invocation=(40, 41))
    peft.write(adapter, tmp_path / "a")
    found = peft.read(tmp_path / "a")
    assert found.invocation == adapter.invocation
    assert found.digest == adapter.digest != random_adapter(folders["model"]).digest
    for refused in (
        lambda: load(str(folders["model"]), adapter=tmp_path / "a"),
        lambda: write(found, tmp_path / "mlx"),
        lambda: combined([(found, 0.5)]),
        lambda: merge(folders["model"], [(found, 1.0)], tmp_path / "merged"),
    ):
        with pytest.raises(AdapterError, match="aLoRA"):
            refused()
