"""Silence, loudness and channels: what is no sound is refused, and what was said on one channel is heard alone."""

import importlib
import logging

import numpy as np
import pytest
import soundfile
from audio_files import encode, make_sound, read_both_ways

from data.audio import AudioError, count_channels, read_audio
from data.corpora import load_corpus
from recipes.evaluate_asr import main as evaluate_asr_main

SOUND = make_sound()
NOISE = np.random.default_rng(1).standard_normal(len(SOUND))


@pytest.fixture(scope="module")
def two_people(fsdd_folder):
    """Digits of two people, as long and as loud as each other."""
    people = [
        np.concatenate([soundfile.read(fsdd_folder / name / f"{digit}_{name}_5.wav")[0] for digit in range(8)])
        for name in ("theo", "jackson")
    ]
    length = min(map(len, people))
    return [0.5 * person[:length] / np.abs(person[:length]).max() for person in people]


@pytest.mark.parametrize(
    ("samples", "subtype"),
    [
        (np.full(32_000, 0.02), "FLOAT"),
        (np.full(32_000, 0.02), "PCM_16"),
        (np.full(32_000, -0.5), "PCM_24"),
        (0.02 + 1e-6 * NOISE, "FLOAT"),
        (np.round(0.5 * NOISE) / 2**15, "PCM_16"),
        (0.02 + np.round(0.5 * NOISE) / 2**15, "PCM_16"),
        (np.round(0.5 * NOISE) / 2**15, "FLOAT"),
        (np.round(0.5 * NOISE) / 2**7, "PCM_U8"),
        (np.round(0.4 * NOISE) * 3e-4, "ULAW"),
        (2e-5 * NOISE, "FLOAT"),
        (np.concatenate([np.zeros(16_000), 2e-5 * NOISE]), "FLOAT"),
        (1e-8 * SOUND, "DOUBLE"),
    ],
)
def test_what_holds_no_sound_is_silent_whatever_its_mean_and_its_steps(samples, subtype):
    with pytest.raises(AudioError, match="must hold sound, got silence"):
        read_audio(encode(samples, "WAV", subtype))


