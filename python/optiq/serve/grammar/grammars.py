"""The form of an answer as a guide that the engine follows."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np

from ...chat.notation import Notation, Span
from ...errors import OptiqError, RequestError, ServeError
from ..engine.request import Guide
from .calls import Function, optional_calls, required_calls
from .form import AnswerForm, Tool
from .guides import AfterReasoning, Budget, GrammarGuide, Words
from .lark import ANY, Rules, quoted
from .notations import FORMS, FRAMES, CallForm, Frame
from .params import Unwritable, schema_value

# Limits for one request; llguidance's own keep the work of compiling and of a step in bounds.
MOST_BYTES = 1 << 20
NAME = r"[\w.-]{1,128}"
# Compiled grammars that are kept: agents send the same tools in each request.
MOST_KEPT = 64


class Grammars:
    """Compiles forms of answers for one model.

    `tokenizer` is mlx-lm's TokenizerWrapper; `vocabulary` the rows of the embedding, which may be
    more than the tokenizer has.
    """

    def __init__(self, tokenizer: Any, notation: Notation, vocabulary: int) -> None:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise OptiqError(
                "structured output needs llguidance: pip install 'optiq-mlx[serve]'"
            ) from None
        words: Mapping[str, int] = tokenizer.get_vocab()
        ends = sorted(tokenizer.eos_token_ids)
        self._size = max(vocabulary, max(words.values()) + 1)
        self._known = _bits((id for id in words.values() if id < vocabulary), vocabulary)
        self._free = self._known & ~_bits((id for id in ends if id < vocabulary), vocabulary)
        self._matcher = LLMatcher
        self._tokenizer: Any = None
        self._special: dict[str, int] = {}
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend = copy(backend)
            backend.no_padding()
            backend.no_truncation()
            self._tokenizer = LLTokenizer(backend.to_str(), n_vocab=self._size, eos_token=ends)
            for id, token in backend.get_added_tokens_decoder().items():
                if self._tokenizer.is_special_token(id):
                    self._special[token.content] = id
        self._notation = notation
        self._frame = FRAMES.get(notation.name, Frame(""))
        self._calls = _call_form(notation, self._special)
        span = notation.reasoning or Span(self._frame.reasoning, self._frame.reasoned)
        self._reasons = bool(span.start)
        self._begin: list[int] = tokenizer.encode(span.start, add_special_tokens=False)
        self._end: list[int] = tokenizer.encode(span.end, add_special_tokens=False)
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, form: AnswerForm) -> Callable[[], Guide] | None:
        """What makes a guide for each answer of this form; None if anything goes.

        A `RequestError` with the param "response_format" or "tools" says what cannot be held to.
        """
        matcher = self._compiled(form)
        budget = form.reasoning_budget if self._reasons else None
        if matcher is None and budget is None:
            return None
        # In a frame reasoning is part of the grammar.
        apart = self._notation.reasoning is not None and (
            form.reasoning or self._frame == Frame("")
        )

        def make() -> Guide:
            guide: Guide | None = None
            if matcher is not None:
                guide = GrammarGuide(matcher.deep_copy(), self._size, self._known)
                if apart:
                    guide = AfterReasoning(
                        self._begin, self._end, self._free, guide, inside=form.reasoning
                    )
            if budget is not None:
                guide = Budget(self._begin, self._end, budget, guide, inside=form.reasoning)
            assert guide is not None
            return guide

        return make

    def _compiled(self, form: AnswerForm) -> Any:
        """A matcher at the beginning of the answer; None if anything goes."""
        key = _key(form)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        matcher = None
        try:
            source = self._source(form)
        except RecursionError:
            raise RequestError("the schema is nested too deeply", "response_format") from None
        if source is not None:
            matcher = self._matcher(self._tokenizer, source, log_level=0)
            self._try(matcher, "response_format" if form.kind != "text" else "tools")
        with self._lock:
            self._kept[key] = matcher
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return matcher

    def _try(self, matcher: Any, param: str) -> None:
        """Look for the first token already here: some grammars have none, or take too long."""
        if not matcher.is_error():
            words = np.zeros_like(self._known)
            try:
                GrammarGuide(matcher.deep_copy(), self._size, self._known).allow(words)
            except ServeError as error:
                raise RequestError(str(error), param) from None
        else:
            raise _refusal(matcher.get_error(), param)

    def _source(self, form: AnswerForm) -> str | None:
        """The grammar of the answer after its reasoning, as llguidance takes it."""
        answer = _answer(form)
        tools = form.tools if form.tool_choice != "none" else ()
        forced = bool(tools) and form.tool_choice != "auto"
        loose = form.parallel and not any(tool.strict for tool in tools)
        if answer is None and not forced and (not tools or loose):
            return None
        if self._tokenizer is None:
            raise RequestError(
                "this model's tokenizer is written in Python, so its answers cannot be held to a "
                "form; ask for text",
                "response_format" if answer else "tools",
            )
        rules = Rules(self._special)
        start = self._start(form, rules, tools, forced, answer is not None)
        grammars = [{"name": "top", "lark_grammar": rules.grammar(start)}]
        if answer is not None:
            grammars.append({"name": "answer", "lark_grammar": answer})
        return json.dumps({"grammars": grammars})

    def _start(
        self, form: AnswerForm, rules: Rules, tools: Sequence[Tool], forced: bool, shaped: bool
    ) -> str:
        named = [tool for tool in tools if tool.name == form.tool_choice]
        if forced and not named and form.tool_choice != "required":
            raise RequestError(f"the request has no tool {form.tool_choice!r}", "tool_choice")
        functions = [self._function(tool) for tool in (named or tools)]
        several = form.parallel and not named
        frame = self._frame
        content = "@answer" if shaped else rules.terminal(ANY)
        text = f"{rules.exactly(frame.open)} {content} {rules.exactly(frame.close)}"
        if forced:
            start = required_calls(rules, self._calls, functions, several)
        elif not tools:
            start = text
        elif shaped or frame.open:
            start = f"{text} | {required_calls(rules, self._calls, functions, several)}"
        else:
            start = optional_calls(rules, self._calls, functions, several)
        if frame.reasoning:
            reasoned = rules.until(frame.reasoned + frame.turn)
            start = f"({rules.exactly(frame.reasoning)} {reasoned})* ({start})"
        return start

    def _function(self, tool: Tool) -> Function:
        """A tool with the schema that its arguments are held to: of one that is not strict, only
        what can be."""
        if not re.fullmatch(NAME, tool.name):
            raise RequestError(
                f"tool {tool.name!r}: a name has up to 128 letters, digits, dots, - and _", "tools"
            )
        try:
            self._check_tool(tool)
        except Unwritable as error:
            if tool.strict:
                message = f"tool {tool.name!r} cannot be strict: {error}"
                raise RequestError(message, "tools") from None
            return tool.name, {}, False
        return tool.name, tool.parameters or {}, tool.strict

    def _check_tool(self, tool: Tool) -> None:
        """Unwritable for a schema that a call cannot be held to."""
        rules = Rules(self._special)
        function = (tool.name, tool.parameters or {}, tool.strict)
        try:
            call = required_calls(rules, self._calls, [function], False)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            # Any JSON may stand where a schema should.
            raise Unwritable(f"its parameters are not a JSON schema ({error})") from None
        source = {"grammars": [{"name": "call", "lark_grammar": rules.grammar(call)}]}
        if fault := self._matcher.validate_grammar(json.dumps(source), self._tokenizer):
            raise Unwritable(_first_line(fault))


def _call_form(notation: Notation, special: Mapping[str, int]) -> CallForm:
    if notation.name == "mistral" and "[ARGS]" in special:
        return FORMS["mistral, with [ARGS]"]
    return FORMS[notation.name]


def _key(form: AnswerForm) -> str:
    """What a grammar depends on, as text; a RequestError for more than `MOST_BYTES` of it."""
    param = "tools" if form.tools else "response_format"
    tools = [(tool.name, tool.parameters, tool.strict) for tool in form.tools]
    try:
        parts = [form.kind, form.value, form.tool_choice, form.parallel, tools]
        key = json.dumps(parts, ensure_ascii=False)
        key.encode()  # half a surrogate pair is not text
    except (TypeError, ValueError, RecursionError):
        raise RequestError("the schema is nested too deeply, or is not JSON", param) from None
    if len(key) > MOST_BYTES:
        raise RequestError(f"{len(key)} bytes of schemas; the limit is {MOST_BYTES}", param)
    return key


def _answer(form: AnswerForm) -> str | None:
    """The text of an answer of this kind, as a grammar; None for any."""
    if form.kind == "text":
        return None
    if form.kind == "json_object":
        return f"start: {schema_value({'type': 'object'})}"
    if form.kind == "json_schema":
        try:
            return f"start: {schema_value(form.value)}"
        except Unwritable as error:
            raise RequestError(
                f"the schema cannot be held to: {error}", "response_format"
            ) from None
    if form.kind == "regex":
        from llguidance import regex_to_lark

        return f"start: /{regex_to_lark(form.value, '')}/"
    if form.kind == "choice":
        return f"start: TEXT\nTEXT: {' | '.join(quoted(text) for text in form.value)}"
    return str(form.value)


def _bits(tokens: Iterable[int], size: int) -> Words:
    words = np.zeros(-(-size // 32), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def _refusal(error: str, param: str) -> RequestError:
    return RequestError(f"an answer cannot be held to this: {_first_line(error)}", param)


def _first_line(error: str) -> str:
    """What llguidance complains of, without the place in a grammar that nobody has written."""
    return re.sub(r"^at \d+\(\d+\): ", "", error.strip().split("\n")[0])[:500]
