"""How long the sandbox takes to run nothing: the first run, later ones, a snippet, a verdict."""

from __future__ import annotations

import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from optiq.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="never run on a Mac")
CHECK = "def check(candidate): assert candidate(3) == 9"


def first_run() -> None:
    with Sandbox() as box:
        assert box.run("print(1)").status == "ok"


def test_cold(benchmark: BenchmarkFixture) -> None:
    benchmark(first_run)


def test_warm(benchmark: BenchmarkFixture) -> None:
    with Sandbox() as box:
        assert benchmark(box.run, "print(1)").status == "ok"


def test_snippet(benchmark: BenchmarkFixture) -> None:
    with Sandbox() as box, box.session() as session:
        assert benchmark(session.run, "print(1)").status == "ok"


def test_numpy_in_a_warm_session(benchmark: BenchmarkFixture) -> None:
    with Sandbox(packages=("numpy",)) as box:
        box.run("")

        def imported() -> None:
            with box.session() as session:
                assert session.run("import numpy\nnumpy.arange(3).sum()").status == "ok"

        benchmark(imported)


def test_verdict(benchmark: BenchmarkFixture) -> None:
    with Sandbox() as box:
        assert benchmark(box.judge, "def f(x): return x * x", CHECK, "f").passed


def test_interpreter(benchmark: BenchmarkFixture) -> None:
    pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")
    with Sandbox(level="interpreter") as box:
        assert benchmark(box.run, "print(1)").status == "ok"
