"""Prompts of IFEval and answers that follow them, nearly follow them, or are just odd."""

from __future__ import annotations

import json
from random import Random
from typing import Any

Case = tuple[list[str], list[dict[str, Any]], str]

PROSE = (
    "The quick brown fox jumps over the lazy dog.",
    "Dr. Smith met Mrs. Jones at 5 p.m. on Jan. 3. They talked about the U.S. economy.",
    "Prices rose 3.5 percent, e.g. for bread (and milk). Nobody cared!",
    'He said, "It works." Then he left... And came back?! "Why?" she asked.',
    "J. S. Bach wrote it vs. Mr. T. in 1720. No. 5 is best.",
    "\u201cCurly quotes.\u201d She smiled. \u2018Single ones!\u2019 He did not.",
    "NASA and the FBI CANNOT agree. I'M GONNA GO! DON'T (YOU) STOP-GAP.",
    "we are all in lower case here and it is quite fine",
    "THIS IS ALL IN CAPITALS AND IT IS QUITE LOUD",
    "See https://example.com/a.b.c for more; mail me@example.org.",
    "A.B.C. is an acronym. i.e. not a word. etc. The end.",
    "One two three four five six seven eight nine ten eleven twelve.",
    "Wait... what? No!! Yes!!! Really?!? OK.",
    "My answer is yes. My answer is maybe. My answer is no",
    "Je ne sais pas pourquoi il fait si froid aujourd'hui. C'est la vie!",
    "Ich weiß nicht, warum es heute so kalt ist. So ist das Leben.",
    "मुझे नहीं पता कि आज इतनी ठंड क्यों है। जीवन ऐसा ही है।",
    "Я не знаю, почему сегодня так холодно. Такова жизнь.",
    "No sé por qué hace tanto frío hoy. Así es la vida.",
    "我不知道今天为什么这么冷。",
    "12345 67.89 !!! ???",
    "Nguyễn nói rằng hôm nay trời rất lạnh.",
)
MARKUP = (
    "* a point\n* another point",
    "- a dash\n  - a nested dash",
    "*emphasis* and **strong** words",
    "**  ** * * ***",
    "<<A Title>>",
    "<< >>",
    "[name] lives at [address]",
    "[unclosed",
    "Section 1\nfirst part\nSection 2\nsecond part",
    "SECTION 3 and Day4",
    "P.S. one more thing",
    "p. p. s. and P.P.S. another",
    "******",
    "***",
    "\n\n",
    "\n",
    "",
    "   ",
    '"',
    "'",
    ",",
    "```json",
    "```",
    '{"key": [1, 2.5, null]}',
    "{broken",
    "Is there anything else I can help with?",
    "Peace!",
    "\u2028\u00a0\u3000",
    "🎉🎉",
)
KEYWORDS = ("fox", "economy", "he", "cold", "Bach", "yes", "point", "answer", "a.b", "title")
PHRASES = (
    "Is there anything else I can help with?",
    "Peace!",
    "So is life.",
    "the end.",
    'quoted"',
)
REQUESTS = ("Write a poem about a fox.", "Say yes.\nOr no.", "  Why is it so cold?  ")
LANGUAGES = ("de", "fr", "hi", "ru", "es", "vi", "en", "ta")
RELATIONS = ("less than", "at least")


def cases(count: int, seed: int) -> list[Case]:
    """`count` prompts of one to three instructions, every kind about equally often."""
    random = Random(seed)
    kinds = sorted(ARGUMENTS)
    result = []
    for i in range(count):
        ids = [kinds[i % len(kinds)], *random.choices(kinds, k=random.choice([0, 0, 1, 2]))]
        kwargs = [ARGUMENTS[kind](random) for kind in ids]
        response = _response(random)
        if random.random() < 0.6:
            response = _towards(ids[0], kwargs[0], response, random)
        if random.random() < 0.2:  # what only the loose readings forgive
            response = random.choice(["Sure!\n{}", "{}\nHope it helps", "**{}**"]).format(response)
        result.append((ids, kwargs, response))
    return result


