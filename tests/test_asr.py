"""Clips become utterances: checked once, joined and augmented by seed, and the same again when asked again."""

import itertools
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset

from data.audio import AudioError
from data.augmentation import Augmentation
from data.utterances import (
    UtteranceDataset,
    count_ctc_frames,
    decode_clips,
    drop_infeasible,
    find_text_unit,
    join_clips,
)
from modeling import JamoCTCTokenizer

TEXTS = ["One, two!", "three", "four", "five six", "seven", "eight"]
SPEAKERS = ["ann", "ann", "ben", "ann", "ben", "ann"]


@pytest.fixture
def corpus(tmp_path) -> Dataset:
    """Six clips of noise, 0.5 to 1 s at 16 kHz, of two speakers."""
    rows = []
    for index, (text, speaker_id) in enumerate(zip(TEXTS, SPEAKERS, strict=True)):
        path = tmp_path / f"{index}.wav"
        samples = 0.1 * np.random.default_rng(index).standard_normal(8000 + 1600 * index)
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
        rows.append({"audio": {"path": str(path), "bytes": None}, "text": text, "speaker_id": speaker_id})
    return Dataset.from_list(rows)


@pytest.fixture
def clips(corpus, tiny_processor) -> Dataset:
    return decode_clips(corpus, tiny_processor, samples_per_logit=320)


def make_table(needed: list[int], num_samples: int) -> Dataset:
    """Rows of distinct labels, `needed` of them each, with audio of `num_samples` samples."""
    return Dataset.from_dict(
        {
            "name": [f"clip{row}.wav" for row in range(len(needed))],
            "labels": [list(range(count)) for count in needed],
            "num_samples": [num_samples] * len(needed),
        }
    )


def test_decoded_clips_hold_samples_and_normalised_text(corpus, clips, tiny_processor):
    assert clips["text"][:] == ["one two", *TEXTS[1:]]
    assert clips["speaker_id"][:] == SPEAKERS
    assert clips["num_samples"][:] == [8000 + 1600 * index for index in range(6)]
    assert clips["name"][:] == [clip["path"] for clip in corpus["audio"]]
    assert clips["labels"][1] == tiny_processor.tokenizer("three").input_ids
    expected = soundfile.read(corpus[2]["audio"]["path"], dtype="float32")[0]
    assert np.array_equal(np.asarray(clips[2]["samples"], dtype=np.float32), expected)


def test_clips_without_a_path_are_named_by_row_and_need_no_speaker(corpus, tiny_processor):
    content = [{"bytes": Path(clip["path"]).read_bytes(), "path": None} for clip in corpus["audio"]]
    corpus = corpus.remove_columns(["audio", "speaker_id"]).add_column("audio", content)
    clips = decode_clips(corpus, tiny_processor, samples_per_logit=320)
    assert clips["name"][:2] == ["row 1", "row 2"]
    assert set(clips["speaker_id"]) == {""}


def test_a_clip_that_cannot_be_read_is_named(corpus, tiny_processor, tmp_path):
    (tmp_path / "3.wav").write_text("no audio")
    with pytest.raises(AudioError, match="3.wav"):
        decode_clips(corpus, tiny_processor, samples_per_logit=320)


def test_a_silent_and_a_short_clip_among_forty_are_left_out_and_named(tmp_path, tiny_processor, caplog):
    tone = 0.1 * np.sin(np.arange(8000) / 5)
    for number in range(40):
        soundfile.write(tmp_path / f"{number}.wav", {7: 0 * tone, 9: tone[:100]}.get(number, tone), 16_000)
    rows = [{"path": str(tmp_path / f"{number}.wav"), "bytes": None} for number in range(40)]
    speakers = [str(number) for number in range(40)]
    corpus = Dataset.from_dict({"audio": rows, "text": ["go"] * 40, "speaker_id": speakers})
    clips = decode_clips(corpus, tiny_processor, samples_per_logit=320)
    assert clips["speaker_id"][:] == speakers[:7] + speakers[8:9] + speakers[10:]
    assert set(clips["num_samples"]) == {8000}
    assert "2 of 40 recordings cannot be used: " in caplog.text
    assert re.search(r"7\.wav` must hold sound.*; .*9\.wav` must be at least 25 ms.*They are left out", caplog.text)
    soundfile.write(tmp_path / "11.wav", 0 * tone, 16_000)
    with pytest.raises(AudioError, match=r"3 of 40 recordings cannot be used: .*7\.wav.*9\.wav.*11\.wav"):
        decode_clips(Dataset.from_dict(corpus.to_dict()), tiny_processor, samples_per_logit=320)


