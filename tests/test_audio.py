"""Recordings are read alike from every source, and bad ones are refused by name."""

import doctest
import errno
import io
import os
import pty
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import data.audio
from data.audio import SAMPLING_RATE, AudioError, audio_seconds, check_audio, read_audio, stream_audio
from data.audio_decoders import iterate_blocks


def make_tone(seconds: float, sampling_rate: int = SAMPLING_RATE, frequency: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * sampling_rate)) / sampling_rate)


def write_noise(path: Path, seconds: float, sampling_rate: int) -> Path:
    noise = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * sampling_rate))
    soundfile.write(path, noise, sampling_rate)
    return path


def join_chunks(chunks: list[np.ndarray], overlap_samples: int) -> np.ndarray:
    return np.concatenate([chunks[0], *(chunk[overlap_samples:] for chunk in chunks[1:])])


def read_stream(path: Path) -> np.ndarray:
    return np.concatenate(list(stream_audio(path, chunk_seconds=1.0, overlap_seconds=0.0)))


@pytest.fixture
def tone_path(tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, make_tone(1.0), SAMPLING_RATE)
    return path


def test_docstring_examples_hold():
    result = doctest.testmod(data.audio)
    assert (result.failed, result.attempted) == (0, 4)


@pytest.mark.parametrize(("suffix", "tolerance"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.02), ("mp3", 0.02)])
def test_read_audio_gives_the_written_samples(tmp_path, suffix, tolerance):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, make_tone(1.0), SAMPLING_RATE)
    samples = read_audio(path)
    assert samples.dtype == np.float32
    assert samples.shape == (16_000,)
    np.testing.assert_allclose(samples[1000:-1000], make_tone(1.0)[1000:-1000], atol=tolerance)


def test_read_audio_averages_channels(tmp_path):
    left, right = 0.75 * np.ones(800), 0.25 * np.ones(800)
    left[::2] = 0.25
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), SAMPLING_RATE, subtype="FLOAT")
    assert read_audio(tmp_path / "stereo.wav").tolist() == [0.25, 0.5] * 400


@pytest.mark.parametrize("source_rate", [8_000, 22_050, 44_100, 48_000])
def test_read_audio_resamples_a_tone_to_the_same_tone(tmp_path, source_rate):
    soundfile.write(tmp_path / "tone.wav", make_tone(1.0, source_rate), source_rate, subtype="FLOAT")
    samples = read_audio(tmp_path / "tone.wav")
    assert samples.shape == (16_000,)
    np.testing.assert_allclose(samples[2000:-2000], make_tone(1.0)[2000:-2000], atol=1e-4)


def test_read_audio_gives_the_wanted_rate(tone_path):
    assert read_audio(tone_path, sampling_rate=8_000).shape == (8_000,)


def test_read_audio_reads_paths_bytes_and_undecoded_columns_alike(tone_path):
    samples, content = read_audio(str(tone_path)), tone_path.read_bytes()
    sources = [
        tone_path,
        content,
        {"path": str(tone_path), "bytes": None},
        {"path": "elsewhere.wav", "bytes": content},
    ]
    for source in sources:
        np.testing.assert_array_equal(read_audio(source), samples)


def test_read_audio_reads_a_wav_written_into_a_pipe(tmp_path, tone_path):
    content = tone_path.read_bytes()
    (tmp_path / "pipe.wav").write_bytes(content[:40] + struct.pack("<I", 2**32 - 1) + content[44:])
    np.testing.assert_array_equal(read_audio(tmp_path / "pipe.wav"), read_audio(tone_path))


def test_read_audio_reads_real_speech_at_8_khz(fsdd_folder):
    path = fsdd_folder / "george" / "0_george_1.wav"
    assert soundfile.info(path).frames == 4727
    assert read_audio(path).shape == (2 * 4727,)


def test_read_audio_names_a_missing_file(tmp_path):
    with pytest.raises(AudioError, match=r"`.*none\.wav` must be a file, got none at that path"):
        read_audio(tmp_path / "none.wav")


def test_read_audio_refuses_a_folder(tmp_path):
    with pytest.raises(AudioError, match="must be a file"):
        read_audio(tmp_path)


@pytest.fixture
def forbidden_path(tone_path):
    """A file that this process may not read, though it may be root's."""
    tone_path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield tone_path
    if is_root:
        os.seteuid(0)


