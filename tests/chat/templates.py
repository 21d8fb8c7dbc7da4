"""Chat templates of model families, restated in a few lines: their marks and their ways."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper, _infer_tool_parser
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHATML_TOOLS = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}\
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}"""
_CALLS = """\
{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% set tool_call = call %}{% if tool_call.name %}{% endif %}{% endfor %}"""

# Qwen3: reasoning of turns before the last question is left out, and can be switched off.
QWEN3 = (
    _CHATML_TOOLS
    + """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}\
{% endfor %}
{%- for m in messages %}
{%- if loop.first and m.role == 'system' %}
{%- elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{% if loop.index0 > ns.last and m.reasoning_content %}<think>
{{ m.reasoning_content.strip('\\n') }}
</think>

{% endif %}{{ m.content }}"""
    + _CALLS
    + """<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
)
# DeepSeek R1's children: the prompt always opens the reasoning.
ALWAYS_THINKS = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}\
{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>\
{% else %}{{ m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<｜Assistant｜><think>
{% endif %}"""
# DeepSeek V3.1: reasoning is off unless `thinking` is set.
DEEPSEEK_V31 = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}\
{% elif m.role == 'assistant' %}<｜Assistant｜></think>{{ m.content }}\
{%- for call in m.tool_calls or [] %}{% if loop.first %}<｜tool▁calls▁begin｜>{% endif %}\
<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>\
{{ '' + call.function.arguments }}<｜tool▁call▁end｜>{% if loop.last %}<｜tool▁calls▁end｜>\
{% endif %}{% endfor %}<｜end▁of▁sentence｜>\
{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>\
{% else %}{{ m.content }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>\
{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}{% endif %}"""
LLAMA3 = """\
{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if loop.first %}{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}\
{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}\
{% endfor %}<|eot_id|>{% endfor %}{% if builtin_tools %}<|python_tag|>{% endif %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
HARMONY = """\
{% for m in messages %}{% if m.role == 'assistant' %}\
{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>\
{% endif %}{% if m.tool_calls and m.content %}<|start|>assistant<|channel|>commentary<|message|>\
{{ m.content }}<|end|>{% endif %}\
{% for call in m.tool_calls or [] %}<|start|>assistant to=functions.\
{{ call.function.name }}<|channel|>commentary json<|message|>{{ call.function.arguments | tojson }}\
<|call|>{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endfor %}\
{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>\
{{ m.content }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}\
{% if loop.first %}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% endif %}<|end|>\
{% endif %}{% endfor %}{# developer #}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\
{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
[INST]{{ m.content }}[/INST]{% elif m.role == 'system' %}{{ m.content }}\
{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}\
{% for call in m.tool_calls or [] %}{% if call.id | length != 9 %}\
{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}\
[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}\
{{ m.content }}</s>{% endif %}{% endfor %}"""

# Kimi K2 writes the id of a call, and no name.
KIMI_K2 = """\
{% for tool in tools or [] %}{% if loop.first %}<|im_system|>tools<|im_middle|>{% endif %}\
{{ tool | tojson }}{% if loop.last %}<|im_end|>{% endif %}{% endfor %}{% for m in messages %}\
<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{% if m.role == 'tool' %}## Return of \
{{ m.tool_call_id }}
{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}{% if loop.first %}\
<|tool_calls_section_begin|>{% endif %}<|tool_call_begin|>{{ call.id }}\
<|tool_call_argument_begin|>{{ call.function.arguments | tojson }}<|tool_call_end|>\
{% if loop.last %}<|tool_calls_section_end|>{% endif %}{% endfor %}<|im_end|>{% endfor %}\
{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"""
# A template that knows how to write calls and results, but not what tools there are.
DEEPSEEK_R1 = DEEPSEEK_V31.replace(
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}", ""
)

TEMPLATES = {
    "qwen3": QWEN3,
    "always thinks": ALWAYS_THINKS,
    "deepseek_v31": DEEPSEEK_V31,
    "llama3": LLAMA3,
    "harmony": HARMONY,
    "mistral": MISTRAL,
    "kimi_k2": KIMI_K2,
    "deepseek_r1": DEEPSEEK_R1,
}
SPECIAL = {
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "always thinks": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
    ),
    "deepseek_v31": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
    ),
    "llama3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|python_tag|>",
    ),
    "harmony": (
        "<|startoftext|>",
        "<|return|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|call|>",
    ),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]"),
    "kimi_k2": (
        "[BOS]",
        "<|im_end|>",
        "<|im_user|>",
        "<|im_assistant|>",
        "<|im_system|>",
        "<|im_tool|>",
        "<|im_middle|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ),
}
SPECIAL["deepseek_r1"] = SPECIAL["deepseek_v31"]
# Tokens that are added, but not special.
ADDED = {
    "qwen3": ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    "always thinks": ("<think>", "</think>"),
    "deepseek_v31": ("<think>", "</think>"),
    "deepseek_r1": ("<think>", "</think>"),
}


def family(name: str) -> TokenizerWrapper:
    """A tokenizer of bytes with the marks and the template of this family."""
    return wrapped(TEMPLATES[name], SPECIAL[name], ADDED.get(name, ()))


def wrapped(
    template: str | None, special: Sequence[str] = (), added: Sequence[str] = ()
) -> TokenizerWrapper:
    """A tokenizer of bytes. Of the special tokens the first is BOS and the second EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    roles = dict(zip(("bos_token", "eos_token"), special, strict=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    fast.chat_template = template
    parser = _infer_tool_parser(fast)
    if parser is None:
        return TokenizerWrapper(fast)
    # As mlx-lm's load() does it.
    module = __import__(f"mlx_lm.tool_parsers.{parser}", fromlist=["parse_tool_call"])
    return TokenizerWrapper(
        fast,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        tool_parser=module.parse_tool_call,
    )
