"""The frames of mp3 files, counted: many files state no number of frames, and some a wrong one.

libmpg123, in libsndfile, has this count but gives it to nobody, and PyAV's demuxer is an optional requirement.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

MAX_JUNK_BYTES = 2**18  # before the first frame, or between two
MIN_FRAMES = 3  # one after the other; noise has two by chance
MIN_SHARE = 0.5  # of a file's bytes that lie in frames
FRAMES_APART = 2  # counts that differ by no more are the same: encoders do not agree on what they count
# Layer, and the version's row: bit rates in kbit/s, from ISO 11172-3 (table 2.4.2.3) and 13818-3.
BIT_RATES = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (3, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (3, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAMPLING_RATES = (44_100, 48_000, 32_000)  # of version 1; halved in version 2, quartered in 2.5
INDEX_RATE = 0x80  # bits of 112 kbit/s, or of 64 in version 2: an index fits into a frame of it
VERSION_DIVISORS = {3: 1, 2: 2, 0: 4}  # by the two bits of the version


@dataclass(frozen=True)
class MpegFrame:
    """A frame: where it is, its first four bytes, its layer, rate and channels, and where an index stands in it."""

    offset: int
    head: bytes
    num_bytes: int
    kind: tuple[int, int, int]
    index_offset: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.offset + self.num_bytes


@dataclass(frozen=True)
class MpegStream:
    """
    Frames of one kind, one behind the other.

    Args:
        first: Its first frame, which holds the index if there is one.
        end: The byte behind the last frame.
        num_frames: Counted, without the one of the index.
        stated_frames: In the index; None without one.
        is_rest: Whether they follow an index that does not count them.
    """

    first: MpegFrame
    end: int
    num_frames: int
    stated_frames: int | None
    is_rest: bool = False

    def write_index(self) -> bytes:
        """Returns a frame with an index that states `num_frames`, for a layer III stream that has none."""
        version, mode = self.first.head[1] | 1, self.first.head[3]  # 1: no checksum
        frame = _parse_frame(bytes([0xFF, version, INDEX_RATE | self.first.head[2] & 0x0C, mode]), 0)
        content = frame.head.ljust(frame.index_offset, b"\0") + b"Xing" + struct.pack(">II", 1, self.num_frames)
        return content.ljust(frame.num_bytes, b"\0")


def find_mpeg_streams(file: BinaryIO, start: int, end: int) -> list["MpegStream"]:
    """
    Returns the mp3 streams between two bytes of a file.

    A stream begins at an index (Xing, Info or VBRI), at another sampling rate or number of channels, and where the
    index before has come to its end. So every stream has a true index or none.

    Returns:
        The streams; none unless frames follow each other and fill half of the file: what looks like the head of a
        frame is in any noise.
    """
    frames = list(_iterate_frames(file, start, end))
    is_chain = len(frames) >= MIN_FRAMES or (frames and frames[0].offset == start)
    if not is_chain or sum(frame.num_bytes for frame in frames) < MIN_SHARE * (end - start):
        return []
    streams: list[MpegStream] = []
    for frame in frames:
        stated, last = _read_index(file, frame), streams[-1] if streams else None
        is_over = last is not None and last.num_frames == last.stated_frames
        if last is None or stated is not None or frame.kind != last.first.kind or is_over:
            # The index stands in a frame of its own, which is not counted.
            streams.append(MpegStream(frame, frame.end, int(stated is None), stated, is_rest=is_over and not stated))
        else:
            streams[-1] = replace(last, end=frame.end, num_frames=last.num_frames + 1)
    return [stream for stream in streams if stream.num_frames > FRAMES_APART * stream.is_rest]


def _iterate_frames(file: BinaryIO, start: int, end: int) -> Iterator[MpegFrame]:
    offset, is_synchronised = start, False
    while offset < end:
        file.seek(offset)
        frame = _parse_frame(file.read(4), offset)
        if frame is None or (not is_synchronised and not _is_followed(file, frame, end)):
            offset, is_synchronised = _find_sync(file, offset + 1, end), False
            if offset is None:
                return
            continue
        is_synchronised = True
        if frame.end > end:
            return  # the recorder was stopped in the middle of a frame
        yield frame
        offset += frame.num_bytes


def _is_followed(file: BinaryIO, frame: MpegFrame, end: int) -> bool:
    """Whether another frame of the same kind, or the end, follows: one head alone is in any noise."""
    behind = frame.end
    if behind >= end - 4:
        return behind <= end
    file.seek(behind)
    following = _parse_frame(file.read(4), behind)
    return following is not None and following.kind[:2] == frame.kind[:2]


def _find_sync(file: BinaryIO, offset: int, end: int) -> int | None:
    file.seek(offset)
    block = file.read(min(MAX_JUNK_BYTES, end - offset))
    found = block.find(b"\xff")
    while found >= 0:
        frame = _parse_frame(block[found : found + 4], offset + found)
        if frame is not None and _is_followed(file, frame, end):
            return offset + found
        found = block.find(b"\xff", found + 1)
    return None


def _parse_frame(head: bytes, offset: int) -> MpegFrame | None:
    """Returns the frame that `head`, its first four bytes, describes; None if it describes none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, rate, mode = head[2] >> 4, head[2] >> 2 & 3, head[3] >> 6
    if version == 1 or layer == 4 or not 0 < bit_rate < 15 or rate == 3:
        return None
    is_first = version == 3
    bits = 1000 * BIT_RATES[layer, 1 if is_first else 2][bit_rate - 1]
    sampling_rate = SAMPLING_RATES[rate] // VERSION_DIVISORS[version]
    filled, channels = head[2] >> 1 & 1, 1 if mode == 3 else 2
    if layer == 1:
        num_bytes = (12 * bits // sampling_rate + filled) * 4
    else:
        num_bytes = (144 if layer == 2 or is_first else 72) * bits // sampling_rate + filled
    index_offset = 4 + {(True, 2): 32, (True, 1): 17, (False, 2): 17, (False, 1): 9}[is_first, channels]
    return MpegFrame(offset, head, num_bytes, (layer, sampling_rate, channels), index_offset)


def _read_index(file: BinaryIO, frame: MpegFrame) -> int | None:
    """Returns the number of frames that a Xing, Info or VBRI index in `frame` states."""
    if frame.kind[0] != 3:
        return None
    file.seek(frame.offset)
    head = file.read(min(frame.num_bytes, 64))
    tag = head[frame.index_offset : frame.index_offset + 12]
    if tag[:4] in (b"Xing", b"Info") and len(tag) == 12 and tag[7] & 1:
        return struct.unpack(">I", tag[8:])[0] or None
    if head[36:40] == b"VBRI" and len(head) >= 54:
        return struct.unpack(">I", head[50:54])[0] or None
    return None
