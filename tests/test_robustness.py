"""The conditions of the robustness benchmark are what their names say, and its path runs on two tiny people."""

import json
import shutil

import numpy as np
import pytest
from datasets import Dataset

from benchmarks import recording_conditions, robustness
from benchmarks.recording_conditions import ROOM_NOISE_RMS, list_conditions
from recipes.personalize import main as personalize_main

CONDITIONS = list_conditions()
RATE = 16_000


@pytest.fixture
def clips() -> list[np.ndarray]:
    """Two clips of noise, .5 and .25 s, that fade in."""
    noise = np.random.default_rng(0).standard_normal(8000) * np.linspace(0.001, 0.2, 8000)
    return [noise.astype(np.float32), noise[:4000].astype(np.float32)]


def hear(name: str, clips: list[np.ndarray]) -> np.ndarray:
    return CONDITIONS[name](clips, np.random.default_rng(0))


def rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def test_every_condition_of_the_issue_is_in_the_table():
    assert next(iter(CONDITIONS)) == "as recorded"
    pauses = [name for name in CONDITIONS if " s of " in name]
    assert len(pauses) == 2 * 4 * 4
    assert [name for name in CONDITIONS if name not in pauses] == [
        "as recorded", "-30 dB", "-20 dB", "-10 dB", "+10 dB", "10 dB over full scale, clipped", "noise, 20 dB",
        "noise, 10 dB", "noise, 5 dB", "small room", "large room", "telephone band", "mu-law", "MP3, 32 kbit/s",
        "gated",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "first", "second"), [("start", 4800, 12_800), ("both ends", 4800, 12_800), ("end", 0, 8000)]
)
@pytest.mark.parametrize("kind", ["zeros", "room noise"])
def test_pauses_stand_where_they_should(clips, kind, place, first, second):
    heard = hear(f"0.3 s of {kind}, {place}", clips)
    np.testing.assert_array_equal(heard[first : first + 8000], clips[0])
    np.testing.assert_array_equal(heard[second : second + 4000], clips[1])
    assert len(heard) == 12_000 + (1 + (place == "both ends")) * 4800
    pause = heard[-4800:] if place == "end" else heard[:4800]
    assert rms(pause) == pytest.approx({"zeros": 0.0, "room noise": ROOM_NOISE_RMS}[kind], rel=1e-3)


def test_a_pause_in_the_middle_is_between_clips_and_not_in_a_word(clips):
    heard = hear("1 s of zeros, middle", clips)
    np.testing.assert_array_equal(heard, np.concatenate([clips[0], np.zeros(RATE), clips[1]]))
    np.testing.assert_array_equal(hear("1 s of zeros, middle", clips[:1]), clips[0])


@pytest.mark.parametrize("gain_db", [-30, -20, -10, 10])
def test_levels_are_exact_to_a_step_of_16_bits(clips, gain_db):
    expected = np.concatenate(clips) * 10 ** (gain_db / 20)
    np.testing.assert_allclose(hear(f"{gain_db:+d} dB", clips), np.clip(expected, -1, 1), atol=1.01 / 2**15)


def test_what_is_louder_than_full_scale_is_clipped(clips):
    heard = hear("10 dB over full scale, clipped", clips)
    assert (heard.min(), heard.max()) == (-1.0, (2**15 - 1) / 2**15)
    assert 0.01 < (np.abs(heard) > 0.999).mean() < 0.5


@pytest.mark.parametrize("snr_db", [20, 10, 5])
def test_noise_has_its_ratio_to_the_speech(clips, snr_db):
    samples = np.concatenate(clips)
    noise = hear(f"noise, {snr_db} dB", clips) - samples
    assert 20 * np.log10(rms(samples) / rms(noise)) == pytest.approx(snr_db, abs=0.01)


@pytest.mark.parametrize(("name", "seconds"), [("small room", 0.21), ("large room", 0.84)])
def test_rooms_answer_as_long_as_their_size_and_walls_let_them(name, seconds):
    click = np.zeros(100, np.float32)
    click[0] = 1.0
    response = hear(name, [click])
    left_db = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1] / np.sum(response**2))
    assert 3 * (np.argmax(left_db < -25) - np.argmax(left_db < -5)) / RATE == pytest.approx(seconds, rel=0.1)
    assert response[0] == pytest.approx(1.0, abs=1e-3)


def test_a_telephone_cuts_below_300_and_above_3400_hz():
    times = np.arange(RATE) / RATE
    for frequency, lowest, highest in ((100, 0.0, 0.02), (1000, 0.98, 1.02), (6000, 0.0, 0.02)):
        tone = np.sin(2 * np.pi * frequency * times).astype(np.float32)
        assert lowest <= rms(hear("telephone band", [tone])[4000:]) / rms(tone[4000:]) <= highest


def test_codecs_keep_the_clip_within_their_loss(clips):
    samples = np.concatenate(clips)
    assert 25 < 20 * np.log10(rms(samples) / rms(hear("mu-law", clips) - samples)) < 45
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    heard = hear("MP3, 32 kbit/s", [0.5 * tone])
    assert rms(heard[2000:14_000]) == pytest.approx(0.5 * rms(tone), rel=0.1)


