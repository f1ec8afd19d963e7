"""Audio files as arrays: every clip is read, checked and resampled here, whole or in chunks."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from typing import BinaryIO

import numpy as np
import soxr

from .audio_decoders import count_seconds, iterate_blocks
from .audio_files import AudioError, AudioSource, name_source, open_source
from .audio_levels import MAX_PEAK, MIN_SECONDS, LevelMeter

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000  # Hz, of every array in this project
MIX = "mix"
CHANNEL_NUMBERS = {"left": 1, "right": 2}

Block = tuple[int, np.ndarray]  # sampling rate, samples `(samples, channels)`


def read_audio(source: AudioSource, *, sampling_rate: int = SAMPLING_RATE, channel: str | int = MIX) -> np.ndarray:
    """
    Reads a whole recording as one channel.

    Args:
        source: A path, "-" for standard input, the bytes of a file, or the `{"path", "bytes"}` dict of an undecoded
            `datasets.Audio` column. Formats of libsndfile (wav, flac, ogg, mp3 and others) and, with PyAV installed,
            m4a, webm, mp4, aac, amr, 3gp and wma. Files that stand one behind the other in one file are read all.
        sampling_rate: Wanted rate in Hz; a file with another rate is resampled with soxr's HQ filter.
        channel: "mix" averages the channels, one that is upside down turned; "left", "right" or a number from 1 takes
            one.

    Returns:
        float32 array (samples,) in [-1, 1]. A recording that is louder is scaled as a whole; overshoots of the
        resampler are clipped.

    Raises:
        AudioError: The file is missing, empty, not audio, truncated or damaged, has no such channel, or fails
            `check_audio`. Truncated is what ends before its header says; an ogg and an mp3 without index say nothing.

    Example:
        >>> import io, soundfile
        >>> file = io.BytesIO()
        >>> soundfile.write(file, 0.5 * np.sin(np.arange(800)), 8_000, format="wav")
        >>> read_audio(file.getvalue()).shape
        (1600,)
    """
    name = name_source(source)
    with open_source(source) as file:
        blocks = list(_read_channel(file, channel, name))
    return np.concatenate(list(_resample(blocks, _plan_mix(blocks, name), sampling_rate)))


def stream_audio(
    source: AudioSource,
    *,
    chunk_seconds: float,
    overlap_seconds: float,
    sampling_rate: int = SAMPLING_RATE,
    channel: str | int = MIX,
) -> Iterator[np.ndarray]:
    """
    Yields a recording of any duration in overlapping chunks, in memory bounded by a chunk.

        samples   0 ............................................ end
        chunk 0   [---------------|~~~]
        chunk 1                   [~~~-----------|~~~]             ~~~ = overlap_seconds, in both chunks
        chunk 2                                  [~~~----------]   the last may be shorter

    The chunks without the overlaps, one after the other, are `read_audio(source)`. A chunk may be silent. The file
    is decoded twice, so that it is known to be good, and how loud it is, before the first chunk.

    Args:
        source: As in `read_audio`.
        chunk_seconds: Duration of every chunk but the last.
        overlap_seconds: Duration that a chunk shares with the one before it; at least 0 and less than `chunk_seconds`.
        sampling_rate: Rate of the chunks in Hz.
        channel: As in `read_audio`.

    Returns:
        Iterator over float32 arrays (samples,) in [-1, 1].

    Raises:
        ValueError: `chunk_seconds` or `overlap_seconds` is out of range.
        AudioError: As in `read_audio`, before the first chunk.
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
    name, file = name_source(source), open_source(source)
    try:  # here and not in the generator, so that a bad file is found before the first chunk
        mixes = _plan_mix(_read_channel(file, channel, name), name)
    except BaseException:
        file.close()
        raise
    blocks = _read_channel(file, channel, name)
    return _cut_chunks(file, _resample(blocks, mixes, sampling_rate), chunk_samples, overlap_samples)


def audio_seconds(source: AudioSource) -> float:
    """
    Returns a recording's duration in seconds: what is decoded, whatever its header states.

    Plain samples are counted without being read.

    Args:
        source: As in `read_audio`.

    Raises:
        AudioError: The file is missing, empty, not audio, truncated or damaged.
    """
    with open_source(source) as file:
        return count_seconds(file, name_source(source))


def count_channels(source: AudioSource) -> int:
    """
    Returns the number of a recording's channels.

    Raises:
        AudioError: As [`read_audio`] of its beginning.
    """
    name = name_source(source)
    with open_source(source) as file, closing(iterate_blocks(file, name)) as blocks:
        return next((block.shape[1] for _, block in blocks), 1)


def check_audio(samples: np.ndarray, name: str, *, sampling_rate: int = SAMPLING_RATE) -> None:
    """
    Checks that an array can be recognised.

    Args:
        samples: float array (samples,).
        name: What the error calls it: the path, or column and row.
        sampling_rate: Rate of `samples` in Hz.

    Raises:
        AudioError: It is shorter than 25 ms, holds NaN or infinity, peaks above 4, or is silent: constant, the last
            bits of a converter, or a hiss below -80 dB of full scale from which nothing rises.
    """
    meter = LevelMeter(1, sampling_rate)
    meter.add(np.asarray(samples)[:, None])
    _check_levels([meter], name)


