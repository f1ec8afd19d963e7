"""Rows that are a part of a longer recording: cut out by their times, which are checked against the file."""

import io
import logging
import math
import os
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import scipy.io.wavfile

from data.audio import MIX, SAMPLING_RATE, AudioError, audio_seconds, read_audio
from data.rows import RowError

logger = logging.getLogger(__name__)

START_END_COLUMNS = (("start", "end"), ("begin_time", "end_time"), ("start_time", "end_time"), ("begin", "end"))
TOLERANCE_SECONDS = 0.1  # by which written times may differ from a file's


class Cutter:
    """
    Cuts the rows of a corpus out of their recordings.

    A row's times may also be those of a longer recording that its file was cut out of, as in Multilingual LibriSpeech:
    they end behind the file and are as long as it. A corpus must be of one kind.
    """

    def __init__(self):
        self._seen: dict[str, str] = {}  # kind of a row, and where the first of them is

    def find_part(
        self, row: Mapping[str, object], audio: Mapping, where: str, *, is_nemo: bool = False
    ) -> tuple[float, float] | None:
        """
        Returns start and end in seconds of what a row hears of its recording, None for all of it.

        Args:
            row: With `offset` and `duration`, `start` and `end`, or `begin_time` and `end_time`, in seconds, or none.
            audio: The row's recording, `{"path", "bytes"}`.
            where: What a message calls the row.
            is_nemo: A `duration` alone is one from the start of the file.

        Raises:
            RowError: The times are no numbers, contradict each other, or do not fit the file.
            ValueError: Rows of the corpus have times of different kinds.
        """
        times = _find_times(row, where, is_nemo=is_nemo)
        if times is None:
            return None
        try:
            total = audio_seconds(audio)
        except AudioError as error:
            raise RowError(str(error).removesuffix(".")) from error
        start, end = times[0], total if times[1] is None else times[1]
        if end <= start:
            raise RowError(f"{where} must have a start before its end, got {start} and {end} seconds")
        if start <= TOLERANCE_SECONDS and abs(end - total) <= TOLERANCE_SECONDS:
            # Of either kind: what a longer recording's first row would say, too.
            return None if start == 0 and end >= total else (start, end)
        if end <= total + TOLERANCE_SECONDS:
            self._note("cut", where)
            return start, end
        if abs(end - start - total) > TOLERANCE_SECONDS:
            raise RowError(
                f"{where} must have times in seconds within its recording of {total:.2f} s, got {start:g} to {end:g}"
            )
        self._note("whole", where)
        return None

    def _note(self, kind: str, where: str) -> None:
        self._seen.setdefault(kind, where)
        if len(self._seen) > 1:
            raise ValueError(
                f"A corpus's times must be of one kind, got those of a part of its file in {self._seen['cut']} and "
                f"those of a longer recording, out of which its file is cut already, in {self._seen['whole']}. "
                "Correct or remove the columns."
            )


def cut_part(audio: dict, part: tuple[float, float] | None, channel: str | int = MIX) -> dict:
    """
    Returns a part or a channel of a recording as `{"path", "bytes"}`, or `audio` itself if all of it is heard.

    Args:
        audio: `{"path", "bytes"}`.
        part: Start and end in seconds.
        channel: As in `read_audio`.

    Returns:
        The bytes are a wav of one channel at 16 kHz, empty with a warning where the recording cannot be read; the path
        says which part it is.
    """
    if part is None and channel == MIX:
        return audio
    path, content = audio["path"], audio["bytes"]
    file = io.BytesIO()
    try:
        samples = _read_whole(path, content, channel, 0 if content else os.stat(path).st_mtime_ns)
        first, last = (None if part is None else round(time * SAMPLING_RATE) for time in part or (0, 0))
        # libsndfile would write the time of day, too: the same part must have the same bytes.
        scipy.io.wavfile.write(file, SAMPLING_RATE, samples[first:last])
    except AudioError as error:
        logger.warning("No part of it can be used: %s", error)
    heard = [] if part is None else [f"{part[0]:g}-{part[1]:g}"]
    heard += [] if channel == MIX else [str(channel)]
    return {"path": f"{path or 'audio'}#{':'.join(heard)}", "bytes": file.getvalue()}


@lru_cache(maxsize=1)  # the parts of a recording stand one after the other in a table
def _read_whole(path: str | None, content: bytes | None, channel: str | int, _changed: int) -> np.ndarray:
    return read_audio({"path": path, "bytes": content}, channel=channel)


def _find_times(row: Mapping[str, object], where: str, *, is_nemo: bool) -> tuple[float, float | None] | None:
    """Returns the start and the end, None for the file's own, in seconds; None for a row without times."""
    found = []
    for names in START_END_COLUMNS:
        values = [_read_seconds(row, name, where) for name in names if name in row]
        if len(values) == 2 and values != [None, None]:
            found.append(tuple(values))
    offset, duration = (_read_seconds(row, name, where) for name in ("offset", "duration"))
    if offset is not None or (is_nemo and duration is not None):
        offset = offset or 0.0
        found.append((offset, None if duration is None else offset + duration))
    if not found:
        return None
    start, end = found[0]
    if start is None:
        raise RowError(f"{where} must have a start before its end, got {start} and {end} seconds")
    for other in found[1:]:
        differences = [abs((one or 0.0) - (time or 0.0)) for one, time in zip(other, found[0], strict=True)]
        if max(differences) > TOLERANCE_SECONDS:
            raise RowError(f"{where} must have times in one way, got {start} to {end} and {other[0]} to {other[1]}")
    return start, end


def _read_seconds(row: Mapping[str, object], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if isinstance(value, bool) or not 0 <= seconds < math.inf:
        raise RowError(f"`{name}` of {where} must be seconds from the start of the recording, got {value!r:.80}")
    return seconds