def test_a_gate_zeroes_the_tenth_that_is_quietest(clips):
    samples = np.concatenate(clips)
    heard = hear("gated", clips)
    is_zero = heard == 0
    assert is_zero.mean() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(heard[~is_zero], samples[~is_zero])
    assert rms(samples[is_zero]) < 0.2 * rms(samples)


def test_conditions_are_drawn_by_seed(clips):
    for name in ("0.1 s of room noise, start", "noise, 5 dB", "small room"):
        np.testing.assert_array_equal(hear(name, clips), hear(name, clips))
        assert not np.array_equal(hear(name, clips), CONDITIONS[name](clips, np.random.default_rng(1)))


def test_the_table_has_a_line_a_condition_and_the_mean_of_the_speakers():
    rows = [
        {"listener": "base", "condition": condition, "wer": wer}
        for condition, wer in (("as recorded", 0.1), ("gated", 0.2), ("as recorded", 0.3), ("gated", 0.5))
    ]
    header, _, first, second = robustness.summarize(rows).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["condition", "WER, base"]
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["as recorded", "20.0%"]
    assert [cell.strip() for cell in second.strip("|").split("|")] == ["gated", "35.0% (+15.0)"]


def test_the_embedded_corpus_is_heard_by_the_demo_s_base_and_adapters(tmp_path):
    listeners = robustness.list_listeners("synthetic", tmp_path)
    assert [(listener.name, len(listener.speakers)) for listener in listeners] == [
        ("base, ordinary voices", 12), *[("adapters, unusual voices", 1)] * 4,
    ]  # fmt: skip
    assert [listener.adapter for listener in listeners[1:]] == [
        tmp_path / name for name in ("whisperer", "croaker", "child", "spaniard")
    ]
    assert {listener.base for listener in listeners} == {tmp_path / "base"}


@pytest.fixture
def trained(tmp_path, small_base, small_corpus, run_recipe_main):
    """What `benchmarks.personalization` would have left, of tiny bases."""
    for speaker in ("ann", "ben"):
        shutil.copytree(small_base, tmp_path / f"base_without_{speaker}")
    run_recipe_main(
        personalize_main, "--model_name_or_path", small_base, "--dataset", small_corpus, "--speaker_id", "ann",
        "--max_steps", 1, "--output_dir", tmp_path / "ann_60s",
    )  # fmt: skip
    shutil.copytree(tmp_path / "ann_60s", tmp_path / "ben_60s")
    return tmp_path


def test_the_benchmark_runs_on_two_tiny_people(trained, small_corpus, tmp_path, monkeypatch, capsys):
    few = ("as recorded", "0.1 s of zeros, start", "noise, 5 dB", "small room", "MP3, 32 kbit/s")
    monkeypatch.setattr(robustness, "list_conditions", lambda: {name: CONDITIONS[name] for name in few})
    results = tmp_path / "results"
    results.mkdir()
    robustness.main(["--dataset", str(small_corpus), "--output_dir", str(trained)], results_folder=results)

    stored = json.loads((results / "robustness_fsdd.json").read_text())["rows"]
    assert [(row["listener"], row["speakers"], row["condition"]) for row in stored] == [
        (listener, [speaker], name)
        for speaker in ("ann", "ben")
        for listener in ("base", "adapter, 60 s")
        for name in few
    ]
    assert {row["words"] for row in stored} == {3}  # one, two, three
    table = (results / "robustness_fsdd.md").read_text()
    assert table.startswith(capsys.readouterr().out.strip().splitlines()[-2 - len(few)])
    assert [line.split("|")[1].strip() for line in table.splitlines()[2 : 2 + len(few)]] == list(few)


def test_utterances_of_several_words_have_a_middle(tiny_processor):
    samples = np.concatenate([np.full(4000, 0.5), np.full(800, 0.001), np.full(4000, 0.5)]).astype(np.float32)
    rows = [{"samples": samples, "num_samples": 8800, "text": text, "speaker_id": "a"} for text in ("one two", "one")]
    utterances = robustness.RecordedUtterances(Dataset.from_list(rows), tiny_processor)
    utterances.condition = CONDITIONS["0.1 s of zeros, middle"]
    both = utterances.hear(0, np.random.default_rng(0))

    assert len(both) == 8800 + 1600
    np.testing.assert_array_equal(both[:4000], samples[:4000])
    np.testing.assert_array_equal(both[-4000:], samples[-4000:])
    np.testing.assert_array_equal(utterances.hear(1, np.random.default_rng(0)), samples)


def test_the_image_method_has_the_direct_sound_first():
    click = np.ones(1, np.float32)
    response = recording_conditions.reverberate(click, np.random.default_rng(0), size=(5.0, 4.0, 3.0), absorption=0.99)
    assert response[0] == pytest.approx(1.0, abs=1e-4)
    # Walls that take 99 % of the energy leave a tenth of the pressure, of sounds from further away.
    assert 0.01 < np.abs(response[1:]).max() < 0.1
