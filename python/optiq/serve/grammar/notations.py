"""How each notation writes a call, as a grammar needs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Params:
    """Arguments one by one. `each` has KEY and VALUE; `strings` are "raw" text, "json", or stand
    between two of this mark. `escapes` are those that JSON strings may hold."""

    each: str
    between: str = ""
    strings: str = "raw"
    nested: bool = True
    null_is_none: bool = False


@dataclass(frozen=True)
class CallForm:
    """How calls are written: NAME is the function, INDEX the number of the call.

    `begin`, calls and `end` are a section. Of several calls each has its section, unless
    `inside`; `between` stands between calls or sections. `many`: there may be several.

    `params` is None where the arguments are one JSON object. `call` has ARGUMENTS in their place.
    """

    begin: str
    call: str
    end: str = ""
    between: str = ""
    inside: bool = False
    many: bool = True
    params: Params | None = None


FORMS = {
    "json_tools": CallForm(
        "<tool_call>", '\n{"name": "NAME", "arguments": ARGUMENTS}\n', "</tool_call>", "\n"
    ),
    "mistral": CallForm(
        "[TOOL_CALLS] [", '{"name": "NAME", "arguments": ARGUMENTS}', "]", ", ", inside=True
    ),
    "mistral, with [ARGS]": CallForm("[TOOL_CALLS]", "NAME[ARGS]ARGUMENTS"),
    "kimi_k2": CallForm(
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>ARGUMENTS"
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
        inside=True,
    ),
    "deepseek_v3": CallForm(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "\n",
        inside=True,
    ),
    "deepseek_v31": CallForm(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        inside=True,
    ),
    "llama3": CallForm("", '{"name": "NAME", "parameters": ARGUMENTS}', many=False),
    "harmony": CallForm(
        "<|channel|>commentary to=functions.",
        "NAME <|constrain|>json<|message|>ARGUMENTS",
        many=False,
    ),
    "kimi_k3": CallForm(
        "<|open|>tools<|sep|>",
        '<|open|>call tool="NAME" index="INDEX"<|sep|><|open|>json type="object"<|sep|>ARGUMENTS'
        "<|close|>json<|sep|><|close|>call<|sep|>",
        "<|close|>tools<|sep|>",
        inside=True,
    ),
    "qwen3_coder": CallForm(
        "<tool_call>",
        "\n<function=NAME>\nARGUMENTS</function>\n",
        "</tool_call>",
        "\n",
        params=Params("<parameter=KEY>\nVALUE\n</parameter>\n", null_is_none=True),
    ),
    "glm47": CallForm(
        "<tool_call>",
        "NAMEARGUMENTS",
        "</tool_call>",
        params=Params("<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>"),
    ),
    "longcat": CallForm(
        "<longcat_tool_call>",
        "NAME\nARGUMENTS",
        "</longcat_tool_call>",
        "\n",
        params=Params(
            "<longcat_arg_key>KEY</longcat_arg_key>\n<longcat_arg_value>VALUE</longcat_arg_value>\n"
        ),
    ),
    "minimax_m2": CallForm(
        "<minimax:tool_call>",
        '\n<invoke name="NAME">\nARGUMENTS</invoke>',
        "\n</minimax:tool_call>",
        inside=True,
        params=Params('<parameter name="KEY">VALUE</parameter>\n', null_is_none=True),
    ),
    "minicpm5": CallForm(
        "<function name=",
        '"NAME">ARGUMENTS',
        "</function>",
        params=Params('<param name="KEY">VALUE</param>', null_is_none=True),
    ),
    "muse_spark": CallForm(
        "to=",
        'NAME<|message|><atem:function_calls>\n<atem:invoke name="NAME">\nARGUMENTS</atem:invoke>\n'
        "</atem:function_calls>",
        many=False,
        params=Params('<atem:parameter name="KEY">VALUE</atem:parameter>\n', strings="json"),
    ),
    "pythonic": CallForm(
        "<|tool_call_start|>[",
        "NAME(ARGUMENTS)",
        "]<|tool_call_end|>",
        ", ",
        inside=True,
        params=Params("KEY=VALUE", ", ", strings="json"),
    ),
    "gemma4": CallForm(
        "<|tool_call>",
        "call:NAME{ARGUMENTS}",
        "<tool_call|>",
        params=Params("KEY:VALUE", ",", strings='<|"|>'),
    ),
    "function_gemma": CallForm(
        "<start_function_call>",
        "call:NAME{ARGUMENTS}",
        "<end_function_call>",
        params=Params("KEY:VALUE", ",", strings="<escape>", nested=False),
    ),
}


@dataclass(frozen=True)
class Frame:
    """What stands around the text of an answer.

    `reasoning` opens a message of reasoning, `reasoned` ends it, and `turn` stands between it and
    the next message.
    """

    open: str
    close: str = ""
    reasoning: str = ""
    reasoned: str = ""
    turn: str = ""


FRAMES = {
    "harmony": Frame(
        "<|channel|>final<|message|>",
        reasoning="<|channel|>analysis<|message|>",
        reasoned="<|end|>",
        turn="<|start|>assistant",
    ),
    "muse_spark": Frame(
        "to=user<|message|>",
        reasoning="to=self<|message|>",
        reasoned="<|eom|>",
        turn="<|start|>assistant ",
    ),
    "kimi_k3": Frame("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
}
