"""A few transcripts that cannot be learnt are left out by name, many stop; references may hold anything."""

import doctest
import logging

import numpy as np
import pytest
import soundfile
from datasets import Dataset

import data.spelling
from data.text import set_language
from data.utterances import UtteranceDataset, decode_clips

NUM_ROWS = 40  # of which two are 5 %


@pytest.fixture
def read(tmp_path, tiny_processor):
    """Decodes a corpus of 40 clips of half a second that say "go on", but for the rows that are given."""

    def decode(changes: dict[int, str], *, seconds: dict[int, float] | None = None, **options) -> Dataset:
        rows = []
        for row in range(NUM_ROWS):
            path = tmp_path / f"{row}.wav"
            duration = (seconds or {}).get(row, 0.5)
            soundfile.write(path, 0.1 * np.random.default_rng(row).standard_normal(round(16_000 * duration)), 16_000)
            rows.append({"audio": {"path": str(path), "bytes": None}, "text": changes.get(row, "go on")})
        return decode_clips(Dataset.from_list(rows), tiny_processor, samples_per_logit=320, **options)

    return decode


def test_docstring_examples_hold():
    assert doctest.testmod(data.spelling) == doctest.TestResults(failed=0, attempted=1)


@pytest.mark.parametrize(
    ("text", "fault"),
    [("...", "no word"), ("❤\ufe0f", "no word"), ("café", "'é' (U+00E9)"), ("nine 9", "'9' (U+0039)")],
)
def test_a_row_that_cannot_be_learnt_is_left_out_by_name(read, text, fault, caplog):
    clips = read({3: text})

    assert len(clips) == NUM_ROWS - 1
    assert not any(name.endswith("/3.wav") for name in clips["name"])
    assert set(clips["text"]) == {"go on"}
    assert "1 of 40 values of `text` have no word or characters outside the vocabulary of 30 tokens: " in caplog.text
    assert f"3.wav: {fault}. They are left out." in caplog.text


def test_many_rows_that_cannot_be_learnt_stop_the_training(read):
    with pytest.raises(ValueError, match=r"3 of 40 values of `text` have no word .*3\.wav: no word; .* Correct them"):
        read({3: "...", 4: "é", 5: "?"})


def test_references_may_hold_what_the_model_cannot_write(read, tiny_processor, caplog):
    clips = read({3: "Café", 4: "...", **dict.fromkeys(range(5, 15), "é")}, is_evaluation=True)

    assert len(clips) == NUM_ROWS
    assert UtteranceDataset(clips, tiny_processor).references[3:6] == ["café", "", "é"]
    warnings = [record.getMessage() for record in caplog.records if "references" in record.getMessage()]
    assert warnings == [
        "11 of 40 references have characters outside the model's vocabulary, which count as errors: 'é' (U+00E9).",
        "1 of 40 references have no word: every word heard there is an error.",
    ]


def test_references_without_any_word_are_refused_before_a_training(read):
    with pytest.raises(ValueError, match="`text` must have a word in some reference, got 40 without"):
        read(dict.fromkeys(range(NUM_ROWS), "..."), is_evaluation=True)


def test_a_long_clip_is_left_out_of_training_by_name(read, caplog):
    clips = read({}, seconds={7: 2.5}, max_clip_seconds=2.0)

    assert len(clips) == NUM_ROWS - 1
    assert max(clips["num_samples"]) == 8000
    assert "1 of 40 clips are longer than `max_clip_seconds` (2): " in caplog.text
    assert "7.wav (2.5 s). They are left out." in caplog.text
    assert len(read({}, seconds={7: 2.5}, max_clip_seconds=2.0, is_evaluation=True)) == NUM_ROWS


def test_many_long_clips_are_an_error_and_the_limit_is_one(read):
    with pytest.raises(ValueError, match=r"3 of 40 clips are longer than `max_clip_seconds` \(2\).* or raise"):
        read({}, seconds=dict.fromkeys([1, 2, 3], 2.5), max_clip_seconds=2.0)
    with pytest.raises(ValueError, match="`max_clip_seconds` must be positive, got 0"):
        read({}, max_clip_seconds=0)


def test_the_longest_clip_is_40_seconds_unless_said_otherwise(read, caplog):
    assert len(read({}, seconds={7: 41.0})) == NUM_ROWS - 1
    assert "7.wav (41.0 s)" in caplog.text
    assert len(read({}, seconds={7: 41.0}, max_clip_seconds=60)) == NUM_ROWS


@pytest.mark.parametrize("is_evaluation", [False, True])
def test_few_characters_a_second_are_warned_of(read, is_evaluation, caplog):
    # "go on" in half a second is 10 characters a second; a tenth of that is 1.
    clips = read({}, seconds={7: 6.0, 8: 4.0}, is_evaluation=is_evaluation)

    assert len(clips) == NUM_ROWS
    assert "1 of 40 clips have fewer than 1.0 characters a second in their transcript: " in caplog.text
    assert "7.wav (5 characters in 6.0 s). Check that it says all that is heard." in caplog.text
    assert "8.wav" not in caplog.text


def test_turkish_transcripts_without_a_language_are_warned_of(read, caplog):
    with caplog.at_level(logging.WARNING):
        read({3: "IŞIK", 4: "ılık"}, is_evaluation=True)
    assert "1 of 40 transcripts have a dotless ı or a dotted İ, 'ılık' first, and \"I\" is read as i." in caplog.text


def test_turkish_transcripts_of_a_turkish_model_are_normalised_in_silence(read, tiny_processor, caplog, monkeypatch):
    monkeypatch.setattr(tiny_processor.tokenizer, "init_kwargs", dict(tiny_processor.tokenizer.init_kwargs))
    set_language(tiny_processor.tokenizer, ["tr"])
    clips = read({3: "IŞIK", 4: "ılık"}, is_evaluation=True)
    assert clips["text"][3:5] == ["ışık", "ılık"]
    assert "dotless" not in caplog.text