@pytest.mark.parametrize(("form", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_hiss_behind_a_lossy_coder_is_silent(form, subtype):
    with pytest.raises(AudioError, match="must hold sound, got silence"):
        read_audio(encode(np.round(0.5 * NOISE) / 2**15, form, subtype))


@pytest.mark.parametrize("peak", [9e-5, 1e-5, 1e-6])
def test_speech_far_below_full_scale_is_heard(fsdd_folder, peak):
    paths = sorted(fsdd_folder.glob("*/*_0.wav"))[::5]
    assert len(paths) >= 10
    for path in paths:
        samples, rate = soundfile.read(path)
        quiet = read_both_ways(encode(peak * samples / np.abs(samples).max(), "WAV", "FLOAT", rate))
        assert np.abs(quiet).max() == pytest.approx(peak, rel=0.1)


def test_speech_beside_a_constant_is_heard():
    np.testing.assert_allclose(read_audio(encode(0.5 * SOUND + 0.02, "WAV", "FLOAT")), 0.5 * SOUND + 0.02, atol=1e-6)


@pytest.mark.parametrize("peak", [1.5, 3.0, 4.0])
@pytest.mark.parametrize("form", ["WAV", "AIFF", "AU"])
def test_a_recording_above_full_scale_is_scaled_and_not_clipped(peak, form):
    loud = peak * SOUND / np.abs(SOUND).max()
    np.testing.assert_allclose(read_both_ways(encode(loud, form, "FLOAT")), loud / peak, atol=1e-6)


def test_a_lossy_file_above_full_scale_is_scaled_too():
    samples = read_both_ways(encode(3 * SOUND / np.abs(SOUND).max(), "OGG", "VORBIS"))
    assert np.corrcoef(samples, SOUND)[0, 1] > 0.999
    assert np.mean(np.abs(samples) > 0.99) < 0.001  # a clipped tone stays there


def test_a_channel_upside_down_is_turned_with_a_warning(caplog):
    stereo = np.stack([SOUND, -0.5 * SOUND + 0.002 * NOISE], axis=1)
    assert np.corrcoef(stereo.mean(axis=1), SOUND)[0, 1] > 0.99  # not silent when mixed, only too quiet
    samples = read_both_ways(encode(stereo, "WAV", "FLOAT"))
    np.testing.assert_allclose(samples, 0.75 * SOUND - 0.001 * NOISE, atol=1e-6)
    assert "audio: channel 2 is another one upside down and is turned." in caplog.text


def test_a_channel_that_is_exactly_upside_down_does_not_cancel_the_other():
    content = encode(np.stack([SOUND, -SOUND], axis=1), "WAV", "FLOAT")
    np.testing.assert_array_equal(read_both_ways(content), read_audio(encode(SOUND, "WAV", "FLOAT")))


@pytest.mark.parametrize(("channel", "index"), [("left", 0), ("right", 1), (1, 0), ("2", 1)])
def test_one_channel_is_heard_alone(two_people, channel, index):
    content = encode(np.stack(two_people, axis=1), "WAV", "FLOAT", 8_000)
    alone = read_audio(encode(two_people[index], "WAV", "FLOAT", 8_000))
    np.testing.assert_array_equal(read_both_ways(content, channel=channel), alone)
    assert np.abs(read_audio(content) - alone).max() > 0.1


def test_a_channel_is_judged_without_the_others():
    content = encode(np.stack([SOUND, 0 * SOUND], axis=1), "WAV", "FLOAT")
    with pytest.raises(AudioError, match="got silence"):
        read_audio(content, channel="right")
    np.testing.assert_array_equal(read_audio(content, channel="left"), SOUND)


def test_a_channel_that_is_not_there_is_named():
    assert count_channels(encode(SOUND, "FLAC")) == 1
    with pytest.raises(AudioError, match="`audio` must have a channel right, got 1 of them. Choose another."):
        read_audio(encode(SOUND, "FLAC"), channel="right")


@pytest.mark.parametrize("channel", [0, -1, "0", "middle", "1.0", "²", ""])
def test_what_names_no_channel_is_refused(channel):
    with pytest.raises(ValueError, match="`channel` must be left, right, mix or a number from 1, got"):
        read_audio(encode(SOUND, "WAV"), channel=channel)


def test_two_people_on_two_channels_are_mixed_with_a_warning(two_people, caplog):
    first, second = two_people
    turns = np.arange(len(first)) // 8_000 % 2
    for stereo in (
        [first, second],
        [first + 0.1 * second, second + 0.1 * first],
        [first * turns, second * (1 - turns)],
    ):
        caplog.clear()
        read_audio(encode(np.stack(stereo, axis=1), "WAV", "FLOAT", 8_000))
        assert "holds other speech than the loudest of 2 channels" in caplog.text
        assert "`--channel` takes one" in caplog.text


def test_one_person_on_two_channels_is_no_reason_to_warn(two_people, caplog):
    caplog.set_level(logging.WARNING)
    speech, hiss = two_people[0], 0.003 * np.random.default_rng(0).standard_normal(len(two_people[0]))
    others = [speech, 0.4 * speech, np.roll(speech, 6), 0.3 * np.roll(speech, -40) + hiss, hiss, 0 * speech]
    for other in others:
        read_audio(encode(np.stack([speech, other], axis=1), "WAV", "FLOAT", 8_000))
    assert not caplog.records


@pytest.fixture
def calls(two_people, tmp_path):
    """A corpus of one telephone call, a person on each channel."""
    soundfile.write(tmp_path / "call.wav", np.stack(two_people, axis=1), 8_000)
    (tmp_path / "metadata.csv").write_text("file_name,text\ncall.wav,hello\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corpus_gives_one_channel_of_its_recordings(calls, streaming):
    rows = {
        channel: next(iter(load_corpus(str(calls), channel=channel, streaming=streaming)))
        for channel in ("mix", "left", "2")
    }
    for channel in rows:
        expected = read_audio(calls / "call.wav", channel=channel)
        np.testing.assert_allclose(read_audio(rows[channel]["audio"]), expected, atol=1e-6)
    assert rows["left"]["audio"]["path"].endswith("call.wav#left")
    assert np.abs(read_audio(rows["left"]["audio"]) - read_audio(rows["2"]["audio"])).max() > 0.1


def test_a_corpus_gives_a_part_of_one_channel(calls):
    (calls / "metadata.csv").write_text("file_name,text,start,end\ncall.wav,hello,0.5,1.5\n", encoding="utf-8")
    (row,) = load_corpus(str(calls), channel="right")
    np.testing.assert_array_equal(
        read_audio(row["audio"]), read_audio(calls / "call.wav", channel="right")[8_000:24_000]
    )
    assert row["audio"]["path"].endswith("call.wav#0.5-1.5:right")


def test_a_corpus_refuses_a_channel_that_no_recording_can_have(calls):
    with pytest.raises(ValueError, match="`channel` must be left, right, mix or a number from 1, got 'all'"):
        load_corpus(str(calls), channel="all")
    with pytest.raises(AudioError, match="must be audio, got an empty file"):
        read_audio(next(iter(load_corpus(str(calls), channel="3")))["audio"])


def test_recipes_hand_the_channel_to_their_corpus(calls, tiny_base, capsys):
    scores = {}
    for channel in ("left", "right"):
        output = calls / f"{channel}.json"
        flags = ["--model_name_or_path", tiny_base, "--dataset", str(calls), "--split", "train", "--channel", channel]
        evaluate_asr_main([*flags, "--output_file", str(output)])
        scores[channel] = output.read_text()
    assert capsys.readouterr().out
    assert scores["left"] != scores["right"]


@pytest.mark.parametrize("recipe", ["train_ctc", "personalize", "adapt_domain", "evaluate_asr"])
def test_recipes_have_the_flag(recipe, run_recipe_main, capsys):
    main = importlib.import_module(f"recipes.{recipe}").main
    with pytest.raises(SystemExit):
        run_recipe_main(main, "--help")
    assert "--channel CHANNEL" in capsys.readouterr().out
