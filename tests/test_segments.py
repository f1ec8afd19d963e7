"""A row with times hears its part of a recording; times that fit the file in no way, or in two, are refused."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from data.audio import read_audio
from data.corpora import load_corpus

RATE = 16_000
SAMPLES = (0.1 * np.random.default_rng(0).standard_normal(10 * RATE)).astype(np.float32)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """A recording of 10 s, and clips of 2 and 3 s."""
    for name, seconds in (("long", 10), ("two", 2), ("three", 3)):
        soundfile.write(tmp_path / f"{name}.wav", SAMPLES[: seconds * RATE], RATE, subtype="FLOAT")
    return tmp_path


def load(folder: Path, *rows: dict, streaming: bool = False):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"audio": "long.wav", "text": "go"} | row) for row in rows))
    return load_corpus(str(path), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "times",
    [
        {"start": 1.5, "end": 4.0},
        {"start": "1.5", "end": "4"},
        {"begin_time": 1.5, "end_time": 4.0},
        {"start_time": 1.5, "end_time": 4.0},
        {"offset": 1.5, "duration": 2.5},
        {"start": 1.5, "end": 4.0, "duration": 2.5},
        {"start": 1.5, "end": 4.0, "offset": 1.5, "duration": 2.5},
    ],
)
def test_a_row_hears_its_part_alone(folder, times, streaming):
    (row,) = load(folder, times, streaming=streaming)
    np.testing.assert_array_equal(read_audio(row["audio"]), SAMPLES[24_000:64_000])
    assert row["audio"]["path"] == f"{folder / 'long.wav'}#1.5-4"


@pytest.mark.parametrize(
    ("times", "first"),
    [
        ({}, 0),
        ({"start": 0, "end": 10.0}, 0),
        ({"start": None, "end": None}, 0),
        ({"offset": 2.0}, 2 * RATE),
        ({"duration": 4.0}, 0),  # of what, only NeMo's manifests say
    ],
)
def test_times_of_all_of_a_recording_cut_nothing(folder, times, first):
    (row,) = load(folder, times)
    np.testing.assert_array_equal(read_audio(row["audio"]), SAMPLES[first:])


def test_a_short_recording_is_cut_as_exactly_as_a_long_one(folder):
    soundfile.write(folder / "short.wav", SAMPLES[:1600], RATE, subtype="FLOAT")
    (row,) = load(folder, {"audio": "short.wav", "start": 0.01, "end": 0.05})
    np.testing.assert_array_equal(read_audio(row["audio"]), SAMPLES[160:800])


def test_times_of_the_book_leave_a_clip_as_it_is(folder):
    # Multilingual LibriSpeech: clips of 2 and 3 s that were cut out of a chapter, whose times the columns have.
    corpus = load(
        folder,
        {"audio": "two.wav", "begin_time": 401.76, "end_time": 403.74},
        {"audio": "three.wav", "begin_time": 403.74, "end_time": 406.8},
        {"audio": "two.wav", "begin_time": 0.0, "end_time": 2.0},
    )
    assert [len(read_audio(audio)) for audio in corpus["audio"]] == [2 * RATE, 3 * RATE, 2 * RATE]
    assert [audio["bytes"] for audio in corpus["audio"]] == [None] * 3


def test_times_that_can_be_read_in_two_ways_are_refused(folder):
    with pytest.raises(ValueError, match="A corpus's times must be of one kind, got .* row 1 in .* and .* row 2 in"):
        load(
            folder,
            {"audio": "two.wav", "begin_time": 1.0, "end_time": 1.5},
            {"audio": "three.wav", "begin_time": 403.74, "end_time": 406.74},
        )


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"start": 1500, "end": 4000}, "must have times in seconds within its recording of 10.00 s, got 1500 to 4000"),
        ({"start": 8.0, "end": 10.5}, "within its recording of 10.00 s, got 8 to 10.5"),
        ({"offset": 11.0}, "start before its end, got 11.0 and 10.0 seconds"),
        ({"start": 4.0, "end": 1.5}, "must have a start before its end, got 4.0 and 1.5 seconds"),
        ({"start": None, "end": 1.5}, "must have a start before its end, got None and 1.5"),
        (
            {"start": -1.0, "end": 1.5},
            "`start` of row 1 in .* must be seconds from the start of the recording, got -1.0",
        ),
        ({"start": "00:01", "end": "00:02"}, "`start` of row 1 in .* must be seconds .*, got '00:01'"),
        ({"start": "1,5", "end": "4,0"}, "must be seconds .*, got '1,5'"),
        ({"start": True, "end": 2}, "must be seconds .*, got True"),
        (
            {"start": 1.5, "end": 4.0, "offset": 2.5, "duration": 1.5},
            "times in one way, got 1.5 to 4.0 and 2.5 to 4.0",
        ),
    ],
)
def test_times_that_do_not_fit_the_file_are_named(folder, times, message):
    with pytest.raises(ValueError, match=message):
        load(folder, times)


def test_a_recording_that_cannot_be_read_is_named_with_its_row(folder):
    (folder / "long.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match=r"1 of 1 rows cannot be used: .*long\.wav"):
        load(folder, {"start": 1.0, "end": 2.0})


def test_parts_are_found_in_the_cache_until_their_recording_changes(folder):
    rows = [{"start": 1.0, "end": 2.0}, {"start": 2.0, "end": 3.0}]
    first, again = load(folder, *rows), load(folder, *rows)
    assert again.cache_files == first.cache_files
    soundfile.write(folder / "long.wav", -SAMPLES, RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(load(folder, *rows)[1]["audio"]), -SAMPLES[2 * RATE : 3 * RATE])
