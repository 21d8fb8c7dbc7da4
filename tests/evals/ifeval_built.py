"""Responses built to follow an instruction or to break it: the truth is known before any check.

Each builder takes a `Random` and gives arguments, a response and whether it follows. It puts
together a known number of parts (words, bullets, paragraphs ...) and looks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Built = tuple[dict[str, Any], str, bool]
BUILDERS: dict[str, Callable[[Random], Built]] = {}

FILLERS = ("river", "stone", "house", "under", "green", "light", "window", "never", "the", "with")
KEYWORDS = ("fox", "sky", "jam", "zebra")
LANGUAGES = {
    "en": "the weather is fine today and we are all going to the beach together",
    "de": "das wetter ist heute schön und wir gehen alle zusammen an den strand",
    "fr": "il fait beau aujourd'hui et nous allons tous ensemble à la plage",
    "ru": "сегодня хорошая погода и мы все вместе идём на пляж",
}


def kind(name: str) -> Callable[[Callable[[Random], Built]], Callable[[Random], Built]]:
    def register(builder: Callable[[Random], Built]) -> Callable[[Random], Built]:
        BUILDERS[name] = builder
        return builder

    return register


def fill(r: Random, count: int | None = None) -> list[str]:
    return r.choices(FILLERS, k=r.randint(1, 5) if count is None else count)


def mixed(r: Random, parts: list[str]) -> str:
    """The parts in any order among other words."""
    words = [*parts, *fill(r)]
    r.shuffle(words)
    return " ".join(words)


def near(r: Random, count: int) -> int:
    """A threshold about as high as `count`, at least 1."""
    return max(1, count + r.choice([-1, 0, 1]))


def related(r: Random, count: int) -> tuple[int, str, bool]:
    """A threshold, a relation, and whether `count` is in that relation to it."""
    threshold, relation = near(r, count), r.choice(["less than", "at least"])
    return threshold, relation, (count < threshold) == (relation == "less than")


@kind("keywords:existence")
def _(r: Random) -> Built:
    wanted, there = (set(r.sample(KEYWORDS, 2)) for _ in range(2))
    shapes = [str, str.upper, "{}es".format, '"{}",'.format]
    text = mixed(r, [r.choice(shapes)(word) for word in there])
    return {"keywords": sorted(wanted)}, text, wanted <= there


@kind("keywords:frequency")
def _(r: Random) -> Built:
    count = r.randint(0, 4)
    threshold, relation, holds = related(r, count)
    text = mixed(r, [r.choice(["fox", "FOX", "foxes", "fox."]) for _ in range(count)])
    return {"keyword": "fox", "frequency": threshold, "relation": relation}, text, holds


@kind("keywords:forbidden_words")
def _(r: Random) -> Built:
    there = r.random() < 0.5
    text = mixed(r, [*(["(Fox!)"] if there else []), "foxes", "skyline"])
    return {"forbidden_words": ["fox", "sky"]}, text, not there


@kind("keywords:letter_frequency")
def _(r: Random) -> Built:
    count = r.randint(0, 5)
    threshold, relation, holds = related(r, count)
    text = mixed(r, [r.choice("qQ") for _ in range(count)])
    return {"letter": "q", "let_frequency": threshold, "let_relation": relation}, text, holds


@kind("language:response_language")
def _(r: Random) -> Built:
    spoken, asked = r.choice(list(LANGUAGES)), r.choice(list(LANGUAGES))
    return {"language": asked}, LANGUAGES[spoken], spoken == asked


@kind("change_case:english_capital")
def _(r: Random) -> Built:
    language, small = r.choice(["en", "en", "de"]), r.random() < 0.3
    text = LANGUAGES[language].upper() + (" x" if small else " X")
    return {}, text, language == "en" and not small


@kind("change_case:english_lowercase")
def _(r: Random) -> Built:
    language, large = r.choice(["en", "en", "de"]), r.random() < 0.3
    text = LANGUAGES[language] + (" X" if large else " x")
    return {}, text, language == "en" and not large


@kind("change_case:capital_word_frequency")
def _(r: Random) -> Built:
    count = r.randint(0, 4)
    threshold, relation, holds = related(r, count)
    words = [r.choice(["FOX", "A", "ZEBRA-42", "SKY"]) for _ in range(count)]
    text = mixed(r, [*words, "Title", "iPod"])
    return {"capital_frequency": threshold, "capital_relation": relation}, text, holds


@kind("length_constraints:number_sentences")
def _(r: Random) -> Built:
    count = r.randint(1, 5)
    threshold, relation, holds = related(r, count)
    starts = [r.choice(["The", "Mr. Smith and the", "About 3.5"]) for _ in range(count)]
    text = " ".join(f"{s} {' '.join(fill(r))} fox{r.choice('.?!')}" for s in starts)
    return {"num_sentences": threshold, "relation": relation}, text, holds


@kind("length_constraints:number_words")
def _(r: Random) -> Built:
    count = r.randint(1, 12)
    threshold, relation, holds = related(r, count)
    words = fill(r, count)
    text = words[0] + "".join(r.choice([" ", ", ", "-", "'", "\n", " * "]) + w for w in words[1:])
    return {"num_words": threshold, "relation": relation}, text, holds


@kind("length_constraints:number_paragraphs")
def _(r: Random) -> Built:
    count, blank = r.randint(1, 4), r.random() < 0.2
    parts = [" ".join(fill(r)) for _ in range(count)]
    if blank:  # one in the middle
        parts = [*parts, "  ", " ".join(fill(r))]
    text = r.choice(["\n***\n", "***", " *** "]).join([*parts, *r.choice([[], [""]])])
    asked = near(r, count + blank)
    return {"num_paragraphs": asked}, text, not blank and count == asked


@kind("length_constraints:nth_paragraph_first_word")
def _(r: Random) -> Built:
    count = r.randint(1, 4)
    firsts = r.choices(KEYWORDS, k=count)
    shapes = [str, str.upper, "{},".format, '"{}"'.format, "{}'s".format]
    parts = [f"{r.choice(shapes)(first)} {' '.join(fill(r))}" for first in firsts]
    asked = r.choice([count, near(r, count)])
    nth = r.randint(1, asked)
    word = r.choice([firsts[min(nth, count) - 1], r.choice(KEYWORDS)])
    arguments = {"num_paragraphs": asked, "nth_paragraph": nth, "first_word": word}
    return arguments, "\n\n".join(parts), asked == count and firsts[nth - 1] == word


@kind("detectable_content:number_placeholders")
def _(r: Random) -> Built:
    count = r.randint(0, 4)
    asked = near(r, count)
    text = mixed(r, [f"[{' '.join(fill(r))}]" for _ in range(count)])
    return {"num_placeholders": asked}, f"] {text} [", count >= asked


@kind("detectable_content:postscript")
def _(r: Random) -> Built:
    asked, there = (r.choice(["P.S.", "P.P.S"]) for _ in range(2))
    spaced = there.replace(".", ". ").strip() if r.random() < 0.5 else there
    text = f"{' '.join(fill(r))}\n{r.choice([str, str.lower])(spaced)} {' '.join(fill(r))}"
    return {"postscript_marker": asked}, text, asked == there  # "P.P.S " has no dot at its end


@kind("detectable_format:number_bullet_lists")
def _(r: Random) -> Built:
    count = r.randint(0, 4)
    bullets = [f"{r.choice(['* ', '- ', '  * ', '  -'])}{r.choice(FILLERS)}" for _ in range(count)]
    lines = [*bullets, "**bold** river", "2 * 3", "1. stone"]
    r.shuffle(lines)
    asked = near(r, count)
    return {"num_bullets": asked}, "\n".join(lines), count == asked


@kind("detectable_format:constrained_response")
def _(r: Random) -> Built:
    answer, end = r.choice(["yes", "no", "maybe", "never"]), r.choice([".", ".", ",", ""])
    text = f"{' '.join(fill(r))} My answer is {answer}{end} {' '.join(fill(r))}"
    return {}, text, answer != "never" and end == "."


@kind("detectable_format:number_highlighted_sections")
def _(r: Random) -> Built:
    count = r.randint(0, 4)
    sections = [r.choice(["*{}*", "**{}**"]).format(" ".join(fill(r))) for _ in range(count)]
    asked = near(r, count)
    return {"num_highlights": asked}, "\n".join([*sections, "****", "* *"]), count >= asked


@kind("detectable_format:multiple_sections")
def _(r: Random) -> Built:
    count = r.randint(0, 4)
    text = "\n".join(f"Day {i + 1}\n{' '.join(fill(r))}" for i in range(count)) + "\nDay off, day 9"
    asked = near(r, count)
    return {"section_spliter": "Day", "num_sections": asked}, text, count >= asked


@kind("detectable_format:json_format")
def _(r: Random) -> Built:
    text = json.dumps({r.choice(FILLERS): [r.randint(0, 9), None, {"a": fill(r)}]}, indent=1)
    cut = r.random() < 0.4
    text = text[:-1] if cut else text
    return {}, r.choice(["{}", "```json\n{}\n```", "```\n{}```"]).format(text), not cut


@kind("detectable_format:title")
def _(r: Random) -> Built:
    inside, marks = r.choice(["A fox", "x", "  "]), r.choice([("<<", ">>"), ("<", ">")])
    text = f"{' '.join(fill(r))} {marks[0]}{inside}{marks[1]}\n{' '.join(fill(r))}"
    return {}, text, bool(inside.strip()) and marks[0] == "<<"


@kind("combination:two_responses")
def _(r: Random) -> Built:
    count, alike = r.randint(1, 3), r.random() < 0.3
    parts = [f"{i * (not alike)} {FILLERS[0]}" for i in range(count)]
    text = r.choice(["******", "\n******\n"]).join([*parts, *r.choice([[], [""]])])
    return {}, text, count == 2 and not alike


@kind("combination:repeat_prompt")
def _(r: Random) -> Built:
    prompt, first = f"Say {r.choice(FILLERS)}.", r.random() < 0.5
    parts = [r.choice([str, str.upper])(prompt), f"I said {r.choice(FILLERS)}."]
    return {"prompt_to_repeat": prompt}, "\n".join(parts if first else parts[::-1]), first


@kind("startend:end_checker")
def _(r: Random) -> Built:
    phrase, last = "That is all.", r.random() < 0.5
    parts = [" ".join(fill(r)), r.choice([str, str.upper])(phrase)]
    text = " ".join(parts if last else parts[::-1])
    return {"end_phrase": phrase}, r.choice(["{}", '"{}"', "{}\n"]).format(text), last


@kind("startend:quotation")
def _(r: Random) -> Built:
    start, end = (r.choice(['"', '"', "'", ""]) for _ in range(2))
    return {}, f" {start}{' '.join(fill(r))}{end}\n", start == end == '"'


@kind("punctuation:no_comma")
def _(r: Random) -> Built:
    marks = [r.choice(["", ";", ".", "\uff0c", ","]) for _ in range(2)]
    text = " ".join(word + mark for word, mark in zip(fill(r, 2), marks, strict=True))
    return {}, text, "," not in marks
