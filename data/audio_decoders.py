"""Decoding: libsndfile for what it knows, PyAV's ffmpeg for what phones, browsers and telephone systems record."""

import contextlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile

from .audio_files import AudioError, Window
from .audio_layout import Part, find_parts, truncated_error

MIN_SAMPLING_RATE = 4_000  # Hz; half of it is less than speech needs
MAX_SAMPLING_RATE = 768_000  # Hz, the highest of any audio converter
BLOCK_SECONDS = 10
MAX_BLOCK_VALUES = 2**22  # of all channels of a block: 16 MiB
HEADER_TOLERANCE_FRAMES = 2 * 1152  # an mp3 header may count the encoder's padding, up to two mp3 frames
LENGTH_TOLERANCE_SECONDS = 0.25  # by which films and phones' files state a longer duration than they have
UNKNOWN_FRAMES = 2**63 - 1  # what libsndfile says of a length that it does not know
TEXT_BYTES = 512  # at the start of a file, of which nine in ten are letters in a text
AUDIO_STARTS = (b"RIFF", b"FORM", b"fLaC", b"OggS", b"caff", b".snd", b"riff", b"ID3", b"NIST", b"Creative", b"MAT")
KNOWN_CONTENT = {  # how files begin that are no audio
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\x7fELF": "a program",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a parquet file",
    b"MThd": "MIDI notes",
    b"7z\xbc\xaf": "an archive",
    b"Rar!": "an archive",
    b"SQLi": "a database",
}


class _SequentialFile(soundfile.SoundFile):
    """Is read from its start to its end. soundfile seeks after every read, which G.721, GSM and many mp3s cannot."""

    def seekable(self) -> bool:
        return False


