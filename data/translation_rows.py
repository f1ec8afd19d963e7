"""The target side of a translation corpus's rows: recordings, units, and stated numbers of frames."""

from collections.abc import Mapping, Sequence

import numpy as np

from data.audio import AudioError, audio_seconds
from data.rows import RowError, Source, is_empty, read_recording

FRAMES_PER_SECOND = 100  # filter banks, a frame each 10 ms
FRAME_TOLERANCE = 3  # a window of 25 ms, and how its edges are padded
# Rates in Hz that a manifest may count samples at instead of frames.
SAMPLE_RATES = (8000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
SAMPLE_TOLERANCE = 0.001  # share of the samples


def read_target(
    row: Mapping[str, object], required_columns: Sequence[str], where: str, source: Source
) -> dict[str, object]:
    """
    Returns the columns `target_audio` and `units` of a row that has them; None where they are empty.

    Args:
        row: In the project's names.
        required_columns: Columns that must have a value; others that cannot be read are None.
        where: What a message calls the row.
        source: Of the row.

    Raises:
        RowError: A recording that is required is not there, what should be units is none, or they are not as many as
            `tgt_n_frames` says.
    """
    target: dict[str, object] = {}
    if "target_audio" in row:
        try:
            empty = is_empty(row["target_audio"])
            recording = {"audio": row["target_audio"]}
            target["target_audio"] = None if empty else read_recording(recording, f"`target_audio` of {where}", source)
        except RowError:
            if "target_audio" in required_columns:
                raise
            target["target_audio"] = None
    if "units" in row:
        target["units"] = _read_counted(row, where) if "units" in required_columns else _try_units(row, where)
    return target


def _read_counted(row: Mapping[str, object], where: str) -> list[int]:
    units, stated = read_units(row["units"], where), row.get("tgt_n_frames")
    if units is None:
        raise RowError(f"`units` of {where} must not be empty, got {row['units']!r}")
    if not is_empty(stated) and str(stated).strip() != str(len(units)):
        raise RowError(f"`tgt_n_frames` of {where} must be the number of its units, {len(units)}, got {stated}")
    return units


def _try_units(row: Mapping[str, object], where: str) -> object:
    try:
        return read_units(row["units"], where)
    except RowError:  # nothing needs them; where cells differ in type, the column is left out with a warning
        return row["units"]


def read_units(value: object, where: str) -> list[int] | None:
    """
    Returns units from a list, or from a text with spaces between them; None if there are none.

    Raises:
        RowError: One is no whole number from 0.
    """
    parts = value.split() if isinstance(value, str) else value
    if not isinstance(parts, Sequence | np.ndarray):
        if is_empty(parts):
            return None
        parts = [parts]
    units = []
    for part in parts:
        text = str(part)
        if not text.isascii() or not text.isdigit():
            raise RowError(f"`units` of {where} must be whole numbers with spaces between them, got {text!r:.40}")
        units.append(int(text))
    return units or None


def check_source_frames(
    row: Mapping[str, object], audio: Mapping, part: tuple[float, float] | None, where: str
) -> None:
    """
    Makes sure that a recording is as long as `src_n_frames` says, in frames of 10 ms or in samples.

    Args:
        row: With or without the column.
        audio: The row's recording, `{"path", "bytes"}`.
        part: Start and end in seconds of what the row hears of it; None: all.
        where: What a message calls the row.

    Raises:
        RowError: It is shorter or longer, or no audio.
    """
    stated = row.get("src_n_frames")
    if is_empty(stated):
        return
    try:
        seconds = audio_seconds(audio) if part is None else part[1] - part[0]
    except AudioError as error:
        raise RowError(str(error).removesuffix(".")) from error
    number = float(stated) if str(stated).replace(".", "", 1).isdigit() else -1.0
    is_frames = abs(number - seconds * FRAMES_PER_SECOND) <= FRAME_TOLERANCE
    is_samples = any(abs(number - seconds * rate) <= SAMPLE_TOLERANCE * seconds * rate for rate in SAMPLE_RATES)
    if not is_frames and not is_samples:
        raise RowError(
            f"`src_n_frames` of {where} must be the frames of 10 ms of its recording, about "
            f"{round(seconds * FRAMES_PER_SECOND)}, got {stated}"
        )