def test_read_audio_names_a_file_that_may_not_be_read(forbidden_path):
    with pytest.raises(AudioError, match=r"`.*tone\.wav` must be a file that can be read, got \(Permission denied\)"):
        read_audio(forbidden_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 300, r"`\.\.\.n{200}` must be a file that can be read, got \(File name too long\)"),
        ("a\0b.wav", "must be a file, got a name with a zero byte"),
        ("/dev/zero", "must be a file, got a device"),
    ],
)
def test_read_audio_refuses_names_that_no_recording_has(name, message):
    with pytest.raises(AudioError, match=message):
        read_audio(name)


def test_read_audio_refuses_a_terminal_in_place_of_standard_input(monkeypatch):
    master, terminal = pty.openpty()
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(AudioError, match="`-` must be audio on standard input, got a terminal. Pipe a recording"):
            read_audio("-")
    os.close(master)


class _Failing(io.BytesIO):
    """A file on a disk that fails behind its first 4 kB."""

    def read(self, size=-1):
        if self.tell() >= 4096:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def test_decoding_names_a_file_whose_disk_fails(tone_path):
    with pytest.raises(AudioError, match=r"`tone` must be readable to its end, got .*Input/output error"):
        list(iterate_blocks(_Failing(tone_path.read_bytes()), "tone"))


def test_read_audio_names_an_empty_file(tmp_path):
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"`.*empty\.wav` must be audio, got an empty file"):
        read_audio(tmp_path / "empty.wav")


@pytest.mark.parametrize("name", ["notes.wav", "notes.flac", "notes.mp3", "notes.raw"])
def test_read_audio_names_a_text_file_with_the_name_of_audio(tmp_path, name):
    (tmp_path / name).write_text("This is not a recording.\n" * 40)
    with pytest.raises(AudioError, match=rf"`.*{name}` must be wav, flac, ogg or mp3 audio, got something else"):
        read_audio(tmp_path / name)


def test_read_audio_refuses_a_column_with_neither_path_nor_bytes():
    with pytest.raises(AudioError, match="must have a path or bytes, got neither"):
        read_audio({"path": None, "bytes": None})


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au", "flac", "mp3"])
@pytest.mark.parametrize(
    "read", [read_audio, lambda path: list(stream_audio(path, chunk_seconds=1, overlap_seconds=0))]
)
def test_reading_names_a_truncated_file(tmp_path, suffix, read):
    path = write_noise(tmp_path / f"cut.{suffix}", 2.0, SAMPLING_RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=rf"`.*cut\.{suffix}` must be a whole file, got a truncated one"):
        read(path)


def test_read_audio_names_the_column_of_bad_bytes(tone_path):
    with pytest.raises(AudioError, match=r"`clips/a\.wav` must be a whole file"):
        read_audio({"path": "clips/a.wav", "bytes": tone_path.read_bytes()[:9000]})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "read", [read_audio, lambda path: list(stream_audio(path, chunk_seconds=1, overlap_seconds=0))]
)
def test_reading_names_a_file_with_bad_values(tmp_path, value, read):
    samples = make_tone(1.0)
    samples[500:503] = value
    soundfile.write(tmp_path / "bad.wav", samples, SAMPLING_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"`.*bad\.wav` must hold finite samples, got 3 of 16000"):
        read(tmp_path / "bad.wav")


@pytest.mark.parametrize(
    "read", [read_audio, lambda path: list(stream_audio(path, chunk_seconds=1, overlap_seconds=0))]
)
def test_reading_names_a_silent_file(tmp_path, read):
    soundfile.write(tmp_path / "mute.wav", np.zeros(40_000), SAMPLING_RATE)
    with pytest.raises(AudioError, match=r"`.*mute\.wav` must hold sound, got silence"):
        read(tmp_path / "mute.wav")


@pytest.mark.parametrize("num_samples", [0, 1, 399])
@pytest.mark.parametrize(
    "read", [read_audio, lambda path: list(stream_audio(path, chunk_seconds=1, overlap_seconds=0))]
)
def test_reading_names_a_file_shorter_than_a_window(tmp_path, num_samples, read):
    soundfile.write(tmp_path / "short.wav", 0.5 * np.ones(num_samples), SAMPLING_RATE)
    with pytest.raises(AudioError, match=rf"`.*short\.wav` must be at least 25 ms long, got {num_samples} samples"):
        read(tmp_path / "short.wav")


def test_read_audio_reads_a_file_as_long_as_a_window(tmp_path):
    soundfile.write(tmp_path / "short.wav", make_tone(0.025, 8_000), 8_000)
    assert read_audio(tmp_path / "short.wav").shape == (400,)


