"""Lengths that headers state are not trusted: what is there is read, or refused with a way out."""

import io
import struct

import numpy as np
import pytest
import soundfile
import soxr
from audio_files import encode, make_sound, read_both_ways

from data.audio import AudioError, read_audio
from data.audio_layout import find_parts
from data.mpeg_frames import find_mpeg_streams

SOUND = make_sound()
LIST_CHUNK = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf58.29.100\0"
ID3_WITH_PICTURE = b"ID3\x03\0\0" + bytes([0, 64, 0, 0]) + b"\xff\xfb\x90\x64" * (64 * 2**14 // 4)  # 1 MiB


def is_sound(samples: np.ndarray, *, times: int = 1) -> bool:
    """Whether `samples` are the sound, so many times, but for what a codec loses."""
    return samples.shape == (times * len(SOUND),) and np.corrcoef(samples, np.tile(SOUND, times))[0, 1] > 0.999


def patch(content: bytes, place: int, value: bytes) -> bytes:
    return content[:place] + value + content[place + len(value) :]


def wav() -> tuple[bytes, int]:
    content = encode(SOUND, "WAV", "PCM_16")
    return content, content.index(b"data")


def strip_index(mp3: bytes) -> bytes:
    """An mp3 without its first frame, which holds the index."""
    return mp3[mp3.index(b"\xff\xf3", 4) :]


@pytest.mark.parametrize("size", [0, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("riff_size", [None, 0, 2**32 - 1])
def test_a_wav_that_states_no_size_is_read_to_its_end(size, riff_size):
    content, data = wav()
    content = patch(content, data + 4, struct.pack("<I", size))
    content = content if riff_size is None else patch(content, 4, struct.pack("<I", riff_size))
    np.testing.assert_array_equal(read_both_ways(content), read_audio(wav()[0]))


@pytest.mark.parametrize(("stated", "num_bytes"), [(1_000, 2**32 + 1_000), (0, 2**32 + 1_000), (0, 3 * 2**30)])
def test_a_wav_of_gigabytes_whose_size_ran_over_is_whole(tmp_path, stated, num_bytes):
    content, data = wav()
    with (tmp_path / "long.wav").open("w+b") as file:  # sparse: nothing of it is read here
        file.write(patch(content[: data + 8], data + 4, struct.pack("<I", stated)))
        file.write(b"\1" * 3_000)
        file.truncate(data + 8 + num_bytes)
        (part,) = find_parts(file, "long.wav")
        assert soundfile.info(part.window).frames == num_bytes // 2


def test_an_empty_wav_with_a_tag_behind_its_samples_stays_empty():
    content, data = wav()
    with pytest.raises(AudioError, match="at least 25 ms long, got 0 samples"):
        read_audio(content[: data + 4] + bytes(4))


@pytest.mark.parametrize(
    ("before", "between", "behind"),
    [
        (b"", b"", LIST_CHUNK),
        (b"", b"", b"LIST" + struct.pack("<I", 3000) + b"INFO" + b"x" * 2996),
        (b"", LIST_CHUNK, b""),
        (b"", b"junk" + struct.pack("<I", 25) + bytes(26), b""),
        (b"", b"junk" + struct.pack("<I", 25) + b"x" * 25, b""),  # some programs forget to fill up
        (b"", b"", bytes(5000)),
        (b"", b"", b"TAG" + b"x" * 125),
        (b"", b"", ID3_WITH_PICTURE),
        (ID3_WITH_PICTURE, b"", b""),
    ],
)
def test_a_wav_with_other_chunks_gives_its_samples_alone(before, between, behind):
    content, data = wav()
    changed = before + content[:data] + between + content[data:] + behind
    np.testing.assert_array_equal(read_both_ways(changed), read_audio(content))


def test_a_wav_with_its_format_behind_the_samples_is_read():
    content, data = wav()
    np.testing.assert_array_equal(
        read_both_ways(content[:12] + content[data:] + content[12:data]), read_audio(content)
    )


@pytest.mark.parametrize(
    ("form", "before", "size"),
    [
        ("WAV", b"data", struct.pack("<I", 32_000)),
        ("AU", b".snd\0\0\0\x18", struct.pack(">I", 32_000)),
        ("CAF", b"data", struct.pack(">Q", 32_004)),
    ],
)
def test_samples_beyond_the_stated_size_are_an_error_that_names_a_command(form, before, size):
    content = encode(SOUND, form, "PCM_16")
    message = r"must end with its samples, got .* 3200[04] bytes of them and 32000 bytes more.*`sox --ignore-length"
    with pytest.raises(AudioError, match=message):
        read_audio(patch(content, content.index(before) + len(before), size))


@pytest.mark.parametrize(
    ("form", "before", "size"),
    [
        ("AIFF", b"SSND", struct.pack(">I", 8)),
        ("AIFF", b"SSND", bytes(4)),
        ("AU", b".snd\0\0\0\x18", bytes(4)),
        ("AU", b".snd\0\0\0\x18", b"\xff" * 4),
        ("CAF", b"data", bytes(8)),
        ("CAF", b"data", b"\xff" * 8),
        ("RF64", b"ds64" + struct.pack("<I", 28), bytes(24)),
        ("W64", b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a"), bytes(8)),
        ("W64", b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a"), struct.pack("<Q", 24)),
    ],
)
def test_other_formats_of_killed_recorders_are_read_to_their_end(form, before, size):
    content = encode(SOUND, form, "PCM_16")
    changed = patch(content, content.index(before) + len(before), size)
    assert changed != content
    np.testing.assert_array_equal(read_both_ways(changed), read_audio(content))


@pytest.mark.parametrize("form", ["WAV", "AIFF", "AU", "CAF", "RF64", "W64", "FLAC", "MP3"])
def test_a_file_that_ends_before_its_header_says_is_truncated(form):
    content = encode(SOUND, form)
    with pytest.raises(AudioError, match=r"`audio` must be a whole file, got a truncated one"):
        read_audio(content[: len(content) * 6 // 10])


def test_a_flac_of_unknown_length_is_read_to_its_end():
    content = encode(SOUND, "FLAC")
    unknown = patch(content, 21, bytes([content[21] & 0xF0, 0, 0, 0, 0]))
    assert unknown != content
    np.testing.assert_array_equal(read_both_ways(unknown), read_audio(content))


def test_a_flac_that_states_half_of_its_samples_is_read_to_its_end():
    content = encode(SOUND, "FLAC")
    half = patch(content, 22, struct.pack(">I", len(SOUND) // 2))
    np.testing.assert_array_equal(read_both_ways(half), read_audio(content))


def test_a_flac_that_lacks_whole_frames_is_truncated():
    content = encode(SOUND, "FLAC")
    with pytest.raises(AudioError, match=r"truncated one \(32000 of 40000 samples are there\)"):
        read_audio(patch(content, 22, struct.pack(">I", 40_000)))


@pytest.mark.parametrize("rubbish", [bytes(3000), b"TAG" + b" " * 125])
def test_rubbish_behind_a_flac_takes_nothing_of_it_along(rubbish):
    content = encode(SOUND, "FLAC")
    np.testing.assert_array_equal(read_both_ways(content + rubbish), read_audio(content))


@pytest.mark.parametrize(
    ("first", "second"),
    [(form, form) for form in ("WAV", "AU", "FLAC", "OGG", "MP3")] + [("WAV", "FLAC"), ("WAV", "OGG"), ("AU", "WAV")],
)
def test_two_files_one_behind_the_other_are_both_read(first, second):
    assert is_sound(read_both_ways(encode(SOUND, first) + encode(SOUND, second)), times=2)


def test_files_of_two_rates_and_numbers_of_channels_in_one_are_both_read():
    stereo = np.stack([SOUND, 0.5 * SOUND], axis=1)
    samples = read_both_ways(encode(SOUND, "WAV") + encode(stereo, "FLAC", rate=8_000))
    assert samples.shape == (32_000 + 64_000,)
    np.testing.assert_array_equal(samples[:32_000], read_audio(encode(SOUND, "WAV")))
    np.testing.assert_array_equal(samples[32_000:], read_audio(encode(stereo, "FLAC", rate=8_000)))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_of_a_recorder_that_was_killed_gives_its_whole_pages(subtype):
    content = encode(np.tile(SOUND, 5), "OGG", subtype)
    samples = read_both_ways(content[: len(content) // 2])
    assert 0.3 < len(samples) / (5 * len(SOUND)) < 0.5
    whole = read_audio(content)
    np.testing.assert_allclose(samples[:-1000], whole[: len(samples) - 1000], atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_an_index_is_read_whole(rate, mode):
    # Loud noise after silence: who guesses the length from the first frames of a variable rate is far off.
    quiet, loud = 1e-3 * np.sin(np.arange(2 * rate)), 0.3 * np.random.default_rng(0).standard_normal(rate)
    content = encode(np.concatenate([quiet, loud]), "MP3", rate=rate, bitrate_mode=mode, compression_level=0.5)
    first = find_mpeg_streams(io.BytesIO(content), 0, len(content))[0].first
    whole, rest = read_audio(content), read_both_ways(content[first.end :])
    frame = (1152 if rate > 24_000 else 576) * 16_000 / rate
    assert len(whole) == 48_000
    assert 48_000 <= len(rest) < 48_000 + 4 * frame  # with the coder's delay, which only the index tells
    delay = int(np.argmax(np.correlate(rest, whole[-8_000:]))) - (48_000 - 8_000)
    np.testing.assert_allclose(rest[delay + 1000 : delay + 47_000], whole[1000:47_000], atol=0.04)


def test_an_mp3_behind_an_mp3_is_read_with_and_without_its_index():
    content = encode(SOUND, "MP3")
    samples = read_both_ways(content + strip_index(content))
    assert is_sound(samples[:32_000])
    assert 64_000 <= len(samples) < 64_000 + 4 * 576


@pytest.mark.parametrize("before", [ID3_WITH_PICTURE, b"x" * 5000], ids=["ID3", "rubbish"])
def test_what_stands_around_an_mp3_is_passed_over(before):
    content = encode(SOUND, "MP3")
    np.testing.assert_array_equal(read_both_ways(before + content + b"TAG" + b" " * 125), read_audio(content))


def test_an_mp3_is_known_by_its_content_whatever_its_name(tmp_path):
    content = encode(SOUND, "MP3")
    (tmp_path / "sound.wav").write_bytes(content)
    np.testing.assert_array_equal(read_audio(tmp_path / "sound.wav"), read_audio(content))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM",
                                     "GSM610", "G721_32", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32"])  # fmt: skip
def test_every_kind_of_wav_is_read_from_a_path_and_from_bytes(tmp_path, subtype):
    content = encode(SOUND, "WAV", subtype)
    (tmp_path / "sound.wav").write_bytes(content)
    samples = read_both_ways(content)
    np.testing.assert_array_equal(read_audio(tmp_path / "sound.wav"), samples)
    assert len(SOUND) <= len(samples) < len(SOUND) + 1024  # some codecs fill up their last block
    assert np.corrcoef(samples[: len(SOUND)], SOUND)[0, 1] > 0.99


@pytest.mark.parametrize("form", ["WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "VOC", "IRCAM", "PVF", "MAT5"])
def test_every_container_gives_the_same_samples(form):
    np.testing.assert_array_equal(read_both_ways(encode(SOUND, form, "PCM_16")), read_audio(wav()[0]))


@pytest.mark.parametrize("rate", [1, 3_999, 768_001, 2_000_000_000])
def test_an_impossible_sampling_rate_is_refused_before_anything_is_resampled(rate):
    content, _ = wav()
    with pytest.raises(AudioError, match=f"must have a sampling rate of 4000 to 768000 Hz, got {rate}"):
        read_audio(patch(content, 24, struct.pack("<I", rate)))


@pytest.mark.parametrize("rate", [96_000, 192_000])
def test_high_rates_are_resampled_to_the_same_sound(rate):
    content = encode(soxr.resample(SOUND, 16_000, rate), "WAV", "PCM_24", rate)
    assert is_sound(read_both_ways(content))


@pytest.mark.parametrize("seed", range(40))
def test_headerless_pcm_is_called_that(seed):
    generator = np.random.default_rng(seed)
    for content in (generator.bytes(32_000), generator.integers(-3000, 3000, 16_000).astype("<i2").tobytes()):
        with pytest.raises(AudioError, match="got none: it is headerless PCM or no audio.*`sox -t raw -r 16000"):
            read_audio(content)


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"PK\3\4" + bytes(99), "a zip archive"), (b"%PDF-1.7 ...", "a PDF"), ("été\n".encode() * 99, "text")],
)
def test_what_is_no_audio_is_called_what_it_is(content, found):
    with pytest.raises(AudioError, match=rf"must be wav, flac, ogg or mp3 audio, got something else.*\({found}\)"):
        read_audio(content)


def test_a_wav_of_a_thousand_channels_is_read_in_small_blocks():
    content = encode(np.tile(SOUND[:4_000, None], (1, 1000)), "WAV", "PCM_16")
    np.testing.assert_allclose(read_audio(content), SOUND[:4_000], atol=1e-4)


def test_a_file_of_twenty_thousand_chunks_is_refused_in_no_time():
    content, data = wav()
    with pytest.raises(AudioError, match="must be whole audio, got a damaged wav"):
        read_audio(content[:data] + (b"junk" + bytes(4)) * 20_000)


def test_reading_leaves_the_file_as_soundfile_reads_it(tmp_path):
    soundfile.write(tmp_path / "sound.wav", SOUND, 16_000)
    expected, _ = soundfile.read(tmp_path / "sound.wav", dtype="float32")
    np.testing.assert_array_equal(read_audio(tmp_path / "sound.wav"), expected)
