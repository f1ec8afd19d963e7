"""Where the audio of a file lies: found from its content, because names, stated sizes and counts are often wrong.

libsndfile reads what a header states. Recorders that are killed leave headers that state nothing, files are put one
behind the other, an mp3 need not say how long it is. What is found here is handed to libsndfile with a header that is
true; the tags around it are left out.
"""

import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from .audio_files import AudioError, Window
from .mpeg_frames import FRAMES_APART, MpegStream, find_mpeg_streams

UNKNOWN_BYTES = 2**31 - 2**16  # who writes into a pipe states a size near 2**31 or 2**32
IGNORED_BYTES = 512  # behind the samples: at most 16 ms of 16 kHz in 16 bits
SCAN_BYTES = 2**20  # read at a time to find where another file begins
MAX_CHUNKS = 10_000  # of a file; one with more is no recording
CHUNK_ID = re.compile(rb"[ -~]{4}")
FILE_START = re.compile(rb"(RIFF|RIFX|RF64)....WAVE|FORM....AIF|caff\0\1|\.snd\0|fLaC|OggS|ID3[\2-\4]", re.DOTALL)
FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # with the head of its first block: no samples look like this
FLAC_HEADER_BYTES = 42  # "fLaC" and the first block, which states the number of samples in 36 bits
# What ffmpeg calls a file that has these bytes at this place. Nothing else is handed to it: it takes noise for a film,
# and a playlist for an order to open other files.
FFMPEG_FORMATS = (
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"wide", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"#!AMR", "amr"),
    (0, b"\xff\xf1", "aac"),
    (0, b"\xff\xf9", "aac"),
    (8, b"WAVE", "wav"),
    (8, b"AVI ", "avi"),
    (8, b"AIF", "aiff"),
    (0, b"OggS", "ogg"),
    (0, b"caff", "caf"),
    (0, b".snd", "au"),
    (0, b"FLV\x01", "flv"),
    (0, b"MAC ", "ape"),
    (0, b"wvpk", "wv"),
    (0, b"TTA1", "tta"),
)


@dataclass(frozen=True)
class Part:
    """
    One recording in a file, of which there are several where files were put one behind the other.

    Args:
        window: The recording as a file of its own.
        stated_frames: Samples of each channel that its header promises; None if it promises nothing.
        has_length: Whether libsndfile can know the number of samples before it has decoded them.
        ffmpeg_format: What ffmpeg calls the format; None for what is not handed to it.
    """

    window: Window
    stated_frames: int | None = None
    has_length: bool = True
    ffmpeg_format: str | None = None


@dataclass(frozen=True)
class _Layout:
    """How a format of chunks is written."""

    first_chunk: int  # its place
    size_format: str  # of a chunk's size, for `struct`
    data_id: bytes  # name of the chunk of samples
    id_bytes: int = 4  # of every name
    counted_bytes: int = 0  # of its own head that a chunk's size counts
    alignment: int = 1  # chunks are filled up to a multiple of so many bytes
    data_head_bytes: int = 0  # of the chunk of samples, before the samples

    @property
    def head_bytes(self) -> int:
        return self.id_bytes + struct.calcsize(self.size_format)


_W64_GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_WAV = _Layout(12, "<I", b"data", alignment=2)
_LAYOUTS = {
    b"RIFFWAVE": _WAV,
    b"RF64WAVE": _WAV,
    b"BW64WAVE": _WAV,
    b"RIFXWAVE": _Layout(12, ">I", b"data", alignment=2),
    b"FORMAIFF": _Layout(12, ">I", b"SSND", alignment=2, data_head_bytes=8),
    b"FORMAIFC": _Layout(12, ">I", b"SSND", alignment=2, data_head_bytes=8),
    b"caff": _Layout(8, ">q", b"data", data_head_bytes=4),
    b"riff": _Layout(40, "<q", b"data" + _W64_GUID, id_bytes=16, counted_bytes=24, alignment=8),
}


