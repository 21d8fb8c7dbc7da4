"""What adapters cost a server: streams with them against streams without, and mounting meanwhile.

    python -m bench.adapters MODEL [ROUNDS]

16 random adapters of rank 16 on all layers are mounted. In turn, 8 streams without an adapter, with
4 of them with one each, and with all 8, run to the end. Printed are tokens a second of all streams
together, and what the others reach of those without, with quartiles. Tokens are drawn at
temperature 1: the most likely ones of so small a model go round in circles, and then guesses of
repeated text decide which streams are faster. Then an adapter of rank 8 is read from a file in
float32 and mounted: the processor time that this takes while nothing runs, how long it takes while
8 streams with adapters run, and the longest gap between two tokens of a stream meanwhile, in
medians of all gaps.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from optiq.base.background import in_background
from optiq.lora.adapter import Adapter, Base, write
from optiq.lora.layers import LowRank
from optiq.lora.mounting import opened
from optiq.models.adaptable import adaptable
from optiq.serve.answering import Engine
from optiq.serve.engine.request import Event, Failed, Finished, Piece, Request, Sampling
from optiq.serve.opening import open_model
from optiq.serve.options import Options
from optiq.sources import load, resolve

MOUNTED, STREAMS, TOKENS = 16, 8, 160


class Streams(NamedTuple):
    """`times` of each stream's tokens; `during` what was done meanwhile, if anything."""

    times: list[list[float]]
    during: tuple[float, float] | None

    @property
    def speed(self) -> float:
        """Tokens a second, while all streams ran."""
        begin, end = max(t[0] for t in self.times), min(t[-1] for t in self.times)
        return sum(begin < at <= end for t in self.times for at in t) / (end - begin)

    def gap(self) -> float:
        """The longest between two tokens meanwhile, in medians of all."""
        begin = max(t[0] for t in self.times)
        pairs = [p for t in self.times for p in pairwise(t) if p[0] >= begin]
        first, last = self.during or (begin, np.inf)
        longest = max(b - a for a, b in pairs if b > first and a < last)
        return float(longest / np.median([b - a for a, b in pairs]))


def run(
    engine: Engine, adapters: list[str | None], meanwhile: Callable[[], None] | None = None
) -> Streams:
    over = threading.Semaphore(0)
    times: list[list[float]] = [[] for _ in adapters]

    def listener(own: list[float]) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, Piece) and event.tokens:
                own.append(time.perf_counter())
            elif isinstance(event, (Finished, Failed)):
                assert isinstance(event, Finished), event
                over.release()

        return listen

    for i, (adapter, own) in enumerate(zip(adapters, times, strict=True)):
        sampling = Sampling(seed=i, logit_bias=dict.fromkeys(range(3), -100.0))
        prompt = tuple(range(100 + i, 120 + i))
        asked = Request(prompt, TOKENS, sampling, adapter=adapter, client=str(i))
        engine.submit(asked, listener(own))
    during = None
    if meanwhile:
        while min(map(len, times)) < 10:
            time.sleep(0.002)
        began = time.perf_counter()
        meanwhile()
        during = began, time.perf_counter()
    for _ in adapters:
        over.acquire()
    return Streams(times, during)


def random_adapter(model: Path, rank: int, seed: int) -> Adapter:
    source = resolve(str(model))
    terms = {}
    for i, module in enumerate(adaptable(load(source, allow_quantized=True).model)):
        out, width = module.shape
        a, b = mx.random.split(mx.random.key(1000 * seed + i))
        terms[module.path] = LowRank(
            0.02 * mx.random.normal((width, rank), key=a),
            0.0005 * mx.random.normal((rank, out), key=b),  # so that answers are still text
        )
    mx.eval([*terms.values()])
    return Adapter(terms, 2.0, Base(source.name, source.fingerprint))


def quartiles(values: list[float]) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    model = Path(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    options = Options(port=0, prefix_memory=0, adapter_memory=10**9, admin_keys=("not used",))
    server = open_model(str(model), options)
    assert server.adapters
    for i in range(MOUNTED):
        server.adapters.mount(f"a{i}", random_adapter(model, 16, i))
    engine = server.engine
    engine.start()
    names: list[str | None] = [f"a{i}" for i in range(STREAMS)]
    none: list[str | None] = [None] * STREAMS
    half = none[: STREAMS // 2] + names[: STREAMS // 2]
    kinds = {"without": none, "half": half, "all": names}
    run(engine, names)
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, asked in kinds.items():
            speeds[kind].append(run(engine, asked).speed)
    print(f"{STREAMS} streams without adapters: {quartiles(speeds['without'])} tokens a second")
    for kind in ("half", "all"):
        share = quartiles(list(np.divide(speeds[kind], speeds["without"])))
        print(f"{kind} of them with an adapter each: {share} times as many")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "new"
        new = random_adapter(model, 8, 99)
        write(new, file)
        mounted = server.adapters.mount
        alone: list[float] = []
        took: list[float] = []

        def mount(seconds: Callable[[], float], into: list[float]) -> None:
            began = seconds()
            in_background(lambda: mounted("new", opened(file)))
            into.append(1e3 * (seconds() - began))

        def meanwhile() -> None:
            mount(time.perf_counter, took)
            asked = Request((1, 2, 3), 3, Sampling(temperature=0), adapter="new", client="new")
            engine.submit(asked, lambda event: None)

        for _ in range(rounds):
            mount(time.process_time, alone)
        gaps: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for mounting in gaps:
                gaps[mounting].append(run(engine, names, meanwhile if mounting else None).gap())
    print(f"mounting {new.nbytes / 1e6:.1f} MB: {quartiles(alone)} ms of a processor while idle")
    print(f"beside the streams: {quartiles(took)} ms")
    print(f"longest gap of a stream: {quartiles(gaps[True])} medians meanwhile")
    print(f"and with no mount, in all its time: {quartiles(gaps[False])}")
    engine.close()


if __name__ == "__main__":
    main()
