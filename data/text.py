"""Transcripts: normalised text, the units that a recogniser spells in, and its vocabulary."""

import html
import logging
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, partial

import regex

from .scripts import (
    APOSTROPHES,
    INNER,
    INNER_COLON,
    fold_final_sigma,
    fold_language,
    fold_scripts,
    has_rules,
    parse_language,
)

logger = logging.getLogger(__name__)

TEXT_UNITS = ("character", "jamo")
PAD, UNKNOWN, WORD_DELIMITER = "<pad>", "<unk>", "|"  # the tokens of Wav2Vec2CTCTokenizer; the pad is the CTC blank

OUTER_APOSTROPHE = re.compile(r"(?<![^\s'])'|'(?![^\s'])")  # in transcripts of before
# Apostrophes that do not stand between two characters of a word, and marks that are left of a symbol or stand on one.
OUTER = regex.compile(r"''['\p{M}]*|(?<!\S)['\p{M}]+|'['\p{M}]*(?!\S)")
ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);|&(?:nbsp|amp|lt|gt|quot)(?!\w)")
HANGUL_SYLLABLE = re.compile("[\uac00-\ud7a3]")
CONJOINING_JAMO = re.compile("[\u1100-\u11ff]+")
NUM_NAMED = 5  # rows or characters that an error message lists
# Entry of a tokenizer's configuration: how the transcripts were normalised that its vocabulary was made of.
TRANSCRIPTS = "transcripts"
RULES_VERSION = 2  # a folder without the entry has been made by the rules before them


def normalize_text(text: str, *, language: str | None = None) -> str:
    """
    Returns a transcript as words of lower-case letters, digits and inner apostrophes, one space between words.

    Unicode is composed (NFC), compatibility forms are folded and HTML entities read. Punctuation and symbols, the
    hyphen too, part words; what is invisible is dropped, but for joiners where a script needs them. Applying it twice
    changes nothing.

    Args:
        text: As somebody wrote it.
        language: Code of its language, for what Unicode alone cannot tell: Turkish "I", Hawaiian and Uzbek
            apostrophes, Persian letters typed on an Arabic keyboard, Romanian cedillas, Catalan dots.

    Raises:
        ValueError: `language` is no code.

    Example:
        >>> normalize_text("  Don\u2019t wait\u2014it's 22:30! ")
        "don't wait it's 22 30"
    """
    language = parse_language(language)
    text = fold_language(fold_scripts(unescape_entities(text), language), language)
    text = _find_parting(language).sub(lambda match: match[1] or " ", text)
    text = fold_final_sigma(OUTER.sub(" ", text))
    return unicodedata.normalize("NFC", " ".join(text.split()))


def unescape_entities(text: str) -> str:
    """
    Returns `text` with HTML's entities read, also where they were escaped twice.

    Example:
        >>> unescape_entities("&amp;gt; don&#39;t")
        "> don't"
    """
    while (unescaped := ENTITY.sub(lambda match: html.unescape(match[0]), text)) != text:
        text = unescaped
    return text


def describe_transcripts(language: str | None = None) -> dict[str, str | int | None]:
    """Returns what a tokenizer notes about its transcripts: the rules of today, and the language they need, if any."""
    return {"rules": RULES_VERSION, "language": parse_language(language)}


def find_language(tokenizer) -> str | None:
    """Returns the language by which a recogniser's transcripts are normalised, if its tokenizer names one."""
    return (tokenizer.init_kwargs.get(TRANSCRIPTS) or {}).get("language")


