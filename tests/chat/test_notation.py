"""The notation of a model is found in its template and its vocabulary."""

from __future__ import annotations

import importlib
import pkgutil

import mlx_lm.tool_parsers
import pytest

from optiq.chat.notation import Span, named, notation
from tests.chat.answers import ARGUMENTS, CALLS, calls_of, read
from tests.chat.templates import family, wrapped


@pytest.mark.parametrize(
    ("name", "expected", "reasons"),
    [
        ("qwen3", "json_tools", True),
        ("always thinks", "json_tools", True),
        ("deepseek_v31", "deepseek_v31", True),
        ("llama3", "llama3", False),
        ("mistral", "mistral", False),
        ("kimi_k2", "kimi_k2", False),
        ("deepseek_r1", "json_tools", True),  # its template leaves out what tools there are
    ],
)
def test_families(name: str, expected: str, reasons: bool) -> None:
    found = notation(family(name))
    assert found.name == expected
    assert found.reasoning == (Span("<think>", "</think>") if reasons else None)
    assert found.channels is None


def test_harmony_reasons_in_a_channel() -> None:
    found = notation(family("harmony"))
    assert found.name == "harmony"
    assert found.channels is not None
    assert found.channels.reasoning == "analysis"


def test_every_parser_of_mlx_lm_has_a_notation() -> None:
    parsers = {module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)}
    assert parsers - {"laguna"} <= {case.partition(",")[0] for case in CALLS}
    laguna = importlib.import_module("mlx_lm.tool_parsers.laguna")
    assert laguna.parse_tool_call.__module__ == "mlx_lm.tool_parsers.glm47"
    for name in parsers - {"laguna"}:
        module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
        form = named(name).calls[0]
        assert form.start == module.tool_call_start
        assert form.end == module.tool_call_end


def test_a_template_without_tools_is_told_of_them_in_text() -> None:
    found = notation(wrapped("{% for m in messages %}{{ m.content }}{% endfor %}"))
    assert found.name == "json_tools"
    assert notation(wrapped(None)).name == "json_tools"


def test_calls_that_a_conversation_as_text_asks_for_are_read_of_any_model() -> None:
    for name in ("llama3", "mistral", "deepseek_v31", "deepseek_r1"):
        for case in (name.replace("_r1", "_v31"), "json_tools"):
            assert calls_of(read(notation(family(name)), CALLS[case])[0]) == [("price", ARGUMENTS)]


def test_structure_that_no_client_should_see() -> None:
    marks = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
    found = notation(wrapped("{{ tools }}{{ messages }}", ("<s>", *marks)))
    assert found.name == "kimi_k3"
    assert "<|close|>message<|sep|>" in found.dropped
    assert found.reasoning == Span("<|open|>think<|sep|>", "<|close|>think<|sep|>")
