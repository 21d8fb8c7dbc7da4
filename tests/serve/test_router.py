"""Models on demand: by bytes, never a busy one, none lost."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import pytest

from optiq.cli.serve import alias
from optiq.errors import SourceError, UsageError
from optiq.serve.opening import open_model
from optiq.serve.options import Options
from optiq.serve.protocols.problems import Refusal
from optiq.serve.router import Place, Router, places_in
from optiq.serve.running import Running
from optiq.serve.server import Server, bind
from tests.serve.scripted import ScriptedModel
from tests.serve.servers import tiny_tokenizer
from tests.tiny import tiny_folder

NAMES = ("a", "b", "c", "d")


class Fake:
    """A model whose loading takes a while, and which notes that it is closed."""

    def __init__(self, place: Place, log: list[tuple[str, str]]) -> None:
        self.place, self.log, self.busy = place, log, 0
        self.service: Any = self
        self.engine = SimpleNamespace(context=512, stats=lambda: None)
        log.append(("load", place.name))

    def close(self, drain: float = 0.0) -> None:
        assert self.busy == 0, "unloaded while it answers"
        self.log.append(("unload", self.place.name))


def router(memory: int = 220, fails: str = "", **options: Any) -> tuple[Router, list[Any]]:
    """Four models of 90 bytes and a share of 10."""
    log: list[Any] = []

    def load(place: Place) -> Any:
        time.sleep(0.002)
        if place.name == fails:
            raise SourceError("half of it is missing")
        return Fake(place, log)

    places = [Place(name, Path(name), 90) for name in NAMES]
    return Router(places, load, memory=memory, share=10, **options), log


async def ask(models: Router, name: str | None, seconds: float = 0.0) -> str:
    async with models.use(name) as service:
        fake: Any = service
        fake.busy += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            fake.busy -= 1
        return str(fake.place.name)


def test_the_least_recently_used_makes_room() -> None:
    models, log = router()

    async def run() -> None:
        for name in ("a", "b", "a", "c", "a", "b"):
            assert await ask(models, name) == name

    asyncio.run(run())
    loads = [name for what, name in log if what == "load"]
    unloads = [name for what, name in log if what == "unload"]
    assert (loads, unloads) == (["a", "b", "c", "b"], ["b", "c"])
    assert [model.loaded for model in models.listed()] == [True, True, False, False]


def test_a_busy_model_stays_and_nobody_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models that are never idle; a third one is asked for."""
    monkeypatch.setattr("optiq.serve.router.PATIENCE", 0.05)
    models, log = router()

    async def keep_busy(name: str, until: asyncio.Event) -> None:
        while not until.is_set():
            await asyncio.gather(ask(models, name, 0.02), ask(models, name, 0.03))

    async def run() -> None:
        done = asyncio.Event()
        busy = [asyncio.create_task(keep_busy(name, done)) for name in ("a", "b")]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(ask(models, "c"), 20) == "c"
        done.set()
        await asyncio.gather(*busy)

    asyncio.run(run())
    assert ("load", "c") in log


def test_under_load_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 requests for 4 models in memory for 2; a third of the clients go away."""
    monkeypatch.setattr("optiq.serve.router.PATIENCE", 0.02)
    monkeypatch.setattr("gc.collect", lambda: 0)  # a hundred times, in a process full of tests
    models, log = router()
    chosen = random.Random(5)

    async def run() -> list[Any]:
        tasks = []
        for number in range(200):
            name = chosen.choice(NAMES)
            tasks.append(asyncio.create_task(ask(models, name, chosen.random() * 0.01)))
            if number % 3 == 0:
                asyncio.get_running_loop().call_later(chosen.random() * 0.05, tasks[-1].cancel)
            await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    assert all(isinstance(a, (str, asyncio.CancelledError)) for a in answers)
    assert sum(isinstance(a, str) for a in answers) >= 133
    together: Counter[str] = Counter()
    for what, name in log:
        together[name] += 1 if what == "load" else -1
        assert sum(together.values()) <= 2


def test_names_aliases_and_errors() -> None:
    models, _ = router(fails="d", aliases=[("claude-*", "b")], default="a")

    async def run() -> None:
        assert await ask(models, "claude-x") == "b"
        assert await ask(models, None) == "a"
        for _ in range(2):
            with pytest.raises(Refusal, match="half of it is missing"):
                await ask(models, "d")
        assert await ask(models, "a") == "a"

    asyncio.run(run())
    assert models.find("claude-x").name == "b"
    with pytest.raises(Refusal, match="'a', 'b', 'c', 'd'"):
        models.find("gpt-x")
    with pytest.raises(UsageError, match="no model 'x'"):
        router(pinned=["x"])
    with pytest.raises(UsageError, match="pinned"):
        router(pinned=["a", "b", "c"])


def test_pinned_models_stay() -> None:
    models, log = router(pinned=["a"])
    models.start()

    async def run() -> None:
        for name in ("b", "c", "d", "b"):
            await ask(models, name)

    asyncio.run(run())
    assert ("unload", "a") not in log
    big, _ = router(memory=150, pinned=["a"])
    with pytest.raises(Refusal, match="needs"):
        asyncio.run(ask(big, "b"))


def test_idle_models_go() -> None:
    models, log = router(idle=0.05)

    async def run() -> None:
        await ask(models, "a")
        while ("unload", "a") not in log:
            await asyncio.sleep(0.02)
        assert await ask(models, "a") == "a"

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("collected", [True, False])
def test_an_unloaded_model_leaves_nothing_behind(
    collected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody holds it when the next one is loaded, or its memory would not be free: not a thread
    that is late, as others keep the interpreter busy. `collected`: it is part of a cycle."""
    if not collected:
        monkeypatch.setattr("gc.collect", lambda: 0)
    alive: weakref.WeakSet[Fake] = weakref.WeakSet()
    log: list[Any] = []

    def load(place: Place) -> Any:
        assert len(alive) <= 1
        fake = Fake(place, log)
        if not collected:
            fake.service = None
        alive.add(fake)
        return fake

    places = [Place(name, Path(name), 90) for name in NAMES]
    models = Router(places, load, memory=220, share=10)

    async def use(name: str) -> None:
        async with models.use(name):
            pass

    async def run() -> None:
        for name in NAMES * 5:
            await use(name)

    done = threading.Event()

    def keep_busy() -> None:
        while not done.is_set():
            sum(range(1000))

    busy = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in busy:
        thread.start()
    try:
        asyncio.run(run())
    finally:
        done.set()
        for thread in busy:
            thread.join()
    assert len(log) > 30