def set_language(tokenizer, languages: Sequence[str] | None) -> None:
    """
    Notes the language of a recogniser's transcripts in its tokenizer, which saves it; warns where it had none.

    Args:
        tokenizer: CTC tokenizer.
        languages: What the user says they are in; the first one counts. None leaves the tokenizer as it is.

    Raises:
        ValueError: One is no language code, or the tokenizer was saved with a language that is not among them.
    """
    if not languages:
        return
    saved, given = find_language(tokenizer), [parse_language(language) for language in languages]
    if saved and saved not in given:
        raise ValueError(
            f"`language` must be {saved}, by which the model's transcripts were normalised, got {', '.join(given)}. "
            "Leave it out or use another model."
        )
    if not saved and has_rules(given[0]):
        logger.warning(
            "The model was saved without a language: its transcripts are normalised as `%s` in this run. Give "
            "`--language %s` to every run on it, or train it on with `recipes/train_ctc.py`, which saves it.",
            *(given[0], given[0]),
        )
    tokenizer.init_kwargs[TRANSCRIPTS] = describe_transcripts(saved or given[0])


def find_normalizer(tokenizer) -> Callable[[str], str]:
    """
    Returns what normalises transcripts for a recogniser, as those were that it was trained on.

    A tokenizer that was saved before it could name its rules keeps those of before for every transcript that its
    vocabulary can spell by them.
    """
    normalize = partial(normalize_text, language=find_language(tokenizer))
    if writes_capitals(tokenizer):
        return lambda text: normalize(text).upper()
    if tokenizer.init_kwargs.get(TRANSCRIPTS):
        return normalize
    spellable, text_unit = {" ", *tokenizer.get_vocab()}, find_text_unit(tokenizer)

    def keep(text: str) -> str:
        before = _normalize_before(unescape_entities(text))
        return before if spellable.issuperset(split_text(before, text_unit)) else normalize(text)

    return keep


def writes_capitals(tokenizer) -> bool:
    """Whether a recogniser writes capitals alone, as many of the Hub do: no class has a small letter."""
    letters = {token for token in tokenizer.get_vocab() if len(token) == 1 and token.isalpha()}
    return any(map(str.isupper, letters)) and not any(map(str.islower, letters))


def list_writable(tokenizer) -> set[str]:
    """Returns the characters that a recogniser can write: its classes, or the letters of those that are word parts."""
    vocabulary = set(tokenizer.get_vocab())
    return vocabulary if hasattr(tokenizer, "word_delimiter_token") else vocabulary.union(*vocabulary)


def find_text_unit(tokenizer) -> str:
    """Returns "jamo" for a tokenizer that spells Hangul syllables, else "character"."""
    return "jamo" if type(tokenizer).__name__ == "JamoCTCTokenizer" else "character"


def _normalize_before(text: str) -> str:
    """The rules of before: no language, no compatibility forms, format characters dropped everywhere."""
    text = unicodedata.normalize("NFC", text).translate(APOSTROPHES).lower()
    text = "".join(_keep_character(character) for character in text)
    return unicodedata.normalize("NFC", " ".join(OUTER_APOSTROPHE.sub(" ", text).split()))


@cache
def _find_parting(language: str | None) -> regex.Pattern:
    """Matches what parts words, and in its group the marks that belong to one."""
    inner = INNER + (r"|(?<=\p{L}):(?=\p{L})" if language in INNER_COLON else "")
    return regex.compile(rf"({inner})|[^\p{{L}}\p{{M}}\p{{N}}'\u200c\u200d]", regex.V1)


def split_text(text: str, text_unit: str) -> str:
    """
    Returns `text` spelled in `text_unit`: as it is, or with Hangul syllables taken apart into conjoining jamo.

    Args:
        text: Normalised text.
        text_unit: "character" or "jamo". Letters with accents stay composed in both.

    Raises:
        ValueError: `text_unit` is neither.

    Example:
        >>> [f"{ord(jamo):x}" for jamo in split_text("\ud55c", "jamo")]
        ['1112', '1161', '11ab']
    """
    _check_text_unit(text_unit)
    if text_unit == "character":
        return text
    return HANGUL_SYLLABLE.sub(lambda match: unicodedata.normalize("NFD", match[0]), text)