def texts(count: int, seed: int) -> list[str]:
    """Prose and soups of punctuation, for the sentence and word tokenizers."""
    random = Random(seed)
    alphabet = [
        *"aAbBzZ.....!?,;:'\"()[]{}*@#$%&-   \n\t1290",
        "...",
        "--",
        "''",
        "``",
        "n't",
        "'S",
    ]
    alphabet += [
        "Mr.",
        "U.S.",
        "e.g.",
        "The",
        "the",
        "\u201c",
        "\u201d",
        "\u2019",
        "\u2014",
        "é",
        "中",
    ]
    soups = ("".join(random.choices(alphabet, k=random.randint(1, 80))) for _ in range(count // 2))
    return [*soups, *(_response(random) for _ in range(count - count // 2))]


def _response(random: Random) -> str:
    parts = random.choices(PROSE, k=random.randint(0, 5))
    parts += random.choices(MARKUP, k=random.randint(0, 4))
    random.shuffle(parts)
    text = random.choice([" ", "\n", "\n\n"]).join(parts)
    return random.choice([str, str, str, str.upper, str.lower])(text)


def _count(low: int, high: int, *names: str) -> Any:
    return lambda random: {name: random.randint(low, high) for name in names}


def _with_relation(name: str, relation: str, high: int) -> Any:
    return lambda r: {name: r.randint(1, high), relation: r.choice(RELATIONS)}


# The arguments of each kind, near what the responses have.
ARGUMENTS: dict[str, Any] = {
    "keywords:existence": lambda r: {"keywords": r.sample(KEYWORDS, r.randint(1, 2))},
    "keywords:forbidden_words": lambda r: {"forbidden_words": r.sample(KEYWORDS, r.randint(1, 3))},
    "keywords:frequency": lambda r: {
        "keyword": r.choice(KEYWORDS),
        "frequency": r.randint(1, 4),
        "relation": r.choice(RELATIONS),
    },
    "keywords:letter_frequency": lambda r: {
        "letter": r.choice("aeizqAN"),
        "let_frequency": r.randint(1, 20),
        "let_relation": r.choice(RELATIONS),
    },
    "language:response_language": lambda r: {"language": r.choice(LANGUAGES)},
    "change_case:english_capital": lambda r: {},
    "change_case:english_lowercase": lambda r: {},
    "change_case:capital_word_frequency": _with_relation(
        "capital_frequency", "capital_relation", 12
    ),
    "length_constraints:number_sentences": _with_relation("num_sentences", "relation", 15),
    "length_constraints:number_words": _with_relation("num_words", "relation", 60),
    "length_constraints:number_paragraphs": _count(1, 4, "num_paragraphs"),
    "length_constraints:nth_paragraph_first_word": lambda r: {
        "num_paragraphs": (n := r.randint(1, 4)),
        "nth_paragraph": r.randint(1, n),
        "first_word": r.choice(["the", "Dr", "he", "one", "it's"]),
    },
    "detectable_content:number_placeholders": _count(1, 3, "num_placeholders"),
    "detectable_content:postscript": lambda r: {
        "postscript_marker": r.choice(["P.S.", "P.P.S", "One more thing"])
    },
    "detectable_format:number_bullet_lists": _count(1, 5, "num_bullets"),
    "detectable_format:constrained_response": lambda r: {},
    "detectable_format:number_highlighted_sections": _count(1, 4, "num_highlights"),
    "detectable_format:multiple_sections": lambda r: {
        "section_spliter": r.choice(["Section", "SECTION", "Day"]),
        "num_sections": r.randint(1, 3),
    },
    "detectable_format:json_format": lambda r: {},
    "detectable_format:title": lambda r: {},
    "combination:two_responses": lambda r: {},
    "combination:repeat_prompt": lambda r: {"prompt_to_repeat": r.choice(REQUESTS)},
    "startend:end_checker": lambda r: {"end_phrase": r.choice(PHRASES)},
    "startend:quotation": lambda r: {},
    "punctuation:no_comma": lambda r: {},
}


def _towards(kind: str, given: dict[str, Any], text: str, random: Random) -> str:
    """`text` bent towards following the instruction, often without getting there."""
    n = next((v for v in given.values() if isinstance(v, int)), 2) + random.choice([-1, 0, 0, 0, 1])
    sentence = random.choice(PROSE)
    match kind.partition(":")[2]:
        case "existence":
            return f"{text} {' '.join(given['keywords'])}"
        case "frequency":
            return " ".join([text, *[given["keyword"]] * n])
        case "letter_frequency":
            return given["letter"] * n
        case "forbidden_words" | "response_language":
            return sentence
        case "english_capital":
            return sentence.upper()
        case "english_lowercase":
            return sentence.lower()
        case "capital_word_frequency":
            return " ".join(["some", *random.choices(["NASA", "U.S.", "A-B", "(X)", "'TIS"], k=n)])
        case "number_sentences":
            return " ".join(random.choices(PROSE[:13], k=n))
        case "number_words":
            return " ".join(["it's"] * (n // 2))
        case "number_paragraphs":
            return random.choice(["\n***\n", "***", " *** "]).join([sentence] * n)
        case "nth_paragraph_first_word":
            start = random.choice(["", "'", '"', "("]) + given["first_word"]
            parts = [f"{start}{random.choice(['', '.', ',', '!'])} {sentence}"] * n
            return random.choice(["\n\n", "\n\n\n\n"]).join(parts)
        case "number_placeholders":
            return f"{text} {'[x] ' * n}"
        case "postscript":
            marker = random.choice(["P.S.", "P. S.", "P.P.S", "p. p. s", "One more thing"])
            return f"{text}\n{marker} x"
        case "number_bullet_lists":
            return "\n".join(random.choices(["* a", " - b", "** c", "*", "-", "d"], k=n + 1))
        case "constrained_response":
            option = random.choice(["yes.", "no", "maybe."])
            return f"{random.choice(['', text])} My answer is {option}"
        case "number_highlighted_sections":
            return " ".join(random.choices(["*a*", "**b**", "* *", "****"], k=n))
        case "multiple_sections":
            spliter = given["section_spliter"]
            return "\n".join(
                f"{spliter} {i}{random.choice(['', ':'])}\n{sentence}" for i in range(n)
            )
        case "json_format":
            body = json.dumps({"text": text})[: random.choice([None, None, -1])]
            return random.choice(["{}", "```json\n{}\n```", "```\n{}```", "Here: {}"]).format(body)
        case "title":
            return f"{random.choice(['<<', '<', '<<<'])}{random.choice(['x', ' ', '>'])}>>\n{text}"
        case "two_responses":
            other = random.choice([sentence, text, ""])
            return random.choice(["{}******{}", "{}\n******\n{}******", "{}*****{}"]).format(
                text, other
            )
        case "repeat_prompt":
            return f"{given['prompt_to_repeat'].strip()}{random.choice(['', ' x', '.'])}\n{text}"
        case "end_checker":
            return f"{text} {given['end_phrase']}" + random.choice(["", "", '"', " ", "."])
        case "quotation":
            return f'"{text}"'
        case "no_comma":
            return text.replace(",", "")
    raise AssertionError(kind)