def test_check_audio_refuses_integers_saved_as_floats():
    with pytest.raises(AudioError, match=r"`row 3` must have samples in \[-1, 1\], got a peak of 16384"):
        check_audio(2.0**15 * make_tone(1.0, frequency=4_000.0), "row 3")


def test_check_audio_accepts_a_quiet_tone():
    check_audio(0.001 * make_tone(1.0), "row 3")


@pytest.mark.parametrize("source_rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize(("chunk_seconds", "overlap_seconds"), [(2.0, 0.5), (7.0, 0.0), (3.0, 2.9), (60.0, 1.0)])
def test_stream_audio_equals_read_audio(tmp_path, source_rate, chunk_seconds, overlap_seconds):
    path = write_noise(tmp_path / "noise.wav", 12.3, source_rate)
    chunks = list(stream_audio(path, chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds))
    whole, overlap_samples = read_audio(path), round(overlap_seconds * SAMPLING_RATE)
    joined = join_chunks(chunks, overlap_samples)
    assert joined.dtype == np.float32
    assert joined.shape == whole.shape
    np.testing.assert_array_equal(joined, whole)
    assert {chunk.size for chunk in chunks[:-1]} <= {round(chunk_seconds * SAMPLING_RATE)}
    for before, after in zip(chunks, chunks[1:], strict=False):
        np.testing.assert_array_equal(before[before.size - overlap_samples :], after[:overlap_samples])


def test_stream_audio_cuts_where_a_hand_would(tmp_path):
    path = write_noise(tmp_path / "noise.wav", 10.0, SAMPLING_RATE)
    chunks = list(stream_audio(path, chunk_seconds=4.0, overlap_seconds=1.0))
    assert [chunk.size / SAMPLING_RATE for chunk in chunks] == [4.0, 4.0, 4.0]  # 0-4, 3-7, 6-10: nothing is left over


def test_stream_audio_yields_silence_between_speech(tmp_path):
    samples = np.concatenate([make_tone(1.0), np.zeros(32_000), make_tone(1.0)])
    soundfile.write(tmp_path / "pause.wav", samples, SAMPLING_RATE)
    chunks = list(stream_audio(tmp_path / "pause.wav", chunk_seconds=1.0, overlap_seconds=0.0))
    assert [float(np.abs(chunk).max()) > 0.4 for chunk in chunks] == [True, False, False, True]


def test_stream_audio_holds_a_chunk_and_not_the_file(tmp_path):
    path = write_noise(tmp_path / "long.wav", 900.0, 8_000)
    whole_bytes = 900 * SAMPLING_RATE * 4
    tracemalloc.start()
    num_samples = sum(c.size for c in stream_audio(path, chunk_seconds=20.0, overlap_seconds=0.0))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_samples == 900 * SAMPLING_RATE
    assert peak_bytes < whole_bytes / 5


def test_stream_audio_finds_a_bad_file_before_the_first_chunk(tmp_path):
    with pytest.raises(AudioError, match="must be a file"):
        stream_audio(tmp_path / "none.wav", chunk_seconds=1.0, overlap_seconds=0.0)


@pytest.mark.parametrize(("chunk_seconds", "overlap_seconds"), [(1.0, 1.0), (1.0, 2.0), (1.0, -0.1), (0.0, 0.0)])
def test_stream_audio_refuses_an_overlap_of_a_whole_chunk(tone_path, chunk_seconds, overlap_seconds):
    with pytest.raises(ValueError, match=f"`overlap_seconds` must be at least 0 and .*got {overlap_seconds}"):
        stream_audio(tone_path, chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds)


def test_stream_audio_refuses_chunks_without_a_sample(tone_path):
    with pytest.raises(ValueError, match="`chunk_seconds` must exceed the overlap by a sample, got 1e-06"):
        stream_audio(tone_path, chunk_seconds=1e-6, overlap_seconds=0.0)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_audio_seconds_is_the_duration(tmp_path, suffix):
    path = write_noise(tmp_path / f"noise.{suffix}", 1.25, 8_000)
    assert audio_seconds(path) == 1.25
    assert audio_seconds({"path": None, "bytes": path.read_bytes()}) == 1.25


def test_audio_seconds_names_a_missing_file(tmp_path):
    with pytest.raises(AudioError, match=r"none\.wav` must be a file"):
        audio_seconds(tmp_path / "none.wav")