def join_text(text: str, text_unit: str) -> str:
    """
    Returns the text that `split_text` spelled; jamo that form no syllable stay single.

    Args:
        text: Text in units of `text_unit`.
        text_unit: "character" or "jamo".

    Raises:
        ValueError: `text_unit` is neither.

    Example:
        >>> join_text(split_text("\ud55c\uad6d\uc5b4", "jamo"), "jamo") == "\ud55c\uad6d\uc5b4"
        True
    """
    _check_text_unit(text_unit)
    if text_unit == "character":
        return text
    return CONJOINING_JAMO.sub(lambda match: unicodedata.normalize("NFC", match[0]), text)


def build_vocabulary(texts: Iterable[str], *, text_unit: str = "character") -> dict[str, int]:
    """
    Returns the vocabulary of a character recogniser, in the layout of `Wav2Vec2CTCTokenizer`.

    Args:
        texts: Normalised transcripts.
        text_unit: "character" or "jamo".

    Returns:
        Token to id: the pad (the CTC blank) 0, the unknown token 1, the word delimiter 2, then the characters, sorted.

    Raises:
        ValueError: No transcript has a character, or one holds "|".

    Example:
        >>> build_vocabulary(["go on"])
        {'<pad>': 0, '<unk>': 1, '|': 2, 'g': 3, 'n': 4, 'o': 5}
    """
    characters = {character for text in texts for character in split_text(text, text_unit)} - {" "}
    if not characters:
        raise ValueError("`text` must have a character in some row, got none. Check the corpus and its `text` column.")
    if WORD_DELIMITER in characters:
        raise ValueError(f"`text` must not hold {WORD_DELIMITER!r}, the word delimiter. Normalise the transcripts.")
    return {token: index for index, token in enumerate([PAD, UNKNOWN, WORD_DELIMITER, *sorted(characters)])}


def find_unknown_characters(
    texts: Iterable[str], vocabulary: Collection[str], *, text_unit: str = "character"
) -> dict[str, list[int]]:
    """
    Returns the characters that a vocabulary lacks, each with the numbers of the rows that hold it, counted from 1.

    Args:
        texts: Normalised transcripts, one a row.
        vocabulary: Characters, as the keys of `build_vocabulary` or from `list_writable`.
        text_unit: "character" or "jamo".

    Example:
        >>> find_unknown_characters(["go", "caf\u00e9", "\u00e9"], build_vocabulary(["go face"]))
        {'\u00e9': [2, 3]}
    """
    rows: dict[str, list[int]] = {}
    for number, text in enumerate(texts, start=1):
        for character in sorted(set(split_text(text, text_unit)) - {" "} - set(vocabulary)):
            rows.setdefault(character, []).append(number)
    return rows


def name_characters(characters: Iterable[str]) -> str:
    """
    Returns characters with their code points, so that invisible ones show; of many the first.

    Example:
        >>> name_characters(["\u00e9", "\ufe0f"])
        "'\u00e9' (U+00E9), VARIATION SELECTOR-16 (U+FE0F)"
    """
    shown = []
    for character in sorted(characters):
        is_visible = character.isprintable() and not unicodedata.combining(character) and character.strip()
        is_visible = is_visible and not regex.match(r"[\p{M}\p{DI}]", character)
        name = repr(character) if is_visible else unicodedata.name(character, "unnamed")
        shown.append(f"{name} (U+{ord(character):04X})")
    return _list_first(shown)


def _keep_character(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "LMN" or character == "'":  # marks (M) are parts of letters in many scripts
        return character
    return "" if category == "Cf" else " "


def _check_text_unit(text_unit: str) -> None:
    if text_unit not in TEXT_UNITS:
        choices = ", ".join(map(repr, TEXT_UNITS))
        raise ValueError(f"`text_unit` must be one of {choices}, got {text_unit!r}. Choose one of them.")


def _list_first(items: list[str]) -> str:
    shown = ", ".join(items[:NUM_NAMED])
    return shown if len(items) <= NUM_NAMED else f"{shown} and {len(items) - NUM_NAMED} more"
