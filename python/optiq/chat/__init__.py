"""Chats as a model's template writes them, and the tool calls in its answers.

template.py and forms.py make the prompt; template_calls.py reads calls in the template's own
notation, parser.py and python_syntax.py in the common ones. Evals, generation and serving share it.
"""