def test_characters_outside_the_vocabulary_are_named(corpus, tiny_processor):
    texts = [*TEXTS[:5], "9 lives"]
    corpus = corpus.remove_columns("text").add_column("text", texts)
    with pytest.raises(ValueError, match=r"1 of 6 values of `text` .* 30 tokens: .*5\.wav: '9' \(U\+0039\)\. Correct"):
        decode_clips(corpus, tiny_processor, samples_per_logit=320)


def count_frames(num_samples):
    return num_samples // 320 + 1


@pytest.mark.parametrize(("labels", "frames"), [([], 0), ([5], 1), ([5, 6, 5], 3), ([5, 5], 3), ([5, 5, 5, 6, 6], 8)])
def test_count_ctc_frames_adds_a_blank_between_equal_labels(labels, frames):
    assert count_ctc_frames(labels) == frames


def test_utterances_without_room_for_their_text_are_left_out_and_named(caplog):
    # 3199 samples give 9 whole frames of 320 and the one at the start: ten labels fit, eleven do not.
    table = make_table([10] * 39 + [11], 3199)
    with caplog.at_level(logging.WARNING):
        kept = drop_infeasible(table, count_frames)

    assert kept["name"][:] == table["name"][:39]
    assert "1 of 40 utterances" in caplog.text
    assert "clip39.wav (11 frames needed, 10 there). They are left out." in caplog.text


def test_speed_perturbation_must_leave_room_too(caplog):
    table = make_table([10] * 39 + [9], 3199)
    with pytest.raises(ValueError, match="39 of 40 utterances"):
        drop_infeasible(table, count_frames, max_speed=1.2)  # 9 frames
    assert len(drop_infeasible(table, count_frames)) == 40
    assert caplog.text == ""


def test_too_many_utterances_without_room_are_refused(tiny_processor):
    message = (
        r"3 of 40 utterances have .* clip0.wav \(11 frames needed, 10 there\); clip1.wav .*"
        "Check that column `text` belongs to column `audio`"
    )
    with pytest.raises(ValueError, match=message):
        drop_infeasible(make_table([11] * 3 + [1] * 37, 3199), count_frames)
    with pytest.raises(ValueError, match="clip4.wav .* and 35 more"):
        drop_infeasible(make_table([11] * 40, 3199), count_frames)
    assert find_text_unit(tiny_processor.tokenizer) == "character"
    assert find_text_unit(JamoCTCTokenizer.__new__(JamoCTCTokenizer)) == "jamo"


def test_joined_clips_are_one_speaker_s_and_each_is_used_once():
    speakers = ["a"] * 23 + ["b"] * 9
    groups = join_clips(speakers, minimum=2, maximum=4, seed=3)

    assert sorted(itertools.chain(*groups)) == list(range(32))
    assert all(len({speakers[row] for row in group}) == 1 for group in groups)
    short = [group for group in groups if not 2 <= len(group) <= 4]
    assert len(short) <= 2
    assert {len(group) for group in groups} >= {2, 3, 4}


def test_joining_depends_on_seeds_alone():
    speakers = ["a"] * 30
    first = join_clips(speakers, minimum=1, maximum=4, seed=3)
    other_order = join_clips(speakers, minimum=1, maximum=4, seed=3, order_seed=8)

    assert first == join_clips(speakers, minimum=1, maximum=4, seed=3)
    assert first != other_order
    assert [len(group) for group in first] == [len(group) for group in other_order]
    assert first != join_clips(speakers, minimum=1, maximum=4, seed=4)


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 1), (3, 2)])
def test_joining_refuses_sizes_out_of_order(minimum, maximum):
    message = f"`concatenate_min` must be at least 1 and at most `concatenate_max`, got {minimum} and {maximum}"
    with pytest.raises(ValueError, match=message):
        join_clips(["a"], minimum=minimum, maximum=maximum, seed=0)


def test_an_utterance_is_its_clips_end_to_end(clips, tiny_processor):
    dataset = UtteranceDataset(clips, tiny_processor, concatenate=(2, 3), seed=1)
    samples = [np.asarray(row, dtype=np.float32) for row in clips["samples"]]

    assert len(dataset) == len(dataset.groups) == len(dataset.references) == len(dataset.lengths)
    for index, group in enumerate(dataset.groups):
        joined = np.concatenate([samples[row] for row in group])
        expected = tiny_processor(joined, text=" ".join(clips["text"][row] for row in group))
        np.testing.assert_array_equal(dataset[index]["input_features"], expected.input_features[0])
        assert dataset[index]["labels"] == expected["labels"]
        assert dataset.references[index] == " ".join(clips["text"][row] for row in group)
        assert dataset.lengths[index] == len(joined)
        assert {dataset.speakers[index]} == {SPEAKERS[row] for row in group}
    assert dataset.seconds == pytest.approx(sum(map(len, samples)) / 16_000)


