"""How texts of recognisers that write as people do, with figures and punctuation, are compared."""

import re
from collections.abc import Callable

from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from .text import normalize_text

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ENGLISH = ("en", "english")


def find_score_normalizer(tokenizer, language: str | None = None) -> Callable[[str], str]:
    """
    Returns what makes a reference and a hypothesis comparable: figures and words of a number are the same.

    English goes through Whisper's own normaliser, before and after which each digit is a word: it writes "zero one" as
    "01" and "01" as "1". Other languages go through [`normalize_text`].

    Args:
        tokenizer: Whisper's.
        language: Code of what is said. Default: the tokenizer's; a tokenizer without languages is English.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (arXiv 2212.04356), C.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> from data.score_text import find_score_normalizer

    >>> normalize = find_score_normalizer(SimpleNamespace(language=None))
    >>> normalize("0, 1, 2!"), normalize("zero one two"), normalize("Twenty-three"), normalize("23")
    ('zero one two', 'zero one two', 'two three', 'two three')

    ```
    """
    language = language or getattr(tokenizer, "language", None)
    if language is not None and language.lower() not in ENGLISH:
        return lambda text: normalize_text(text, language=language)
    normalize = EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    return lambda text: " ".join(_spell_digits(normalize(_spell_digits(text))).split())


def _spell_digits(text: str) -> str:
    return re.sub(r"[0-9]", lambda match: f" {DIGITS[int(match[0])]} ", text)
