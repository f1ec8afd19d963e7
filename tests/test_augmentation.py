"""What training hears: seeded, as long as promised, and each room and device with the effect of its name."""

import os
import random

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from torch.utils.data import DataLoader

from data import rooms
from data.audio import SAMPLING_RATE
from data.augmentation import Augmentation, RecipeAugmentation, split_clip
from data.utterances import UtteranceDataset, decode_clips

ALL = Augmentation(min_speed=0.9, max_speed=1.1, pause_share=1.0, room_share=1.0, device_share=1.0)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def tone() -> np.ndarray:
    """A second of 1000 Hz at a tenth of full scale."""
    return (0.1 * np.sin(2 * np.pi * 1000 * np.arange(SAMPLING_RATE) / SAMPLING_RATE)).astype(np.float32)


@pytest.fixture
def clips(tmp_path, tiny_processor) -> Dataset:
    """Four clips of noise of one speaker, three of one word and one of two."""
    rows = []
    for index, text in enumerate(("one", "two", "three", "four five")):
        path = tmp_path / f"{index}.wav"
        soundfile.write(path, 0.1 * np.random.default_rng(index).standard_normal(8000), SAMPLING_RATE)
        rows.append({"audio": {"path": str(path), "bytes": None}, "text": text, "speaker_id": "ann"})
    return decode_clips(Dataset.from_list(rows), tiny_processor, samples_per_logit=320)


def rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def band_share(samples: np.ndarray, lowest: float, highest: float) -> float:
    """The share of the power between two frequencies in Hz."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLING_RATE)
    return float(power[(frequencies >= lowest) & (frequencies <= highest)].sum() / power.sum())


def test_pauses_stand_at_every_place_and_are_no_longer_than_asked(generator):
    augmentation = Augmentation(pause_share=1.0, max_pause_seconds=0.5)
    pauses = np.array([augmentation.draw_pauses(4, generator) for _ in range(500)])

    assert pauses.max() <= 8000
    assert pauses[pauses > 0].min() >= 320
    assert (pauses > 0).mean(axis=0) == pytest.approx([0.7, 0.4, 0.4, 0.7], abs=0.07)
    # As many below the geometric mean of .02 and .5 s as above it.
    assert (pauses[pauses > 0] < 1600).mean() == pytest.approx(0.5, abs=0.07)


def test_share_of_utterances_with_pauses(generator):
    drawn = [any(Augmentation(pause_share=0.25).draw_pauses(3, generator)) for _ in range(1000)]
    assert np.mean(drawn) == pytest.approx(0.25 * (1 - 0.3 * 0.3 * 0.6), abs=0.04)
    assert not any(any(Augmentation().draw_pauses(3, generator)) for _ in range(100))


def test_pauses_stand_between_the_clips_and_leave_them_as_they_are(generator):
    clips = [np.full(100, 0.5, np.float32), np.full(50, -0.5, np.float32)]
    samples = Augmentation(pause_share=1.0).hear(clips, [30, 20, 10], generator)

    assert len(samples) == 210
    np.testing.assert_array_equal(samples[30:130], clips[0])
    np.testing.assert_array_equal(samples[150:200], clips[1])
    assert np.abs(np.concatenate([samples[:30], samples[130:150], samples[200:]])).max() < 0.5


def test_a_single_clip_of_words_is_parted_where_it_is_quietest(generator):
    clip = np.concatenate([np.full(3000, 0.5), np.full(600, 0.01), np.full(2400, 0.5)]).astype(np.float32)
    first, second = split_clip(clip)
    assert 3000 <= len(first) <= 3600
    np.testing.assert_array_equal(np.concatenate([first, second]), clip)

    samples = Augmentation(pause_share=1.0).hear([clip], [0, 500, 0], generator)
    np.testing.assert_array_equal(samples[: len(first)], first)
    np.testing.assert_array_equal(samples[len(first) + 500 :], second)
    np.testing.assert_array_equal(Augmentation(pause_share=1.0).hear([clip], [0, 0, 0], generator), clip)


def test_pauses_are_zeros_or_quiet_noise(generator):
    pauses = [rooms.fill_pause(4000, 0.1, generator) for _ in range(300)]
    levels = 20 * np.log10([rms(pause) / 0.1 for pause in pauses if pause.any()])

    assert np.mean([not pause.any() for pause in pauses]) == pytest.approx(0.4, abs=0.08)
    assert -70.5 < levels.min() < -60
    assert -25 < levels.max() < -17.5


def test_what_is_heard_follows_from_the_generator_alone(tone):
    heard = [ALL.hear([tone, tone], [100, 0, 3000], np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(heard[0], heard[1])
    assert heard[0].shape != heard[2].shape or not np.array_equal(heard[0], heard[2])


def test_global_generators_are_left_as_they_were(tone):
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.random()
    random.seed(3)
    np.random.seed(3)
    rooms.add_noise(tone, np.random.default_rng(0))
    rooms.pass_telephone(tone, np.random.default_rng(0))
    assert (random.random(), np.random.random()) == expected
    with pytest.raises(RuntimeError, match="inside"), rooms.seeded(np.random.default_rng(0)):
        raise RuntimeError("inside")
    random.seed(3)
    assert random.random() == expected[0]


def test_noise_is_5_to_40_db_below_the_clip_and_of_many_colours(tone):
    noises = [rooms.add_noise(tone, np.random.default_rng(seed)) - tone for seed in range(60)]
    below = [20 * np.log10(rms(tone) / rms(noise)) for noise in noises]
    low = [band_share(noise, 0, 1000) for noise in noises]

    assert 5 <= min(below) < 10
    assert 35 < max(below) <= 40
    assert min(low) < 0.2  # white noise has an eighth of its power there
    assert max(low) > 0.9


def test_a_room_keeps_the_direct_sound_and_adds_a_tail(generator):
    click = np.zeros(SAMPLING_RATE, np.float32)
    click[1000] = 1.0
    for _ in range(20):
        heard = rooms.reverberate(click, generator)
        assert len(heard) == SAMPLING_RATE
        assert heard[1000] == pytest.approx(1.0, abs=1e-3)
        assert rms(heard[:1000]) < 1e-4
        tail = 10 * np.log10(np.sum(heard[1001:] ** 2))
        assert -15.5 < tail < 8.5
        assert rms(heard[1200:3000]) > 2 * rms(heard[-3000:])


def test_levels_are_from_35_db_down_to_12_up_and_clipped_at_full_scale(tone, generator):
    gains = [20 * np.log10(rms(rooms.change_level(tone, generator)) / rms(tone)) for _ in range(300)]
    assert -35 <= min(gains) < -30
    assert 9 < max(gains) <= 12
    assert np.abs(rooms.change_level(50 * tone, np.random.default_rng(1))).max() <= 1.0


def test_clipping_cuts_the_peaks_and_nothing_else(tone, generator):
    clipped = rooms.clip(tone, generator)
    most = np.abs(clipped).max()
    assert most < 0.1
    np.testing.assert_array_equal(clipped, np.clip(tone, -most, most))


def test_a_telephone_keeps_its_band(generator):
    noise = generator.standard_normal(SAMPLING_RATE).astype(np.float32) * 0.1
    heard = rooms.pass_telephone(noise, generator)
    assert len(heard) == SAMPLING_RATE
    assert band_share(heard, 300, 3400) > 0.9
    assert band_share(heard, 4000, 8000) < 0.005
    assert band_share(noise, 300, 3400) == pytest.approx(3100 / 8000, abs=0.03)


def test_mu_law_has_256_levels_whose_steps_grow_with_the_sample():
    samples = np.linspace(-1, 1, 100_001).astype(np.float32)
    heard = rooms.pass_mu_law(samples)
    assert len(np.unique(heard)) <= 257  # and full scale itself
    error = np.abs(heard - samples)
    assert error[np.abs(samples) < 0.01].max() < 0.0005
    assert 0.01 < error[np.abs(samples) > 0.9].max() < 0.045
    assert np.abs(rooms.pass_mu_law(np.zeros(3, np.float32))).max() < 1e-4


def test_an_mp3_is_as_long_as_the_clip_and_in_time(tone):
    speech = np.zeros(3 * SAMPLING_RATE, np.float32)
    speech[SAMPLING_RATE : 2 * SAMPLING_RATE] = tone * np.hanning(len(tone))
    for level, likeness in ((0.6, 0.99), (0.95, 0.85)):  # 64 and 16 kbit/s
        heard = rooms.pass_mp3(speech, level)
        assert len(heard) == len(speech)
        assert np.dot(heard, speech) / (rms(heard) * rms(speech) * len(speech)) > likeness


def test_a_gate_zeroes_the_quietest_samples_and_no_others(generator):
    samples = (generator.standard_normal(16_000) * np.linspace(0.001, 0.1, 16_000)).astype(np.float32)
    for seed in range(20):
        heard = rooms.gate(samples, np.random.default_rng(seed))
        is_zero = heard == 0
        np.testing.assert_array_equal(heard[~is_zero], samples[~is_zero])
        assert 0.015 < is_zero.mean() < 0.41
        assert rms(samples[is_zero]) < rms(samples[~is_zero])
    silence = np.zeros(200, np.float32)
    np.testing.assert_array_equal(rooms.gate(silence, generator), silence)


def test_a_device_leaves_the_length_and_finite_samples(tone):
    tone *= np.linspace(0.01, 1, SAMPLING_RATE, dtype=np.float32)
    heard = [rooms.pass_device(tone, np.random.default_rng(seed)) for seed in range(40)]
    assert {(len(samples), samples.dtype.name) for samples in heard} == {(SAMPLING_RATE, "float32")}
    assert all(np.isfinite(samples).all() for samples in heard)
    assert not any(np.array_equal(samples, tone) for samples in heard)


def test_recorded_noise_and_rooms_come_from_their_folders(tone, tmp_path):
    for name in ("noise", "impulses"):
        (tmp_path / name).mkdir()
    hum = np.sin(2 * np.pi * 3000 * np.arange(2 * SAMPLING_RATE) / SAMPLING_RATE)
    soundfile.write(tmp_path / "noise" / "hum.wav", 0.1 * hum, SAMPLING_RATE)
    echo = np.zeros(5000)
    echo[[0, 4000]] = (0.5, 0.25)
    soundfile.write(tmp_path / "impulses" / "echo.wav", echo, SAMPLING_RATE)
    folders = {"noise_dir": str(tmp_path / "noise"), "impulse_dir": str(tmp_path / "impulses")}
    click = np.zeros(SAMPLING_RATE, np.float32)
    click[1000] = 0.5

    noise = rooms.add_noise(tone, np.random.default_rng(0), folders["noise_dir"]) - tone
    assert band_share(noise, 2990, 3010) > 0.99
    heard = rooms.reverberate(click, np.random.default_rng(0), folders["impulse_dir"])
    assert heard[5000] / heard[1000] == pytest.approx(0.5, rel=1e-3)
    np.testing.assert_array_equal(
        Augmentation(room_share=1.0, **folders).hear([tone], [], np.random.default_rng(4)),
        Augmentation(room_share=1.0, **folders).hear([tone], [], np.random.default_rng(4)),
    )


@pytest.mark.parametrize("name", ["noise_dir", "impulse_dir"])
def test_a_folder_without_recordings_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be a folder with audio files, got .*{tmp_path.name}"):
        Augmentation(room_share=0.5, **{name: str(tmp_path)})
    with pytest.raises(ValueError, match=f"`{name}` needs `room_share` above 0, got 0"):
        Augmentation(**{name: str(tmp_path)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pause_share": 1.5}, "`pause_share` must be from 0 to 1, got 1.5"),
        ({"room_share": -0.1}, "`room_share` must be from 0 to 1, got -0.1"),
        ({"device_share": float("nan")}, "`device_share` must be from 0 to 1, got nan"),
        ({"max_pause_seconds": 0.0}, "`max_pause_seconds` must be at least 0.02, got 0.0"),
    ],
)
def test_shares_and_pauses_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_utterances_are_as_long_as_their_lengths_say(clips, tiny_processor):
    augmentation = Augmentation(pause_share=1.0, room_share=1.0, device_share=1.0)
    dataset = UtteranceDataset(clips, tiny_processor, augmentation=augmentation, concatenate=(1, 2), seed=1)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        frames = [len(row["input_features"]) for row in dataset]
        assert frames == [num_samples // 160 + 1 for num_samples in dataset.lengths]
    assert max(dataset.lengths) > 16_000


def test_only_a_clip_of_several_words_is_parted(clips, tiny_processor):
    dataset = UtteranceDataset(clips, tiny_processor, augmentation=Augmentation(pause_share=1.0))
    assert [len(pauses) for pauses in dataset.pauses] == [2, 2, 2, 3]


def test_pauses_differ_from_epoch_to_epoch_and_come_again(clips, tiny_processor):
    first, second = (UtteranceDataset(clips, tiny_processor, augmentation=ALL, seed=5) for _ in range(2))
    before, pauses = [row["input_features"] for row in first], first.pauses
    first.set_epoch(1)
    second.set_epoch(1)
    assert first.pauses == second.pauses != pauses
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left["input_features"], right["input_features"])
    first.set_epoch(0)
    for left, right in zip(first, before, strict=True):
        np.testing.assert_array_equal(left["input_features"], right)


def test_recipes_have_rooms_by_default_and_can_do_without():
    assert RecipeAugmentation().changes
    assert not RecipeAugmentation(pause_share=0.0, room_share=0.0, device_share=0.0).changes
    assert not Augmentation().changes
    for name in ("pause_share", "room_share", "device_share"):
        assert getattr(RecipeAugmentation(), name) > 0
        assert Augmentation(**{name: 0.1}).changes


def test_a_pause_is_drawn_for_each_end_and_gap_and_inside_a_clip_of_several_words_alone(clips, tiny_processor):
    settings = {"augmentation": Augmentation(pause_share=1.0)}
    alone = UtteranceDataset(clips, tiny_processor, **settings)
    assert [len(pauses) for pauses in alone.pauses] == [2, 2, 2, 3]
    joined = [UtteranceDataset(clips, tiny_processor, concatenate=(2, 2), seed=seed, **settings) for seed in range(6)]
    assert {3} <= {group[0] for utterances in joined for group in utterances.groups}  # the clip of two words
    assert {len(pauses) for utterances in joined for pauses in utterances.pauses} == {3}


@pytest.mark.parametrize(
    ("augmentation", "concatenate", "is_random"),
    [(None, (1, 1), False), (None, (1, 2), False), (Augmentation(), (1, 1), False), (Augmentation(), (1, 2), True),
     (Augmentation(pause_share=0.1), (1, 1), True)],
)  # fmt: skip
def test_utterances_are_random_where_epochs_differ(clips, tiny_processor, augmentation, concatenate, is_random):
    utterances = UtteranceDataset(clips, tiny_processor, augmentation=augmentation, concatenate=concatenate)
    assert utterances.is_random == is_random
    epochs = []
    for epoch in range(8):
        utterances.set_epoch(epoch)
        epochs.append((utterances.groups, utterances.lengths))
    assert (epochs.count(epochs[0]) < len(epochs)) == is_random


def test_processes_that_load_the_data_hear_what_one_process_hears(clips, tiny_processor):
    utterances = UtteranceDataset(clips, tiny_processor, augmentation=ALL, seed=1)
    utterances.set_epoch(1)
    alone, loaded = (
        list(DataLoader(utterances, batch_size=1, num_workers=number, collate_fn=lambda rows: (os.getpid(), *rows)))
        for number in (0, 2)
    )
    assert {pid for pid, _ in alone} == {os.getpid()}
    assert len({os.getpid(), *(pid for pid, _ in loaded)}) == 3
    for (_, first), (_, second) in zip(alone, loaded, strict=True):
        np.testing.assert_array_equal(first["input_features"], second["input_features"])
        assert first["labels"] == second["labels"]
    plain = UtteranceDataset(clips, tiny_processor)
    assert all(
        len(row["input_features"]) != len(plain[index]["input_features"]) for index, (_, row) in enumerate(alone)
    )
