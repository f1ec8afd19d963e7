"""Transcripts normalise the same way twice, and vocabularies name what they cannot spell."""

import doctest
import unicodedata

import pytest

import data.text
from data.text import (
    build_vocabulary,
    find_unknown_characters,
    join_text,
    name_characters,
    normalize_text,
    split_text,
)


def test_docstring_examples_hold():
    result = doctest.testmod(data.text)
    assert (result.failed, result.attempted) == (0, 7)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Turn ON,  the\tlight!\n", "turn on the light"),
        ("don\u2019t don\u02bct don`t DON'T", "don't don't don't don't"),
        ("'quoted' dogs' rock 'n' roll", "quoted dogs rock n roll"),
        ("twenty-two\u2013three \u2014 four", "twenty two three four"),
        ("cafe\u0301 \u00c9COLE", "caf\u00e9 \u00e9cole"),
        ("22:30, $5 & 3|4", "22 30 5 3 4"),
        ("\uac70\uc2e4 \ubd88 \ucf1c \uc918.", "\uac70\uc2e4 \ubd88 \ucf1c \uc918"),
        ("\u1100\u1161\u11a8", "\uac01"),
        ("\u0939\u093f\u0902\u0926\u0940!", "\u0939\u093f\u0902\u0926\u0940"),
        ("soft\u00adware \ufeffx", "software x"),
        ("don&#39;t &gt;&gt; turn&nbsp;on &amp;quot;now", "don't turn on now"),
        ("turn&nbsp on R&ampere", "turn on r ampere"),
        ("AT&T", "at t"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalize_text_keeps_words(text, normalized):
    assert normalize_text(text) == normalized


def test_normalize_text_changes_nothing_the_second_time():
    characters = [chr(code) for code in range(0x3000)] + [chr(code) for code in range(0xAC00, 0xAD00)]
    once = [normalize_text(f"a{character}b {character}'{character}") for character in characters]
    assert [normalize_text(text) for text in once] == once


def test_split_text_takes_only_hangul_apart():
    assert split_text("\ud55c caf\u00e9", "jamo") == "\u1112\u1161\u11ab caf\u00e9"
    assert split_text("\ud55c caf\u00e9", "character") == "\ud55c caf\u00e9"


def test_join_text_inverts_split_text_for_every_syllable():
    syllables = " ".join(chr(code) for code in range(0xAC00, 0xD7A4))
    assert len(set(split_text(syllables, "jamo"))) == 19 + 21 + 27 + 1  # initials, vowels, finals, and the space
    assert join_text(split_text(syllables, "jamo"), "jamo") == syllables


def test_join_text_leaves_single_jamo_and_accents_alone():
    assert join_text("\u1112 e\u0301", "jamo") == "\u1112 e\u0301"
    assert join_text("\u1112\u1161", "character") == "\u1112\u1161"


@pytest.mark.parametrize("function", [split_text, join_text])
def test_text_unit_is_refused_with_the_choices(function):
    with pytest.raises(ValueError, match="`text_unit` must be one of 'character', 'jamo', got 'word'"):
        function("a", "word")


def test_build_vocabulary_sorts_characters_behind_the_special_tokens():
    assert build_vocabulary(["b a", "a'c"]) == {"<pad>": 0, "<unk>": 1, "|": 2, "'": 3, "a": 4, "b": 5, "c": 6}


def test_build_vocabulary_of_jamo_spells_unheard_syllables():
    vocabulary = build_vocabulary(["\uac70\uc2e4", "\ubd88"], text_unit="jamo")
    assert all(unicodedata.name(token).startswith("HANGUL") for token in list(vocabulary)[3:])
    assert find_unknown_characters(["\uc124"], vocabulary, text_unit="jamo") == {}


def test_build_vocabulary_does_not_depend_on_order():
    assert build_vocabulary(["xyz", "abc"]) == build_vocabulary(["cba", "zyx"])


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_build_vocabulary_refuses_a_corpus_without_characters(texts):
    with pytest.raises(ValueError, match="`text` must have a character in some row, got none"):
        build_vocabulary(texts)


def test_build_vocabulary_refuses_the_word_delimiter_in_a_text():
    with pytest.raises(ValueError, match=r"`text` must not hold '\|', the word delimiter"):
        build_vocabulary(["a|b"])


def test_find_unknown_characters_counts_rows_from_one():
    vocabulary = build_vocabulary(["abc"])
    assert find_unknown_characters(["a b", "dad", "cd e"], vocabulary) == {"d": [2, 3], "e": [3]}


def test_invisible_characters_are_named_by_their_code_points():
    named = "COMBINING DOT ABOVE (U+0307), ZERO WIDTH NON-JOINER (U+200C), VARIATION SELECTOR-16 (U+FE0F)"
    assert name_characters("\ufe0f\u0307\u200c") == named


def test_many_characters_are_counted_behind_the_first():
    assert name_characters("gfedcba").endswith("'e' (U+0065) and 2 more")
