"""Options: read once from what users write, the same names in both."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import optiq
from optiq.errors import UsageError
from optiq.formats import DEFAULT_MENU, DENSE, Format
from optiq.planning.size import UNIFORM4_SIZE, Size
from optiq.quantize.options import OptionFields, Options


def test_every_field_can_be_written() -> None:
    assert set(OptionFields.__annotations__) == {field.name for field in fields(Options)}


def test_nothing_written_is_the_defaults() -> None:
    options = Options.parse()
    assert options == Options()
    assert (options.size, options.menu, options.formats) == (UNIFORM4_SIZE, DEFAULT_MENU, None)


def test_an_effort_sets_what_is_not_given() -> None:
    quick = Options.parse(effort="quick", tokens=None, sensitivity=None)
    assert (quick.sensitivity, quick.tokens) == ("fisher", 1024)
    given = Options.parse(effort="quick", tokens=99, sensitivity="kl")
    assert (given.sensitivity, given.tokens, given.held_out_tokens) == ("kl", 99, 1024)
    assert Options.parse(effort="normal") == Options()
    assert Options.parse(effort="best").tokens == 16384
    with pytest.raises(UsageError, match="unknown effort 'most'; use quick, normal or best"):
        Options.parse(effort="most")


def test_memory_is_bytes() -> None:
    assert Options.parse(memory="10GB").memory == 10**10
    assert Options.parse(memory=12345678).memory == 12345678
    with pytest.raises(UsageError, match="memory 5bpw is not a number of bytes; write 10GB"):
        Options.parse(memory="5bpw")
    for job in (optiq.sensitivity, optiq.frontier):
        with pytest.raises(UsageError, match="does not keep to memory=1000; leave it out"):
            job("model", "out", memory=1000)


def test_what_users_write_is_parsed() -> None:
    four = Format("affine", 4, 64)
    options = Options.parse(
        size=80_000, formats=[four, DENSE], calibration="mix.jsonl", scores="~/s"
    )
    assert options.size == Size.parse("80000")
    assert options.menu == options.formats == (four, DENSE)
    assert options.calibration == Path("mix.jsonl")
    assert options.scores == Path.home() / "s"
    assert Options.parse(formats="4g64,bf16").menu == options.menu


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"size": "4bits"}, "size '4bits' is not understood"),
        ({"formats": "q4"}, "format 'q4' is not understood"),
        ({"formats": []}, "the list of formats is empty"),
        ({"sensitivity": "x"}, "unknown sensitivity method 'x'; use auto, kl or fisher"),
        ({"reference": "x"}, "unknown reference 'x'; use auto, bf16 or uniform4"),
        ({"rounding": "best"}, "unknown rounding 'best'; use descent, search or minmax"),
        ({"seed": -1}, "the seed -1 is not between 0 and 4294967295"),
    ],
)
def test_what_is_not_understood_is_refused(written: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options.parse(**written)


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="sise"):
        Options.parse(sise="5bpw")  # type: ignore[call-arg]
