"""Audio files as arrays: every clip is read, checked and resampled here, whole or in chunks."""

import os
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000  # Hz, of every array in this project
MIN_SECONDS = 0.025  # one analysis window; a shorter clip has no frame
SILENCE_PEAK = 1e-4  # -80 dB of full scale, three steps of a 16-bit recording
MAX_PEAK = 4.0  # lossy decoders overshoot 1 by a few percent; integers saved as floats reach 32768
HEADER_TOLERANCE_FRAMES = 2 * 1152  # an mp3 header may count the encoder's padding, up to two mp3 frames
UNKNOWN_DATA_BYTES = 2**31 - 2**16  # a wav written into a pipe states a size near 2**31 or 2**32
STATED_BYTES = re.compile(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)  # libsndfile's log
STREAM_BLOCK_SECONDS = 10

AudioSource = str | os.PathLike | bytes | Mapping


class AudioError(ValueError):
    """A recording that cannot be used; the message names the file, what is wrong with it, and the remedy."""


def read_audio(source: AudioSource, *, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """
    Reads a whole recording as one channel.

    Args:
        source: A path, the bytes of a file, or the `{"path", "bytes"}` dict of an undecoded `datasets.Audio` column.
            Formats of libsndfile: wav, flac, ogg, mp3 and others; channels are averaged.
        sampling_rate: Wanted rate in Hz; a file with another rate is resampled with soxr's HQ filter.

    Returns:
        float32 array (samples,) in [-1, 1]; overshoots of a lossy decoder or of the resampler are clipped.

    Raises:
        AudioError: The file is missing, empty, not audio or truncated, or fails `check_audio`. Truncated is a wav,
            aiff, au, flac or mp3 that ends before its header says; an ogg carries no such promise.

    Example:
        >>> file = BytesIO()
        >>> soundfile.write(file, 0.5 * np.sin(np.arange(800)), 8_000, format="wav")
        >>> read_audio(file.getvalue()).shape
        (1600,)
    """
    with _open_audio(source) as sound:
        name = _name_source(source)
        _check_header(sound, name)
        try:
            samples = sound.read(dtype="float32", always_2d=True).mean(axis=1)  # (samples,)
        except soundfile.LibsndfileError as error:
            raise _truncated_error(name, str(error)) from error
        _check_decoded_frames(sound, samples.size, name)
        check_audio(samples, name, sampling_rate=sound.samplerate)
        if sound.samplerate != sampling_rate:
            samples = soxr.resample(samples, sound.samplerate, sampling_rate, quality="HQ")
    return np.clip(samples, -1.0, 1.0)


def stream_audio(
    source: AudioSource, *, chunk_seconds: float, overlap_seconds: float, sampling_rate: int = SAMPLING_RATE
) -> Iterator[np.ndarray]:
    """
    Yields a recording of any duration in overlapping chunks, in memory bounded by a chunk.

        samples   0 ............................................ end
        chunk 0   [---------------|~~~]
        chunk 1                   [~~~-----------|~~~]             ~~~ = overlap_seconds, in both chunks
        chunk 2                                  [~~~----------]   the last may be shorter

    The chunks without the overlaps, one after the other, are `read_audio(source)` within 1e-4. A chunk may be silent.

    Args:
        source: As in `read_audio`.
        chunk_seconds: Duration of every chunk but the last.
        overlap_seconds: Duration that a chunk shares with the one before it; at least 0 and less than `chunk_seconds`.
        sampling_rate: Rate of the chunks in Hz.

    Returns:
        Iterator over float32 arrays (samples,) in [-1, 1].

    Raises:
        ValueError: `chunk_seconds` or `overlap_seconds` is out of range.
        AudioError: As in `read_audio`; what a header cannot tell (truncated, NaN, wholly silent) while iterating.
    """
    if not 0 <= overlap_seconds < chunk_seconds:
        raise ValueError(
            f"`overlap_seconds` must be at least 0 and less than `chunk_seconds` ({chunk_seconds}), "
            f"got {overlap_seconds}. Shorten the overlap or lengthen the chunks."
        )
    chunk_samples = round(chunk_seconds * sampling_rate)
    overlap_samples = round(overlap_seconds * sampling_rate)
    if chunk_samples <= overlap_samples:
        raise ValueError(f"`chunk_seconds` must exceed the overlap by a sample, got {chunk_seconds}. Lengthen it.")
    sound = _open_audio(source)  # here and not in the generator, so that a bad file is found before the first chunk
    return _cut_chunks(sound, _name_source(source), sampling_rate, chunk_samples, overlap_samples)


def audio_seconds(source: AudioSource) -> float:
    """
    Returns a recording's duration in seconds from its header, without decoding it.

    Args:
        source: As in `read_audio`.

    Raises:
        AudioError: The file is missing, empty or not audio.
    """
    with _open_audio(source) as sound:
        return sound.frames / sound.samplerate


def check_audio(samples: np.ndarray, name: str, *, sampling_rate: int = SAMPLING_RATE) -> None:
    """
    Checks that an array can be recognised.

    Args:
        samples: float array (samples,).
        name: What the error calls it: the path, or column and row.
        sampling_rate: Rate of `samples` in Hz.

    Raises:
        AudioError: It is shorter than 25 ms, holds NaN or infinity, is silent (peak below 1e-4), or peaks above 4.
    """
    if samples.size < MIN_SECONDS * sampling_rate:
        raise AudioError(
            f"`{name}` must be at least {1000 * MIN_SECONDS:.0f} ms long, got {samples.size} samples at "
            f"{sampling_rate} Hz. Remove it from the corpus or record it again."
        )
    peak = _check_values(samples, name)
    _check_loudness(peak, name)


def _open_audio(source: AudioSource) -> soundfile.SoundFile:
    name = _name_source(source)
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise AudioError(f"`{name}` must have a path or bytes, got neither. Give one of them.")
    if isinstance(source, bytes):
        file, file_bytes = BytesIO(source), len(source)
    else:
        file = os.fspath(source)
        if not Path(file).is_file():
            raise AudioError(f"`{name}` must be a file, got none at that path. Correct the path.")
        file_bytes = Path(file).stat().st_size
    if file_bytes == 0:
        raise AudioError(f"`{name}` must be audio, got an empty file. Copy or record it again.")
    try:
        return soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless .raw needs a rate that nobody gave
        raise AudioError(
            f"`{name}` must be wav, flac, ogg or mp3 audio, got something else or a damaged file ({error}). "
            "Convert it to wav or flac."
        ) from error


def _name_source(source: AudioSource) -> str:
    if isinstance(source, Mapping):
        return str(source.get("path") or "audio")
    return "audio" if isinstance(source, bytes) else os.fspath(source)


def _check_header(sound: soundfile.SoundFile, name: str) -> None:
    """Raises if libsndfile found fewer bytes of samples than the header states: it reads such a file in silence."""
    for stated, found in STATED_BYTES.findall(sound.extra_info):
        if int(found) < int(stated) < UNKNOWN_DATA_BYTES:
            raise _truncated_error(name, f"{found} of {stated} bytes of samples are there")


def _check_decoded_frames(sound: soundfile.SoundFile, num_decoded: int, name: str) -> None:
    if num_decoded + HEADER_TOLERANCE_FRAMES < sound.frames:
        raise _truncated_error(name, f"{num_decoded} of {sound.frames} samples are there")


def _truncated_error(name: str, detail: str) -> AudioError:
    return AudioError(f"`{name}` must be a whole file, got a truncated one ({detail}). Copy or record it again.")


def _check_values(samples: np.ndarray, name: str) -> float:
    peak = float(np.abs(samples).max(initial=0.0))
    if not np.isfinite(peak):
        num_bad = int((~np.isfinite(samples)).sum())
        raise AudioError(
            f"`{name}` must hold finite samples, got {num_bad} of {samples.size} that are NaN or infinite. "
            "Export it again or remove it from the corpus."
        )
    if peak > MAX_PEAK:
        raise AudioError(f"`{name}` must have samples in [-1, 1], got a peak of {peak:g}. Divide by the full scale.")
    return peak


def _check_loudness(peak: float, name: str) -> None:
    if peak < SILENCE_PEAK:
        raise AudioError(
            f"`{name}` must hold sound, got silence (peak {peak:.1e}, at least {SILENCE_PEAK:.0e} is needed). "
            "Check the microphone or remove it from the corpus."
        )


def _cut_chunks(
    sound: soundfile.SoundFile, name: str, sampling_rate: int, chunk_samples: int, overlap_samples: int
) -> Iterator[np.ndarray]:
    pending = np.empty(0, dtype=np.float32)  # begins where the next chunk begins
    num_old = 0  # leading samples of `pending` that an earlier chunk holds already
    for block in _resampled_blocks(sound, name, sampling_rate):
        pending = np.concatenate([pending, block])
        while pending.size > chunk_samples:  # not >=: what remains must be more than an overlap
            yield pending[:chunk_samples]
            pending, num_old = pending[chunk_samples - overlap_samples :], overlap_samples
    if pending.size > num_old:
        yield pending


def _resampled_blocks(sound: soundfile.SoundFile, name: str, sampling_rate: int) -> Iterator[np.ndarray]:
    """Yields consecutive blocks (samples,) of one channel at `sampling_rate`, with the checks of `read_audio`."""
    num_decoded, peak = 0, 0.0
    resampler = soxr.ResampleStream(sound.samplerate, sampling_rate, 1, dtype="float32", quality="HQ")
    with sound:
        _check_header(sound, name)
        num_frames = sound.samplerate * STREAM_BLOCK_SECONDS
        is_last = False
        while not is_last:
            try:
                block = sound.read(num_frames, dtype="float32", always_2d=True).mean(axis=1)
            except soundfile.LibsndfileError as error:
                raise _truncated_error(name, str(error)) from error
            is_last = block.size < num_frames
            num_decoded += block.size
            peak = max(peak, _check_values(block, name))
            if is_last and num_decoded < MIN_SECONDS * sound.samplerate:
                check_audio(block, name, sampling_rate=sound.samplerate)
            if sound.samplerate != sampling_rate:
                block = resampler.resample_chunk(block, last=is_last)
            yield np.clip(block, -1.0, 1.0)
        _check_decoded_frames(sound, num_decoded, name)
    _check_loudness(peak, name)