def parse_channel(channel: str | int) -> str | int:
    """
    Returns "mix", or the number, from 1, of the channel that `channel` names.

    Raises:
        ValueError: It is none of "left", "right", "mix" and a number from 1.
    """
    number = CHANNEL_NUMBERS.get(channel, channel)
    if number != MIX and (not str(number).isascii() or not str(number).isdigit() or int(number) < 1):
        raise ValueError(f"`channel` must be left, right, mix or a number from 1, got {channel!r}. Choose one.")
    return MIX if number == MIX else int(number)


def _read_channel(file: BinaryIO, channel: str | int, name: str) -> Iterator[Block]:
    """Yields the blocks of a file with all channels or with one."""
    number = parse_channel(channel)
    for rate, block in iterate_blocks(file, name):
        if number == MIX:
            yield rate, block
        elif number <= block.shape[1]:
            yield rate, block[:, number - 1 : number]
        else:
            raise AudioError(f"`{name}` must have a channel {channel}, got {block.shape[1]} of them. Choose another.")


def _group_blocks(blocks: Iterable[Block]) -> Iterator[tuple[int, int, Iterator[np.ndarray]]]:
    """Yields sampling rate, number of channels and blocks of each stretch in which these do not change."""
    for (rate, num_channels), group in groupby(blocks, key=lambda block: (block[0], block[1].shape[1])):
        yield rate, num_channels, (block for _, block in group)


def _plan_mix(blocks: Iterable[Block], name: str) -> list[np.ndarray]:
    """Checks a recording; returns what its channels `(channels,)` are multiplied by in each stretch."""
    meters = []
    for rate, num_channels, group in _group_blocks(blocks):
        meters.append(LevelMeter(num_channels, rate))
        for block in group:
            meters[-1].add(block)
    scale = 1.0 / max(1.0, _check_levels(meters, name))
    for meter in meters:
        _warn_of_channels(meter, name)
    return [(scale * meter.signs / meter.num_channels).astype(np.float32) for meter in meters]


def _check_levels(meters: list[LevelMeter], name: str) -> float:
    """Raises as [`check_audio`]; returns the peak."""
    if sum(meter.num_samples / meter.sampling_rate for meter in meters) < MIN_SECONDS:
        length = " and ".join(f"{meter.num_samples} samples at {meter.sampling_rate} Hz" for meter in meters)
        raise AudioError(
            f"`{name}` must be at least {1000 * MIN_SECONDS:.0f} ms long, got {length or '0 samples'}. "
            "Remove it from the corpus or record it again."
        )
    if num_bad := sum(meter.num_bad for meter in meters):
        num_values = sum(meter.num_samples * meter.num_channels for meter in meters)
        raise AudioError(
            f"`{name}` must hold finite samples, got {num_bad} of {num_values} that are NaN or infinite. "
            "Export it again or remove it from the corpus."
        )
    peak = max(meter.peak for meter in meters)
    if peak > MAX_PEAK:
        raise AudioError(
            f"`{name}` must have samples in [-1, 1], got a peak of {peak:g}, more than the {MAX_PEAK:g} of a loud "
            "recording that was never clipped. Divide by the full scale."
        )
    if all(meter.is_silent for meter in meters):
        raise AudioError(
            f"`{name}` must hold sound, got silence (peak {peak:.1e}, nothing rises from its floor). "
            "Check the microphone or remove it from the corpus."
        )
    return peak


def _warn_of_channels(meter: LevelMeter, name: str) -> None:
    if (inverted := np.flatnonzero(meter.signs < 0) + 1).size:
        logger.warning("%s: channel %s is another one upside down and is turned.", name, _list_numbers(inverted))
    if (different := meter.find_different()).size:
        logger.warning(
            "%s: channel %s holds other speech than the loudest of %d channels, and they are mixed. `--channel` takes "
            "one: left, right, a number or, to transcribe each, all.",
            name,
            _list_numbers(different),
            meter.num_channels,
        )


def _list_numbers(numbers: np.ndarray) -> str:
    return " and ".join(map(str, numbers.tolist()))


def _resample(blocks: Iterable[Block], mixes: list[np.ndarray], sampling_rate: int) -> Iterator[np.ndarray]:
    """Yields consecutive blocks (samples,) of one channel at `sampling_rate`."""
    for (rate, _, group), mix in zip(_group_blocks(blocks), mixes, strict=True):
        mixed = (np.einsum("sc,c->s", block, mix) for block in group)
        if rate != sampling_rate:
            mixed = _resample_stretch(mixed, rate, sampling_rate)
        for block in mixed:
            yield np.clip(block, -1.0, 1.0)


def _resample_stretch(blocks: Iterable[np.ndarray], rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.empty(0, dtype=np.float32), last=True)


def _cut_chunks(
    file: BinaryIO, blocks: Iterable[np.ndarray], chunk_samples: int, overlap_samples: int
) -> Iterator[np.ndarray]:
    pending = np.empty(0, dtype=np.float32)  # begins where the next chunk begins
    num_old = 0  # leading samples of `pending` that an earlier chunk holds already
    with file:
        for block in blocks:
            pending = np.concatenate([pending, block])
            while pending.size > chunk_samples:  # not >=: what remains must be more than an overlap
                yield pending[:chunk_samples]
                pending, num_old = pending[chunk_samples - overlap_samples :], overlap_samples
        if pending.size > num_old:
            yield pending
