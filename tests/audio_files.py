"""Recordings as bytes, for tests of how they are read: a sound in any format of libsndfile or of ffmpeg."""

import io
from fractions import Fraction

import av
import numpy as np
import soundfile
import soxr

from data.audio import SAMPLING_RATE, audio_seconds, read_audio, stream_audio


def make_sound(seconds: float = 2.0) -> np.ndarray:
    """A rising tone that comes and goes, over a little noise: no two moments of it are alike."""
    times = np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * times) * times) * (np.sin(8 * times) > -0.3)
    return (tone + 0.001 * np.random.default_rng(0).standard_normal(len(times))).astype(np.float32)


def encode(samples: np.ndarray, form: str, subtype: str | None = None, rate: int = SAMPLING_RATE, **options) -> bytes:
    """A file of libsndfile's."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype, **options)
    return file.getvalue()


class _Pipe:
    """Takes bytes and cannot go back to write a length at the start."""

    def __init__(self):
        self._written = io.BytesIO()
        self.write, self.getvalue = self._written.write, self._written.getvalue


def encode_with_ffmpeg(
    samples: np.ndarray, container: str, codec: str, rate: int, *, is_film: bool = False, is_live: bool = False
) -> bytes:
    """A file of ffmpeg's, a live one without length; `samples` `(samples,)` are at 16 kHz and are resampled."""
    file, layout = _Pipe() if is_live else io.BytesIO(), "mono"
    samples = np.float32(soxr.resample(samples, SAMPLING_RATE, rate))[None]
    with av.open(file, "w", format=container) as output:
        if is_film:
            video = output.add_stream("mpeg4", rate=10)
            video.width = video.height = 64
        stream = output.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 12_200 if "amr" in codec else 48_000
        stream.codec_context.open()
        if is_film:
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            for packet in (*video.encode(picture), *video.encode(None)):
                output.mux(packet)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        resampler, fifo = av.AudioResampler(stream.codec_context.format, layout, rate), av.AudioFifo()
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            fifo.write(converted)
        position, size = 0, stream.codec_context.frame_size or 1024
        while (piece := fifo.read(size) or fifo.read(0, partial=True)) is not None:
            piece.pts, piece.time_base = position, Fraction(1, rate)
            position += piece.samples
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return file.getvalue()


def read_both_ways(content: bytes, **options) -> np.ndarray:
    """What `read_audio` gives, once `stream_audio` and `audio_seconds` agree with it."""
    samples = read_audio(content, **options)
    chunks = list(stream_audio(content, chunk_seconds=0.7, overlap_seconds=0.0, **options))
    np.testing.assert_array_equal(np.concatenate(chunks), samples)
    assert abs(audio_seconds(content) * SAMPLING_RATE - len(samples)) <= 1
    return samples