@dataclass(frozen=True)
class _Chunk:
    name: bytes
    start: int  # of its content
    size: int  # of its content, as stated


def find_parts(file: BinaryIO, name: str) -> list[Part]:
    """
    Returns the recordings in a file, in their order.

    Args:
        file: As from [`open_source`].
        name: What errors call it.

    Raises:
        AudioError: A header states more samples than there are, or something that is no chunk follows the samples.
    """
    return _find_from(file, 0, file.seek(0, 2), name)


def _find_from(file: BinaryIO, start: int, end: int, name: str) -> list[Part]:
    start = _skip_id3(file, start, end)
    magic = _read_at(file, start, 64)
    form = next((form for at, sign, form in FFMPEG_FORMATS if magic[at : at + len(sign)] == sign), None)
    if layout := _LAYOUTS.get(magic[:4] + magic[8:12]) or _LAYOUTS.get(magic[:4]):
        return _find_chunked(file, start, end, layout, form, name)
    if magic[:4] == b".snd" and len(magic) >= 24:
        return _find_au(file, start, end, form, name)
    if FLAC_START.match(magic) and len(magic) >= FLAC_HEADER_BYTES:
        return _find_flac(file, start, end)
    if magic[:4] == b"OggS":
        return [Part(Window(file, *span), ffmpeg_format=form) for span in _find_ogg_streams(file, start, end)]
    if form is None and (streams := find_mpeg_streams(file, start, end)):
        return [_describe_mpeg(file, stream, name) for stream in streams]
    return [Part(Window(file, start, end), ffmpeg_format=form)]