def test_epochs_are_the_same_without_augmentation(clips, tiny_processor):
    dataset = UtteranceDataset(clips, tiny_processor, concatenate=(1, 3), seed=1)
    groups = dataset.groups
    dataset.set_epoch(5)
    assert dataset.groups == groups


def test_epochs_differ_with_augmentation_and_come_again(clips, tiny_processor):
    augmentation = Augmentation(min_speed=0.9, max_speed=1.1, num_time_masks=1, num_mel_masks=1, max_mel_mask_bins=4)
    datasets = [
        UtteranceDataset(clips, tiny_processor, concatenate=(1, 3), augmentation=augmentation, seed=1)
        for _ in range(2)
    ]
    before = datasets[0].groups
    for dataset in datasets:
        dataset.set_epoch(2)

    assert datasets[0].groups == datasets[1].groups != before
    assert len(datasets[0].groups) == len(before)
    for index in range(len(before)):
        first, second = datasets[0][index], datasets[1][index]
        np.testing.assert_array_equal(first["input_features"], second["input_features"])
        assert first["labels"] == second["labels"]


def test_speed_changes_duration_and_pitch_together():
    tone = np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000).astype(np.float32)
    faster = Augmentation(min_speed=1.25, max_speed=1.25).change_speed(tone, np.random.default_rng(0))

    assert len(faster) == 12_800
    assert np.abs(np.fft.rfft(faster)).argmax() * 16_000 / len(faster) == pytest.approx(625, abs=2)
    assert Augmentation().change_speed(tone, np.random.default_rng(0)) is tone


def test_masks_are_spans_and_bands_of_the_mean():
    features = torch.ones(100, 16)
    augmentation = Augmentation(num_time_masks=1, max_time_mask_frames=30, num_mel_masks=1, max_mel_mask_bins=4)
    widths = []
    for seed in range(50):
        masked = augmentation.mask(features, np.random.default_rng(seed))
        frames = (masked.sum(1) == 0).nonzero().flatten().tolist()
        bins = (masked.sum(0) == 0).nonzero().flatten().tolist()
        for span in (frames, bins):
            assert np.diff(span).tolist() == [1] * (len(span) - 1)
        assert (masked == 0).sum() == len(frames) * 16 + len(bins) * 100 - len(frames) * len(bins)
        widths.append((len(frames), len(bins)))

    assert max(widths)[0] == 10  # at most a tenth of the utterance
    assert {width for _, width in widths} == {0, 1, 2, 3, 4}
    assert features.min() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_speed": 0.0}, "`min_speed` must be positive and at most `max_speed`, got 0.0 and 1.0"),
        ({"min_speed": 1.2, "max_speed": 1.1}, "got 1.2 and 1.1"),
        ({"num_time_masks": -1}, "`num_time_masks` must be at least 0, got -1"),
        ({"max_mel_mask_bins": -2}, "`max_mel_mask_bins` must be at least 0, got -2"),
    ],
)
def test_augmentation_refuses_what_cannot_be_drawn(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_a_dataset_of_nothing_is_refused(clips, tiny_processor):
    with pytest.raises(ValueError, match="`dataset` must have at least one usable utterance, got none"):
        UtteranceDataset(clips.select([]), tiny_processor)


def test_joining_without_speakers_is_refused(clips, tiny_processor):
    nameless = clips.remove_columns("speaker_id").add_column("speaker_id", [""] * 6)
    assert len(UtteranceDataset(nameless, tiny_processor)) == 6
    with pytest.raises(ValueError, match="`concatenate_max` above 1 .* needs a column `speaker_id`, got none"):
        UtteranceDataset(nameless, tiny_processor, concatenate=(1, 2))


def test_real_recordings_become_utterances(fsdd_folder, tiny_processor):
    names = sorted(fsdd_folder.rglob("*.wav"))[:2]
    corpus = Dataset.from_list(
        [{"audio": {"path": str(path), "bytes": None}, "text": "zero", "speaker_id": "s"} for path in names]
    )
    dataset = UtteranceDataset(
        decode_clips(corpus, tiny_processor, samples_per_logit=320), tiny_processor, concatenate=(2, 2)
    )

    assert dataset.references == ["zero zero"]
    assert dataset[0]["input_features"].shape == (dataset.lengths[0] // 160 + 1, 16)
    assert abs(dataset[0]["input_features"].mean()) < 1e-4
