"""Words as NLTK 3.9's `word_tokenize` cuts them: the Penn Treebank rules, sentence by sentence.

The rules are substitutions applied in order, which set spaces around whatever is a token of its
own (R. MacIntyre's sed script, in the form of NLTK's `NLTKWordTokenizer`, Apache-2.0).
"""

from __future__ import annotations

import re

from .sentences import sentences

_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # Opening quotes.
        (r"([\u00ab\u201c\u2018\u201e]|[`]+)", r" \1 "),
        (r'^"', r"``"),
        (r"(``)", r" \1 "),
        (r"""([ (\[{<])("|'{2})""", r"\1 `` "),
        (r"(?i)(')(?!re|ve|ll|m|t|s|d|n)(\w)\b", r"\1 \2"),
        # Punctuation. The lookahead makes the run of closing marks atomic: no backtracking.
        (r"""([^.])(\.)(?=([\])}>"'\u00bb\u201d\u2019 ]*))\3\s*$""", r"\1 \2 \3 "),
        (r"([:,])([^\d])", r" \1 \2"),
        (r"([:,])$", r" \1 "),
        (r"\.{2,}", r" \g<0> "),
        (r"[;@#$%&]", r" \g<0> "),
        (r"""([^.])(\.)([\])}>"']*)\s*$""", r"\1 \2\3 "),
        (r"[?!]", r" \g<0> "),
        (r"([^'])' ", r"\1 ' "),
        (r"[*]", r" \g<0> "),
        (r"[\]\[(){}<>]", r" \g<0> "),
        (r"--", r" -- "),
        (r"^|$", r" "),
        # Closing quotes and clitics.
        (r"([\u00bb\u201d\u2019])", r" \1 "),
        (r"''", r" '' "),
        (r'"', r" '' "),
        (r"\s+", r" "),
        (r"([^' ])('[sS]|'[mM]|'[dD]|') ", r"\1 \2 "),
        (r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r"\1 \2 "),
        # Contractions.
        (r"(?i)\b(can)(not)\b", r" \1 \2 "),
        (r"(?i)\b(d)('ye)\b", r" \1 \2 "),
        (r"(?i)\b(gim)(me)\b", r" \1 \2 "),
        (r"(?i)\b(gon)(na)\b", r" \1 \2 "),
        (r"(?i)\b(got)(ta)\b", r" \1 \2 "),
        (r"(?i)\b(lem)(me)\b", r" \1 \2 "),
        (r"(?i)\b(more)('n)\b", r" \1 \2 "),
        (r"(?i)\b(wan)(na)(?=\s)", r" \1 \2 "),
        (r"(?i) ('t)(is)\b", r" \1 \2 "),
        (r"(?i) ('t)(was)\b", r" \1 \2 "),
    ]
]


def words(text: str) -> list[str]:
    """The tokens of `text`: words, numbers, punctuation; "cannot" is two."""
    return [word for sentence in sentences(text) for word in _split(sentence)]


def _split(sentence: str) -> list[str]:
    for rule, replacement in _RULES:
        sentence = rule.sub(replacement, sentence)
    return sentence.split()