def _read_at(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(num_bytes)


def _skip_id3(file: BinaryIO, start: int, end: int) -> int:
    """Returns the byte behind the ID3 tags, which stand in front of any format and hold whole pictures."""
    while len(head := _read_at(file, start, 10)) == 10 and head[:3] == b"ID3" and max(head[6:]) < 128:
        size = sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        behind = start + 10 + size + 10 * bool(head[5] & 16)  # some have a foot as long as the head
        if behind > end:
            break
        start = behind
    return start


def _find_chunked(file, start: int, end: int, layout: _Layout, form: str | None, name: str) -> list[Part]:
    chunks, is_regular = _list_chunks(file, start + layout.first_chunk, end, layout)
    data = next((chunk for chunk in chunks if chunk.name == layout.data_id), None)
    if data is None:
        return [Part(Window(file, start, end), ffmpeg_format=form)]
    stated, available = data.size, end - data.start
    if ds64 := next((chunk for chunk in chunks if chunk.name == b"ds64"), None):
        if stated == 2**32 - 1:
            (stated,) = struct.unpack("<q", _read_at(file, ds64.start + 8, 8).ljust(8, b"\0"))
    size = _measure_samples(stated, available, layout.data_head_bytes, name)
    behind = _align(data.start + size, start, layout)
    next_parts, last = [], end
    if size == stated and not _is_filling(file, behind, end):
        if (available - size) % 2**32 <= IGNORED_BYTES and available > 2**32:
            size = available  # a size of 32 bits has run over
        elif not _holds_chunks(file, behind, end, layout):
            next_parts, last = _find_next(file, behind, end, name, num_bytes=size), behind
    if size == stated and is_regular:
        return [Part(Window(file, start, last), ffmpeg_format=form), *next_parts]
    header = _write_header(file, start, chunks, data, size, layout)
    return [Part(Window(file, data.start, data.start + size, header=header), ffmpeg_format=form), *next_parts]


def _align(offset: int, start: int, layout: _Layout) -> int:
    return offset + (start - offset) % layout.alignment


def _list_chunks(file, offset: int, end: int, layout: _Layout) -> tuple[list[_Chunk], bool]:
    """Returns the chunks, and whether a reader that trusts their order and their sizes finds the samples."""
    start, chunks, is_regular = offset, [], True
    while offset < end and len(chunks) < MAX_CHUNKS:
        head = _read_at(file, offset, layout.head_bytes)
        if len(head) < layout.head_bytes:
            break
        (size,) = struct.unpack(layout.size_format, head[layout.id_bytes :])
        chunk = _Chunk(head[: layout.id_bytes], offset + layout.head_bytes, size - layout.counted_bytes)
        is_regular &= not (chunk.name == b"fmt " and any(other.name == b"data" for other in chunks))
        chunks.append(chunk)
        behind = chunk.start + chunk.size
        if chunk.size < 0 or behind > end:
            break
        offset = _align(behind, start, layout)
        if offset != behind and CHUNK_ID.fullmatch(_read_at(file, behind, 4)):
            offset, is_regular = behind, False  # some programs forget to fill up
    return chunks, is_regular


def _is_filling(file, offset: int, end: int) -> bool:
    """Whether nothing is there to be heard: a few bytes, an ID3 tag, or zeros."""
    offset = _skip_id3(file, offset, end)
    if end - offset <= IGNORED_BYTES:
        return True
    file.seek(offset)
    return all(not any(file.read(min(SCAN_BYTES, end - at))) for at in range(offset, end, SCAN_BYTES))


def _find_next(file, offset: int, end: int, name: str, *, num_bytes: int) -> list[Part]:
    """Returns the parts behind `num_bytes` bytes of samples, if a file begins there."""
    if FILE_START.match(_read_at(file, offset, 16)):
        return _find_from(file, offset, end, name)
    raise AudioError(
        f"`{name}` must end with its samples, got a header that states {num_bytes} bytes of them and {end - offset} "
        "bytes more behind these. If they are samples too, write a new header: `sox --ignore-length IN.wav OUT.wav`."
    )


def _holds_chunks(file, offset: int, end: int, layout: _Layout) -> bool:
    if FILE_START.match(_read_at(file, offset, 16)):
        return False
    chunks, _ = _list_chunks(file, offset, end, layout)
    last = chunks[-1].start + chunks[-1].size
    are_names = layout.id_bytes != 4 or all(CHUNK_ID.fullmatch(chunk.name) for chunk in chunks)
    return are_names and end - IGNORED_BYTES <= last <= end + 1


def _measure_samples(stated: int, available: int, head_bytes: int, name: str) -> int:
    """Returns the bytes of a chunk of samples: the stated ones, or all that follow where nothing true is stated."""
    if stated <= head_bytes or UNKNOWN_BYTES <= stated != available < stated:
        return available
    if stated > available:
        raise truncated_error(name, f"{available} of {stated} bytes of samples are there")
    return stated


def _write_header(file, start: int, chunks: list[_Chunk], data: _Chunk, size: int, layout: _Layout) -> bytes:
    """Returns what stands before the samples, with their size, for libsndfile."""
    magic, sized = _read_at(file, start, layout.first_chunk), struct.Struct(layout.size_format)
    is_large = sized.size == 4 and size >= 2**32  # RF64 states it in a chunk of its own
    head = layout.data_id + sized.pack(2**32 - 1 if is_large else size + layout.counted_bytes)
    if layout.data_id != b"data" or layout.first_chunk != 12:
        before = _read_at(file, start, data.start - start - layout.head_bytes)
        return before + head
    wanted = [chunk for chunk in chunks if chunk.name in (b"fmt ", b"fact") and chunk.size < 2**16]
    kept = [chunk.name + sized.pack(chunk.size) + _read_at(file, chunk.start, chunk.size) for chunk in wanted]
    kept = [chunk + b"\0" * (len(chunk) % 2) for chunk in kept]
    if is_large and magic[:4] != b"RIFX":
        large = b"ds64" + struct.pack("<IQQQI", 28, size + 2**16, size, 0, 0)
        return b"".join([b"RF64\xff\xff\xff\xffWAVE", large, *kept, head])
    magic = magic if magic[:4] == b"RIFX" else b"RIFF" + magic[4:]
    return b"".join([magic, *kept, head])


def _find_au(file, start: int, end: int, form: str | None, name: str) -> list[Part]:
    header_bytes, stated = struct.unpack(">II", _read_at(file, start + 4, 8))
    available = end - start - header_bytes
    if available <= 0:
        return [Part(Window(file, start, end), ffmpeg_format=form)]
    size = _measure_samples(stated, available, 0, name)
    behind, next_parts = start + header_bytes + size, []
    if not _is_filling(file, behind, end):
        next_parts = _find_next(file, behind, end, name, num_bytes=size)
    header = _read_at(file, start, header_bytes)
    header = header[:8] + struct.pack(">I", min(size, 2**32 - 1)) + header[12:]
    return [Part(Window(file, start + header_bytes, behind, header=header), ffmpeg_format=form), *next_parts]


def _find_flac(file, start: int, end: int) -> list[Part]:
    """Gives each stream a header that states no number of samples, so that all are read whatever the file states."""
    end = _strip_id3_at_end(file, start, end)
    starts, offset = [], start
    while offset < end:
        block = _read_at(file, offset, min(SCAN_BYTES + 8, end - offset))
        starts += [offset + found.start() for found in FLAC_START.finditer(block) if found.start() < SCAN_BYTES]
        offset += SCAN_BYTES
    parts = []
    for first, last in zip(starts, [*starts[1:], end], strict=True):
        header = bytearray(_read_at(file, first, FLAC_HEADER_BYTES).ljust(FLAC_HEADER_BYTES, b"\0"))
        stated = int.from_bytes(header[21:26]) & (2**36 - 1)
        header[21:26] = (header[21] & 0xF0, 0, 0, 0, 0)
        window = Window(file, min(first + len(header), last), last, header=bytes(header))
        parts.append(Part(window, stated or None, has_length=False))
    return parts


def _strip_id3_at_end(file, start: int, end: int) -> int:
    return end - 128 if end - start > 128 and _read_at(file, end - 128, 3) == b"TAG" else end


def _find_ogg_streams(file, start: int, end: int) -> list[tuple[int, int]]:
    """Returns where each stream of a chain begins and where its last whole page ends."""
    starts, offset, behind, was_first = [], start, start, False
    while offset < end:
        head = _read_at(file, offset, 27)
        if len(head) < 27 or head[:4] != b"OggS":
            found = _read_at(file, offset + 1, 2**16).find(b"OggS")  # damage in between
            if found < 0:
                break
            offset += 1 + found
            continue
        sizes = file.read(head[26])
        page_end = offset + 27 + head[26] + sum(sizes)
        if len(sizes) < head[26] or page_end > end:
            break
        is_first = bool(head[5] & 2)  # of a stream; a film has several at the same time
        if (is_first and not was_first) or not starts:
            starts.append(offset)
        was_first, offset, behind = is_first, page_end, page_end
    return list(zip(starts, [*starts[1:], behind], strict=True)) if starts else [(start, end)]


def _describe_mpeg(file, stream: MpegStream, name: str) -> Part:
    """Gives a stream the ID3 tag by which libsndfile knows an mp3 without a name, and an index if it has none."""
    header = b"ID3\x04" + bytes(5) + b"\x0a" + bytes(10)  # of ten empty bytes
    if stream.stated_frames is None and stream.first.kind[0] == 3:
        header += stream.write_index()
    elif stream.stated_frames is not None and stream.num_frames + FRAMES_APART < stream.stated_frames:
        raise truncated_error(name, f"{stream.num_frames} of {stream.stated_frames} mp3 frames are there")
    return Part(Window(file, stream.first.offset, stream.end, header=header))


def truncated_error(name: str, detail: str) -> AudioError:
    """Returns the error for a file that ends too early."""
    return AudioError(f"`{name}` must be a whole file, got a truncated one ({detail}). Copy or record it again.")