def iterate_blocks(file: BinaryIO, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """
    Decodes a file, or several that stand one behind the other in it, until nothing comes.

    Args:
        file: As from [`open_source`]; it can be decoded again.
        name: What errors call it.

    Yields:
        Sampling rate in Hz, and samples `(samples, channels)` in float32 of about 10 s.

    Raises:
        AudioError: It is no audio, truncated, damaged, has an impossible sampling rate, or needs PyAV, which is not
            installed.
    """
    try:
        for part in find_parts(file, name):
            yield from _decode_part(part, name)
            if part.window.error:
                raise part.window.error
    except OSError as error:
        raise AudioError(f"`{name}` must be readable to its end, got ({error}). Copy it from where it is.") from error


def count_seconds(file: BinaryIO, name: str) -> float:
    """Returns the duration in seconds: from the header of plain samples, else from what comes out of the decoder."""
    seconds = 0.0
    for part in find_parts(file, name):
        sound = _open_sound(part, name)
        if sound is not None and sound.subtype.startswith(("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")):
            if part.has_length:
                seconds += sound.frames / check_sampling_rate(sound.samplerate, name)
                continue
        seconds += sum(len(block) / rate for rate, block in _decode_part(part, name))
    return seconds


def check_sampling_rate(sampling_rate: int, name: str) -> int:
    """
    Returns a sampling rate that audio can have.

    Raises:
        AudioError: It lies outside 4 kHz to 768 kHz.
    """
    if not MIN_SAMPLING_RATE <= sampling_rate <= MAX_SAMPLING_RATE:
        raise AudioError(
            f"`{name}` must have a sampling rate of {MIN_SAMPLING_RATE} to {MAX_SAMPLING_RATE} Hz, got "
            f"{sampling_rate}. Correct its header: `sox -r RATE IN.wav OUT.wav`."
        )
    return sampling_rate


def _decode_part(part: Part, name: str) -> Iterator[tuple[int, np.ndarray]]:
    sound = _open_sound(part, name)
    return _decode_ffmpeg(part, name) if sound is None else _decode_sound(sound, part, name)


def _open_sound(part: Part, name: str) -> soundfile.SoundFile | None:
    """Returns the part as libsndfile opens it, None where it does not and ffmpeg may."""
    part.window.seek(0)
    try:
        return _SequentialFile(part.window)
    except soundfile.LibsndfileError as error:
        if part.ffmpeg_format:
            return None
        raise _unknown_error(part.window, name, str(error).rpartition(">: ")[2]) from error


def _block_frames(sampling_rate: int, num_channels: int) -> int:
    return max(1, min(sampling_rate * BLOCK_SECONDS, MAX_BLOCK_VALUES // num_channels))


def _decode_sound(sound: soundfile.SoundFile, part: Part, name: str) -> Iterator[tuple[int, np.ndarray]]:
    stated = part.stated_frames or (sound.frames if part.has_length and sound.frames < UNKNOWN_FRAMES else 0)
    num_decoded = 0
    with sound:
        rate = check_sampling_rate(sound.samplerate, name)
        size = _block_frames(rate, sound.channels)
        while True:
            # Not beyond what is stated at once: rubbish behind it would take the good samples of a block along.
            wanted = min(size, stated - num_decoded) if num_decoded < stated else size
            try:
                block = sound.read(wanted, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                if stated and num_decoded >= stated:
                    return
                raise truncated_error(name, str(error)) from error
            if not len(block):
                break
            num_decoded += len(block)
            yield rate, block
    if num_decoded + HEADER_TOLERANCE_FRAMES < stated or num_decoded < stated == part.stated_frames:
        raise truncated_error(name, f"{num_decoded} of {stated} samples are there")


def _decode_ffmpeg(part: Part, name: str) -> Iterator[tuple[int, np.ndarray]]:
    try:
        import av
    except ImportError as error:
        raise AudioError(
            f"`{name}` must be in a format of libsndfile (wav, flac, ogg, mp3 ...) where PyAV is not installed, got "
            f"{part.ffmpeg_format}. Install it with `pip install av` or convert the file: `ffmpeg -i IN OUT.wav`."
        ) from error
    part.window.seek(0)
    seconds = stated = 0.0
    try:
        with contextlib.closing(av.open(part.window, format=part.ffmpeg_format)) as container:
            stream = _choose_stream(container, name)
            stated = _stated_seconds(container, stream, part.ffmpeg_format)
            for rate, block in _join_frames(_decode_packets(container, stream)):
                check_sampling_rate(rate, name)
                seconds += len(block) / rate
                yield rate, block
    except (av.error.FFmpegError, ValueError, OSError, EOFError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(
            f"`{name}` must be whole audio, got a damaged {part.ffmpeg_format} file ({error}). "
            "Copy or record it again, or save what is left with `ffmpeg -i IN OUT.wav`."
        ) from error
    if seconds + LENGTH_TOLERANCE_SECONDS < stated:
        raise truncated_error(name, f"{seconds:.2f} of {stated:.2f} s are there")


def _stated_seconds(container, stream, form: str) -> float:
    """Returns the duration that is written in a file, 0 where none is and ffmpeg guesses."""
    if form in ("mov", "wav", "asf") and stream.duration:
        return float(stream.duration * stream.time_base)
    if form == "matroska" and container.duration and not container.streams.video:
        return container.duration / 1e6  # of all tracks: that of a film is the picture's
    return 0.0


def _choose_stream(container, name: str):
    streams = container.streams.audio
    if len(streams) != 1:
        raise AudioError(
            f"`{name}` must have one audio track, got {len(streams)}. Take one out: `ffmpeg -i IN -map 0:a:0 OUT.wav`."
        )
    return streams[0]


def _decode_packets(container, stream) -> Iterator:
    """Yields decoded frames; the last packet may be cut, as by a recorder that was stopped, and no other one."""
    import av

    cut_error = None
    for packet in container.demux(stream):
        if cut_error is not None and packet.size:
            raise cut_error
        try:
            yield from packet.decode()
        except av.error.InvalidDataError as error:
            cut_error = error


def _join_frames(frames) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the frames of a codec, of 20 ms or so, joined to blocks of one rate and number of channels."""
    waiting, num_waiting, kind = [], 0, None
    for frame in frames:
        block = _to_float(frame)
        if waiting and (kind != (frame.sample_rate, block.shape[1]) or num_waiting >= _block_frames(*kind)):
            yield kind[0], np.concatenate(waiting)
            waiting, num_waiting = [], 0
        kind = frame.sample_rate, block.shape[1]
        waiting.append(block)
        num_waiting += len(block)
    if waiting:
        yield kind[0], np.concatenate(waiting)


def _to_float(frame) -> np.ndarray:
    """Returns a frame's samples `(samples, channels)` in [-1, 1]."""
    samples = frame.to_ndarray()  # (channels, samples), or (1, samples * channels) where they are interleaved
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, len(frame.layout.channels))
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    scale = float(2 ** (8 * samples.dtype.itemsize - 1))
    return (samples.astype(np.float32) - scale * (samples.dtype.kind == "u")) / scale


def _unknown_error(window: Window, name: str, reason: str) -> AudioError:
    window.seek(0)
    head = window.read(TEXT_BYTES)
    num_letters = sum(byte >= 32 or byte in b"\t\n\r" for byte in head) - head.count(b"\x7f")
    found = next((what for sign, what in KNOWN_CONTENT.items() if head.startswith(sign)), None)
    if found is None and head and b"\0" not in head and num_letters >= 0.9 * len(head) and _is_utf8(head):
        found = "text"
    if found is None and not head.startswith(AUDIO_STARTS):
        return AudioError(
            f"`{name}` must have the header of an audio format, got none: it is headerless PCM or no audio. If it is "
            "PCM, say how it is written: `sox -t raw -r 16000 -e signed -b 16 -c 1 IN OUT.wav`."
        )
    return AudioError(
        f"`{name}` must be wav, flac, ogg or mp3 audio, got something else or a damaged file ({found or reason}). "
        "Convert it to wav or flac."
    )


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # a letter cut in two at the end
    return True
