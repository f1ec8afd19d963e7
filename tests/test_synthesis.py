"""The embedded corpus is the same everywhere, splits share no sentence, and a broken run leaves nothing."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.audio import SAMPLING_RATE, audio_seconds, check_audio, read_audio
from data.synthesis import (
    KOREAN_VOICES,
    ORDINARY_VOICES,
    UNUSUAL_VOICES,
    Voice,
    list_sentences,
    list_variants,
    main,
    new_corpus_folder,
    synthesize,
    write_synthetic_corpus,
)

ALL_VOICES = [*ORDINARY_VOICES, *UNUSUAL_VOICES, *KOREAN_VOICES]
PRINT_DIGEST = """
import hashlib
from data.synthesis import UNUSUAL_VOICES, synthesize
for voice in UNUSUAL_VOICES:
    print(hashlib.sha256(synthesize("dim the hall lamp", voice).tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def korean_folder(tmp_path_factory):
    return write_synthetic_corpus(tmp_path_factory.mktemp("synthetic") / "ko", language="ko", seed=3)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def interrupt_writing(folder: Path) -> None:
    with new_corpus_folder(folder) as scratch:
        (scratch / "a.txt").write_text("a")
        raise KeyboardInterrupt


@pytest.mark.parametrize("voice", ALL_VOICES, ids=lambda voice: voice.speaker_id)
def test_synthesize_gives_a_second_or_more_of_sound(voice):
    samples = synthesize("turn on the kitchen light", voice)
    check_audio(samples, voice.speaker_id)
    assert samples.dtype == np.float32
    assert 0.8 < samples.size / SAMPLING_RATE < 4.0


def test_synthesize_gives_the_same_samples_whatever_was_read_before():
    for voice in (ORDINARY_VOICES[1], *UNUSUAL_VOICES):
        first = synthesize("turn on the fan", voice)
        synthesize("call my brother", ORDINARY_VOICES[5])
        np.testing.assert_array_equal(synthesize("turn on the fan", voice), first)


def test_synthesize_gives_the_same_samples_in_every_process():
    root = Path(__file__).parents[1]
    digests = [
        subprocess.run(
            [sys.executable, "-c", PRINT_DIGEST], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert digests[0] == digests[1]
    assert len(set(digests[0].split())) == len(UNUSUAL_VOICES)


def test_synthesize_speaks_faster_with_more_words_a_minute():
    slow, fast = (synthesize("turn on the kitchen light", Voice("a", "en-us", rate_wpm=rate)) for rate in (100, 300))
    assert slow.size > 1.8 * fast.size


@pytest.mark.parametrize(
    ("name", "known"), [("en-us+zzz", "en-us+"), ("xx-yy", "en-gb-x-rp"), ("", "such as"), ("en-us+../../x", "en-us+")]
)
def test_synthesize_refuses_an_unknown_voice_with_some_that_exist(name, known):
    with pytest.raises(ValueError, match=rf"`voice` must be one of espeak-ng's \d+ .*{known}.*, got '"):
        synthesize("hello", Voice("a", name))


@pytest.mark.parametrize("text", ["", "  ", "?!"])
def test_synthesize_refuses_a_text_without_a_word(text):
    with pytest.raises(ValueError, match="`text` must have a word to read"):
        synthesize(text, ORDINARY_VOICES[0])


@pytest.mark.parametrize(
    ("field", "value"), [("rate_wpm", 79), ("rate_wpm", 451), ("pitch", 100), ("pitch_range", -1)]
)
def test_voice_refuses_a_number_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` must be from \d+ to \d+, got {value}"):
        Voice("a", "en-us", **{field: value})


def test_list_variants_holds_the_variants_of_our_voices():
    used = {voice.voice.partition("+")[2] for voice in ALL_VOICES}
    assert used <= set(list_variants())


def test_voices_are_many_and_distinct():
    assert len(ORDINARY_VOICES) >= 10
    assert len(UNUSUAL_VOICES) >= 3
    assert len(KOREAN_VOICES) >= 3
    assert len({voice.speaker_id for voice in ALL_VOICES}) == len(ALL_VOICES)


def test_english_sentences_are_short_commands_of_few_words():
    sentences = [sentence for split in list_sentences("en").values() for sentence in split]
    assert len({word for sentence in sentences for word in sentence.split()}) == 57
    assert {len(sentence.split()) for sentence in sentences} == {3, 4, 5, 6, 7}


@pytest.mark.parametrize("language", ["en", "ko"])
def test_test_sentences_are_new_but_their_words_are_not(language):
    sentences = list_sentences(language)
    words = {split: {word for sentence in sentences[split] for word in sentence.split()} for split in sentences}
    assert set(sentences["train"]).isdisjoint(sentences["test"])
    assert words["test"] <= words["train"]
    assert len(sentences["test"]) >= 10


def test_write_synthetic_corpus_writes_what_metadata_says(korean_folder):
    rows = read_rows(korean_folder)
    assert list(rows[0]) == ["file_name", "speaker_id", "text", "split", "domain", "voice"]
    assert {row["domain"] for row in rows} == {"microphone"}
    counts = {(row["speaker_id"], row["split"]): 0 for row in rows}
    for row in rows:
        counts[row["speaker_id"], row["split"]] += 1
        assert row["text"] in list_sentences("ko")[row["split"]]
        assert 0.3 < audio_seconds(korean_folder / row["file_name"]) < 4.0
    assert counts == {
        (voice.speaker_id, split): n for voice in KOREAN_VOICES for split, n in (("train", 32), ("test", 8))
    }
    assert len(list(korean_folder.rglob("*.wav"))) == len(rows)


def test_write_synthetic_corpus_makes_no_clones(korean_folder):
    by_text: dict[tuple[str, str], np.ndarray] = {}
    for row in read_rows(korean_folder):
        samples = read_audio(korean_folder / row["file_name"])
        assert np.abs(samples[:100]).max() > 0  # noise already before the first sound
        by_text[row["speaker_id"], row["text"]] = samples
    assert len({samples.size for samples in by_text.values()}) > len(by_text) / 2


def test_write_synthetic_corpus_writes_the_same_files_from_the_command_line(korean_folder, tmp_path):
    main([str(tmp_path / "again"), "--language", "ko", "--seed", "3"])
    paths = sorted(korean_folder.rglob("*.*"))
    assert len(paths) == 120 + 1
    for path in paths:
        assert (tmp_path / "again" / path.relative_to(korean_folder)).read_bytes() == path.read_bytes()


def test_write_synthetic_corpus_writes_other_files_for_another_seed(korean_folder, tmp_path):
    other = write_synthetic_corpus(tmp_path / "other", language="ko", seed=4)
    assert read_rows(other) != read_rows(korean_folder)


def test_write_synthetic_corpus_refuses_an_unknown_language(tmp_path):
    with pytest.raises(ValueError, match="`language` must be one of en, ko, got 'de'"):
        write_synthetic_corpus(tmp_path / "de", language="de")


def test_new_corpus_folder_appears_whole(tmp_path):
    with new_corpus_folder(tmp_path / "deep" / "out") as scratch:
        (scratch / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a.txt").read_text() == "a"


def test_new_corpus_folder_leaves_nothing_when_writing_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt_writing(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["full", "file"])
def test_new_corpus_folder_refuses_what_holds_files(tmp_path, name):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"`folder` must be new or empty, got {tmp_path / name}"):
        with new_corpus_folder(tmp_path / name):
            pass