def test_places(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"1234")
    (tmp_path / "notes.txt").write_text("x")
    found = {place.name: place.nbytes for place in places_in(tmp_path)}
    assert found == {folder.name: (folder / "model.safetensors").stat().st_size, "x": 4}
    for wrong in (tmp_path / "nothing", folder):
        with pytest.raises(UsageError, match="--models-dir"):
            places_in(wrong)


class Watched(Running):
    """Notes how many answers were open whenever a model was unloaded."""

    closed: ClassVar[list[int]] = []

    def close(self, drain: float = 0.0) -> None:
        stats = self.engine.stats()
        self.closed.append(stats.running + stats.waiting)
        super().close(drain)


@pytest.fixture(scope="module")
def routed() -> Iterator[str]:
    """Real engines of scripted models behind HTTP."""
    tokenizer = tiny_tokenizer()
    options = Options(port=0, drain=0.0, prefix_memory=10**7, preparing_seconds=120.0)

    def load(shared: Any, place: Place) -> Running:
        own = Options(name=place.name, aliases=("*",), prefix_memory=10**7)
        model = ScriptedModel(tokenizer, 512)
        running = Watched(open_model((model, tokenizer), own), shared)
        running.engine.start()
        return running

    def services(shared: Any) -> Router:
        places = [Place(name, Path(name), 90) for name in NAMES]
        return Router(places, partial(load, shared), memory=220, share=10, aliases=[("gpt-*", "c")])

    Watched.closed.clear()
    with pytest.MonkeyPatch.context() as patched, bind(options) as bound:
        patched.setattr("optiq.serve.router.PATIENCE", 0.2)
        with Server(services, bound, options) as server:
            yield server.url


@pytest.mark.parametrize("requests", [24, pytest.param(200, marks=pytest.mark.fuzz)])
def test_over_http_every_request_is_answered(routed: str, requests: int) -> None:
    """For 4 models in memory for 2."""
    chosen = random.Random(7)
    jobs = [(chosen.choice(NAMES), f"word {number}") for number in range(requests)]

    def send(job: tuple[str, str]) -> tuple[str, str]:
        name, word = job
        body = {"model": name, "messages": [{"role": "user", "content": f"SAY:{word}"}]}
        answer = httpx.post(f"{routed}/v1/chat/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        whole = answer.json()
        return whole["model"], whole["choices"][0]["message"]["content"]

    before = threading.active_count()
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(send, jobs)) == jobs
    assert len(Watched.closed) >= 2  # four were loaded, and two stay
    assert not any(Watched.closed)
    assert threading.active_count() <= before + 12
    listed = httpx.get(f"{routed}/v1/models").json()["data"]
    assert sum(model["loaded"] for model in listed) <= 2
    status = httpx.get(f"{routed}/status").json()
    assert 0 < len(status["models"]) <= 2
    missing = httpx.post(f"{routed}/v1/messages", json={"model": "zz"}, timeout=60)
    assert (missing.status_code, missing.json()["type"]) == (404, "error")
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": "SAY:x"}]}
    assert httpx.post(f"{routed}/v1/chat/completions", json=body, timeout=60).json()["model"] == "c"


def test_real_models_of_a_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny_folder(tmp_path / name).rename(tmp_path / f"m-{name}")
        (tmp_path / name).rmdir()
    options: Any = {"port": 0, "drain": 0.0, "models_dir": tmp_path, "pinned": ("m-one",)}
    with Server.open(memory=10**9, **options) as server:
        ask: Any = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
        for name in ("m-one", "m-two"):
            answer = httpx.post(
                f"{server.url}/v1/chat/completions", json={"model": name, **ask}, timeout=120
            ).json()
            assert answer["model"] == name
        listed = {m["id"]: m for m in httpx.get(f"{server.url}/v1/models").json()["data"]}
        assert [listed[n]["loaded"] for n in ("m-one", "m-two")] == [True, True]
        assert listed["m-one"]["pinned"]
        assert "m-one, m-two is served" in server.greeting()


def test_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give a model"):
        Server.open(port=0)
    with pytest.raises(UsageError, match="not both"):
        Server.open("x", port=0, models_dir=tmp_path)
    with pytest.raises(UsageError, match="has no model"):
        Server.open(port=0, models_dir=tmp_path)
    for adapters in ({"adapters": (("a", "b"),)}, {"admin_keys": ("an-admin-key",)}):
        with pytest.raises(UsageError, match="adapters belong to one model"):
            Server.open(port=0, models_dir=tmp_path, **adapters)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="PATTERN=NAME"):
        alias("claude-*")
    assert alias("claude-*=a") == ("claude-*", "a")
