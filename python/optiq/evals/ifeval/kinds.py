"""The 25 kinds of instruction, each a predicate of a response, which is never blank.

They reproduce Google's `instructions.py` (Apache-2.0) as lm-eval 0.4.13 carries it, oddities
included: a published IFEval figure means these predicates. They differ in two places, where the
official code draws lots: `letter_frequency` counts any character (for "!" and "#", which the data
asks for, the official code counts a random letter), and an absent argument is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import language as languages
from .parameters import (
    CHARACTER,
    COUNT,
    INDEX,
    LANGUAGE,
    PATTERN,
    PATTERNS,
    RELATION,
    TEXT,
    Parameter,
)
from .sentences import sentences
from .words import words

Predicate = Callable[..., bool]


@dataclass(frozen=True)
class Kind:
    """`follows(response, **arguments)`; `needs` are packages of the extra `evals`."""

    follows: Predicate
    parameters: Mapping[str, Parameter]
    needs: Sequence[str]


KINDS: dict[str, Kind] = {}


def _kind(name: str, *needs: str, **parameters: Parameter) -> Callable[[Predicate], Predicate]:
    def register(follows: Predicate) -> Predicate:
        KINDS[name] = Kind(follows, parameters, needs)
        return follows

    return register


def _holds(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


# Keywords


@_kind("keywords:existence", keywords=PATTERNS)
def _existence(response: str, keywords: Sequence[str]) -> bool:
    return all(re.search(keyword, response, re.IGNORECASE) for keyword in keywords)


@_kind("keywords:frequency", keyword=PATTERN, frequency=COUNT, relation=RELATION)
def _frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(keyword.strip(), response, re.IGNORECASE)
    return _holds(len(found), relation, frequency)


@_kind("keywords:forbidden_words", forbidden_words=PATTERNS)
def _forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", response, re.IGNORECASE) for word in forbidden_words)


@_kind("keywords:letter_frequency", letter=CHARACTER, let_frequency=COUNT, let_relation=RELATION)
def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(response.lower().count(letter.lower()), let_relation, let_frequency)


# Language and case


@_kind("language:response_language", "langdetect", language=LANGUAGE)
def _response_language(response: str, language: str) -> bool:
    return languages.is_in(response, language)


@_kind("change_case:english_capital", "langdetect")
def _english_capital(response: str) -> bool:
    return response.isupper() and languages.is_in(response, "en")


@_kind("change_case:english_lowercase", "langdetect")
def _english_lowercase(response: str) -> bool:
    return response.islower() and languages.is_in(response, "en")


@_kind(
    "change_case:capital_word_frequency",
    "punkt",
    capital_frequency=COUNT,
    capital_relation=RELATION,
)
def _capital_words(response: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in words(response))
    return _holds(count, capital_relation, capital_frequency)


# Length


@_kind("length_constraints:number_sentences", "punkt", num_sentences=COUNT, relation=RELATION)
def _number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return _holds(len(sentences(response)), relation, num_sentences)


@_kind("length_constraints:number_words", num_words=COUNT, relation=RELATION)
def _number_words(response: str, num_words: int, relation: str) -> bool:
    return _holds(len(re.findall(r"\w+", response)), relation, num_words)


@_kind("length_constraints:number_paragraphs", num_paragraphs=COUNT)
def _number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Between `***` dividers; the first and the last may be blank and do not count then."""
    first, *others = re.split(r"\s?\*\*\*\s?", response)
    *middle, last = others or [""]
    blank = [not paragraph.strip() for paragraph in middle]
    count = len(middle) + bool(first.strip()) + bool(last.strip())
    return not any(blank) and count == num_paragraphs


@_kind(
    "length_constraints:nth_paragraph_first_word",
    num_paragraphs=COUNT,
    nth_paragraph=INDEX,
    first_word=TEXT,
)
def _first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = response.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > count or count != num_paragraphs:
        return False
    nth = paragraphs[nth_paragraph - 1].split()  # blank ones are not counted, but have an index
    if not nth:
        return False
    word = re.split(r"""[.,?!'"]""", nth[0].lstrip("'").lstrip('"'))[0]
    return word.lower() == first_word.lower()


# Content


@_kind("detectable_content:number_placeholders", num_placeholders=COUNT)
def _placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


@_kind("detectable_content:postscript", postscript_marker=PATTERN)
def _postscript(response: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, marker.lower())
    return bool(re.search(pattern, response.lower()))


# Format


@_kind("detectable_format:number_bullet_lists", num_bullets=COUNT)
def _bullets(response: str, num_bullets: int) -> bool:
    # Officially \s*, which finds the same but takes ages on a model that prints empty lines.
    stars = re.findall(r"^[^\S\n]*\*[^\*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@_kind("detectable_format:constrained_response")
def _constrained_response(response: str) -> bool:
    options = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return any(option in response for option in options)


@_kind("detectable_format:number_highlighted_sections", num_highlights=COUNT)
def _highlights(response: str, num_highlights: int) -> bool:
    """`*x*` and `**x**` count once each, blank ones not at all."""
    single = re.findall(r"\*[^\n\*]*\*", response)
    double = re.findall(r"\*\*[^\n\*]*\*\*", response)
    filled = sum(bool(text.strip("*").strip()) for text in single + double)
    return filled >= num_highlights


@_kind("detectable_format:multiple_sections", section_spliter=PATTERN, num_sections=COUNT)
def _sections(response: str, section_spliter: str, num_sections: int) -> bool:
    heads = re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", response)
    return len(heads) - 1 >= num_sections


@_kind("detectable_format:json_format")
def _json_format(response: str) -> bool:
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@_kind("detectable_format:title")
def _title(response: str) -> bool:
    titles = re.findall(r"<<[^\n]+>>", response)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


# Combination


@_kind("combination:two_responses")
def _two_responses(response: str) -> bool:
    """Between `******`; blank parts may stand only at the ends."""
    parts = [part.strip() for part in response.split("******")]
    if not all(parts[1:-1]):
        return False
    filled = [part for part in parts if part]
    return len(filled) == 2 and filled[0] != filled[1]


@_kind("combination:repeat_prompt", prompt_to_repeat=TEXT)
def _repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


# Start, end, punctuation


@_kind("startend:end_checker", end_phrase=TEXT)
def _end(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_kind("startend:quotation")
def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_kind("punctuation:no_comma")
def _no_comma(response: str) -> bool:
    return "," not in response
