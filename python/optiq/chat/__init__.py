"""Chats as a model's template writes them, and the tool calls in its answers.

template.py and forms.py make prompts; template_calls.py reads whole answers in the template's own
notation, parser.py and python_syntax.py in the common ones. Evals and generation share them.

For serving: prompt.py makes prompts with their boundaries, in which special tokens that people
write stay text (controls.py). notation.py knows how each model marks reasoning and calls.
reader.py, with call_reader.py and pull.py, reads answers while they are written.
"""
