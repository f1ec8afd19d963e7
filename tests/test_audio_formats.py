"""What phones and browsers record gives the sound that was recorded, through PyAV."""

import sys

import numpy as np
import pytest
from audio_files import encode, encode_with_ffmpeg, make_sound, read_both_ways

from data.audio import AudioError, read_audio

SOUND = make_sound()
# Container, codec, rate, and whether the file says which samples the coder put before the first one.
FILES = [
    ("ipod", "aac", 16_000, True),  # .m4a
    ("mp4", "aac", 44_100, True),
    ("mp4", "libopus", 48_000, True),
    ("webm", "libopus", 48_000, True),
    ("matroska", "flac", 16_000, True),
    ("mov", "pcm_s16le", 16_000, True),
    ("avi", "pcm_s16le", 16_000, True),
    ("ipod", "alac", 16_000, True),
    ("wv", "wavpack", 16_000, True),
    ("tta", "tta", 16_000, True),
    ("wav", "adpcm_g726", 8_000, True),
    ("3gp", "libopencore_amrnb", 8_000, False),
    ("amr", "libopencore_amrnb", 8_000, False),
    ("adts", "aac", 16_000, False),  # .aac
    ("flv", "aac", 44_100, False),
    ("asf", "wmav2", 16_000, False),  # .wma
    ("wav", "g722", 16_000, False),
    ("mp2", "mp2", 16_000, False),
]


def find_sound(samples: np.ndarray) -> tuple[int, float]:
    """Where in `samples` the sound begins, and how well they correlate there."""
    core = SOUND[2_000:28_000]
    delay = int(np.argmax(np.correlate(samples, core)))
    return delay - 2_000, np.corrcoef(samples[delay : delay + len(core)], core)[0, 1]


@pytest.mark.parametrize(("container", "codec", "rate", "has_start"), FILES)
def test_a_recording_in_any_format_is_the_sound_within_the_loss_of_its_codec(container, codec, rate, has_start):
    samples = read_both_ways(encode_with_ffmpeg(SOUND, container, codec, rate))

    delay, correlation = find_sound(samples)

    assert correlation > 0.95
    assert delay == 0 or (not has_start and -512 <= delay < 2_300)
    frame = 2_048 * 16_000 // rate  # the longest of any codec here
    assert len(SOUND) + min(0, delay) <= len(samples) <= len(SOUND) + delay + frame


def test_a_film_gives_its_sound():
    delay, correlation = find_sound(read_both_ways(encode_with_ffmpeg(SOUND, "mp4", "aac", 16_000, is_film=True)))
    assert (delay, correlation > 0.99) == (0, True)


@pytest.mark.parametrize(("container", "codec", "rate"), [("webm", "libopus", 48_000), ("adts", "aac", 16_000),
                                                          ("amr", "libopencore_amrnb", 8_000)])  # fmt: skip
def test_a_recording_that_was_killed_is_read_to_its_end(container, codec, rate):
    content = encode_with_ffmpeg(SOUND, container, codec, rate, is_live=True)
    whole, cut = read_audio(content), read_both_ways(content[: len(content) * 6 // 10])
    assert 0.5 < len(cut) / len(whole) < 0.7
    np.testing.assert_allclose(cut[:-2_000], whole[: len(cut) - 2_000], atol=1e-3)


def test_an_mp4_without_its_table_is_damaged():
    content = encode_with_ffmpeg(SOUND, "ipod", "aac", 16_000)
    with pytest.raises(AudioError, match=r"must be whole audio, got a damaged mov file .*`ffmpeg -i IN OUT.wav`"):
        read_audio(content[: len(content) // 2])


def test_an_mp4_whose_samples_end_early_is_truncated():
    content = encode_with_ffmpeg(SOUND, "matroska", "pcm_s16le", 16_000)
    with pytest.raises(AudioError, match=r"truncated one \(1\.\d* of 2\.00 s are there\)"):
        read_audio(content[: len(content) * 6 // 10])


def test_a_damaged_recording_is_named():
    content = encode_with_ffmpeg(SOUND, "adts", "aac", 16_000)
    middle = len(content) // 2
    with pytest.raises(AudioError, match="must be whole audio, got a damaged aac file"):
        read_audio(content[:middle] + bytes(300) + content[middle + 300 :])


def test_a_film_of_two_languages_is_refused_with_a_command(tmp_path):
    import av

    with av.open(tmp_path / "film.mkv", "w") as output:
        streams = [output.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in range(2)]
        frame = av.AudioFrame.from_ndarray(np.int16(20_000 * SOUND)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        for stream in streams:
            output.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(AudioError, match=r"must have one audio track, got 2.*`ffmpeg -i IN -map 0:a:0 OUT.wav`"):
        read_audio(tmp_path / "film.mkv")


def test_without_pyav_its_formats_name_it_and_the_others_are_read(monkeypatch):
    recording = encode_with_ffmpeg(SOUND, "ipod", "aac", 16_000)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"libsndfile .* where PyAV is not installed, got mov. .*`pip install av`"):
        read_audio(recording)
    for form in ("WAV", "FLAC", "OGG", "MP3"):
        assert len(read_audio(encode(SOUND, form))) == len(SOUND)


def test_a_playlist_opens_no_other_file(tmp_path):
    (tmp_path / "secret.wav").write_bytes(encode(SOUND, "WAV"))
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.wav\n#EXT-X-ENDLIST\n")
    with pytest.raises(AudioError, match=r"got something else.*\(text\)"):
        read_audio(tmp_path / "list.m3u8")
