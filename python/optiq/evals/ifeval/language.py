"""Language detection by langdetect, the official choice, made repeatable."""

from __future__ import annotations

from functools import cache
from typing import Any

from .extras import require

# What the official scorer can name; the data set uses 22 of them.
# fmt: off
CODES = frozenset({
    "ar", "bg", "bn", "de", "en", "es", "fa", "fi", "fr", "gu", "he", "hi", "it", "ja", "kn", "ko",
    "ml", "mr", "ne", "pa", "pl", "pt", "ru", "sw", "ta", "te", "th", "uk", "ur", "vi",
})
# fmt: on


def is_in(text: str, language: str) -> bool:
    """Whether `text` is most probably in `language` (ISO 639-1).

    True if the text has no letter to judge by, such as "12345": the official rule.
    """
    langdetect = require("langdetect")
    detector = _factory().create()
    detector.append(text)
    try:
        return bool(detector.detect() == language)
    except langdetect.LangDetectException:
        return True


@cache
def _factory() -> Any:
    langdetect = require("langdetect")
    factory = langdetect.DetectorFactory()
    factory.load_profile(langdetect.PROFILES_DIRECTORY)
    factory.set_seed(0)  # it samples n-grams; the official scorer leaves the draw to chance
    return factory
