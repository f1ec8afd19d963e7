"""Transcripts: normalised text, the units that a recogniser spells in, and its vocabulary."""

import re
import unicodedata
from collections.abc import Iterable, Mapping

TEXT_UNITS = ("character", "jamo")
PAD, UNKNOWN, WORD_DELIMITER = "<pad>", "<unk>", "|"  # the tokens of Wav2Vec2CTCTokenizer; the pad is the CTC blank

APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u2032\uff07`\u00b4"), "'")
OUTER_APOSTROPHE = re.compile(r"(?<![^\s'])'|'(?![^\s'])")  # one that does not stand between two characters of a word
HANGUL_SYLLABLE = re.compile("[\uac00-\ud7a3]")
CONJOINING_JAMO = re.compile("[\u1100-\u11ff]+")
NUM_NAMED = 5  # rows or characters that an error message lists


def normalize_text(text: str) -> str:
    """
    Returns a transcript as words of lower-case letters, digits and inner apostrophes, one space between words.

    Unicode is composed (NFC). Punctuation and symbols, the hyphen too, part words; invisible format characters are
    dropped. Applying it twice changes nothing.

    Example:
        >>> normalize_text("  Don\u2019t wait\u2014it's 22:30! ")
        "don't wait it's 22 30"
    """
    text = unicodedata.normalize("NFC", text).translate(APOSTROPHES).lower()
    text = "".join(_keep_character(character) for character in text)
    text = OUTER_APOSTROPHE.sub(" ", text)
    return unicodedata.normalize("NFC", " ".join(text.split()))


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
    texts: Iterable[str], vocabulary: Mapping[str, int], *, text_unit: str = "character"
) -> dict[str, list[int]]:
    """
    Returns the characters that a vocabulary lacks, each with the numbers of the rows that hold it, counted from 1.

    Args:
        texts: Normalised transcripts, one a row.
        vocabulary: Token to id, as from `build_vocabulary`.
        text_unit: "character" or "jamo".

    Example:
        >>> find_unknown_characters(["go", "caf\u00e9", "\u00e9"], build_vocabulary(["go face"]))
        {'\u00e9': [2, 3]}
    """
    rows: dict[str, list[int]] = {}
    for number, text in enumerate(texts, start=1):
        for character in sorted(set(split_text(text, text_unit)) - {" "} - vocabulary.keys()):
            rows.setdefault(character, []).append(number)
    return rows


def check_characters(
    texts: Iterable[str], vocabulary: Mapping[str, int], *, text_unit: str = "character", name: str = "text"
) -> None:
    """
    Checks that a vocabulary can spell every transcript.

    Args:
        texts: Normalised transcripts, one a row.
        vocabulary: Token to id.
        text_unit: "character" or "jamo".
        name: What the error calls the transcripts: the column, or column and split.

    Raises:
        ValueError: A character is not in the vocabulary; names the characters, the number of rows, and the first rows.
    """
    unknown = find_unknown_characters(texts, vocabulary, text_unit=text_unit)
    if not unknown:
        return
    rows = sorted({number for numbers in unknown.values() for number in numbers})
    raise ValueError(
        f"`{name}` must be spelled with the vocabulary's {len(vocabulary)} tokens, got "
        f"{_list_first([repr(character) for character in sorted(unknown)])} in {len(rows)} row(s): "
        f"{_list_first([str(number) for number in rows])}. "
        "Correct these transcripts, remove the rows, or use a model whose vocabulary has the characters."
    )


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
