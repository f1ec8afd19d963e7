"""Rows are chosen by speaker and by seconds; what is not there is named."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset

from data.audio import SAMPLING_RATE
from data.corpora import load_corpus, take_seconds
from data.speakers import select_speakers

SECONDS = {"a": 0.5, "b": 1.0, "c": 1.5, "d": 2.0}  # of the recordings in `corpus`


@pytest.fixture
def corpus(tmp_path):
    """Two speakers, three distinct transcripts: a "go on" (ann), b "stop" (ann), c "go on" (bob), d "wait" (bob)."""
    for name, seconds in SECONDS.items():
        noise = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * SAMPLING_RATE))
        soundfile.write(tmp_path / f"{name}.wav", noise, SAMPLING_RATE)
    columns = {
        "audio": [{"path": str(tmp_path / f"{name}.wav"), "bytes": None} for name in SECONDS],
        "text": ["go on", "stop", "go on", "wait"],
        "speaker_id": ["ann", "ann", "bob", "bob"],
    }
    return Dataset.from_dict(columns).cast_column("audio", Audio(decode=False))


def test_select_speakers_takes_or_leaves_rows(corpus):
    assert select_speakers(corpus, ["ann"])["text"][:] == ["go on", "stop"]
    assert select_speakers(corpus, ["ann"], exclude=True)["speaker_id"][:] == ["bob", "bob"]
    assert len(select_speakers(corpus, ["bob", "ann"])) == 4


@pytest.mark.parametrize("exclude", [False, True])
def test_select_speakers_lists_the_known_ones(corpus, exclude):
    with pytest.raises(ValueError, match=r"`speaker_id` must be one of the 2 speakers .*\(ann, bob\), got 'eve'"):
        select_speakers(corpus, ["ann", "eve"], exclude=exclude)


def test_select_speakers_lists_ten_of_many():
    rows = [{"speaker_id": f"s{number:02d}"} for number in range(30)]
    with pytest.raises(ValueError, match=r"one of the 30 speakers with data here \(s00, .*, s09, \.\.\.\), got 'eve'"):
        select_speakers(Dataset.from_list(rows), ["eve"])


def test_select_speakers_refuses_to_leave_nobody(corpus):
    with pytest.raises(ValueError, match=r"must leave some of the 2 .*\['ann', 'bob'\] excluded: no data is left"):
        select_speakers(corpus, ["ann", "bob"], exclude=True)


def test_select_speakers_refuses_an_empty_choice(corpus):
    with pytest.raises(ValueError, match=r"got \[\] selected: no data is left"):
        select_speakers(corpus, [])


def test_select_speakers_finds_an_accent_that_is_composed_elsewhere(corpus):
    decomposed = ["Jose\u0301", "Jose\u0301", "ann", None]
    corpus = corpus.remove_columns("speaker_id").add_column("speaker_id", decomposed)
    assert select_speakers(corpus, ["Jos\u00e9"])["text"][:] == ["go on", "stop"]
    both = corpus.remove_columns("speaker_id").add_column("speaker_id", ["Jose\u0301", "Jos\u00e9", "ann", "ann"])
    assert select_speakers(both, ["Jos\u00e9"])["text"][:] == ["stop"]


def test_select_speakers_names_the_missing_column(corpus):
    with pytest.raises(ValueError, match="`speaker_id` must be a column of the corpus, got the columns"):
        select_speakers(corpus.remove_columns("speaker_id"), ["ann"])


@pytest.mark.parametrize("max_seconds", [5.0, 4.9, 3.0, 1.9, 0.5])
def test_take_seconds_fills_the_budget_and_never_exceeds_it(corpus, max_seconds):
    for seed in range(8):
        seconds = take_seconds(corpus, max_seconds, seed=seed)["seconds"][:]
        left_out = set(SECONDS.values()) - set(seconds)
        assert sum(seconds) <= max_seconds
        assert all(sum(seconds) + clip_seconds > max_seconds for clip_seconds in left_out)


def test_take_seconds_covers_transcripts_before_it_repeats_one(corpus):
    for seed in range(8):
        taken = take_seconds(corpus, 100.0, seed=seed)
        assert sorted(taken["text"][:3]) == ["go on", "stop", "wait"]
        assert taken["text"][3] == "go on"
        assert taken["seconds"][:] == [SECONDS[Path(source["path"]).stem] for source in taken["audio"]]


def test_take_seconds_depends_on_the_seed_alone(corpus):
    orders = [tuple(source["path"] for source in take_seconds(corpus, 100.0, seed=seed)["audio"]) for seed in range(8)]
    again = [tuple(source["path"] for source in take_seconds(corpus, 100.0, seed=seed)["audio"]) for seed in range(8)]
    assert orders == again
    assert len(set(orders)) > 1


def test_take_seconds_covers_the_digits_of_a_real_speaker_in_ten_seconds(fsdd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    speaker = select_speakers(load_corpus(str(fsdd_folder), split="train"), ["theo"])
    taken = take_seconds(speaker, 10.0, seed=0)
    assert len(set(taken["text"][:10])) == 10
    assert 9.0 < sum(taken["seconds"]) <= 10.0


def test_take_seconds_takes_a_corpus_without_text(corpus):
    assert len(take_seconds(corpus.remove_columns("text"), 100.0, seed=0)) == 4


@pytest.mark.parametrize("max_seconds", [0.0, -1.0, float("nan")])
def test_take_seconds_refuses_a_budget_that_is_not_positive(corpus, max_seconds):
    with pytest.raises(ValueError, match=f"`max_seconds` must be positive, got {max_seconds}"):
        take_seconds(corpus, max_seconds, seed=0)


def test_take_seconds_names_the_shortest_clip_when_none_fits(corpus):
    with pytest.raises(ValueError, match=r"`max_seconds` must be at least 0\.50, .*a\.wav\), got 0\.1"):
        take_seconds(corpus, 0.1, seed=0)
