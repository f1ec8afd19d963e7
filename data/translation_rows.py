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
    Returns the columns `target_audio`, `units` and `durations` of a row that has them; None where they are empty.

    Args:
        row: In the project's names.
        required_columns: Columns that must have a value; others that cannot be read are None.
        where: What a message calls the row.
        source: Of the row.

    Raises:
        RowError: A recording that is required is not there, what should be units is none, or required units are not
            as many as `tgt_n_frames` says or as there are durations.
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
    for column in ("units", "durations"):
        if column in row:
            target[column] = _read_numbers(row, column, where, is_required=column in required_columns)
    if "units" in required_columns:
        _check_counts(row, target, where)
    return target


def _read_numbers(row: Mapping[str, object], column: str, where: str, *, is_required: bool) -> object:
    try:
        numbers = read_units(row[column], f"`{column}` of {where}")
    except RowError:
        if is_required:
            raise
        return row[column]  # where cells of a column differ in type, it is left out with a warning
    if numbers is None and is_required:
        raise RowError(f"`{column}` of {where} must not be empty, got {row[column]!r}")
    return numbers


def _check_counts(row: Mapping[str, object], target: Mapping[str, object], where: str) -> None:
    num_units, stated = len(target["units"]), row.get("tgt_n_frames")
    if not is_empty(stated) and str(stated).strip() != str(num_units):
        raise RowError(f"`tgt_n_frames` of {where} must be the number of its units, {num_units}, got {stated}")
    durations = target.get("durations")
    if isinstance(durations, list) and len(durations) != num_units:
        raise RowError(f"`durations` of {where} must be one a unit, {num_units}, got {len(durations)}")


def read_units(value: object, name: str) -> list[int] | None:
    """
    Returns units from a list, or from a text with spaces between them; None if there are none.

    Args:
        value: Of a cell.
        name: What a message calls the cell.

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
            raise RowError(f"{name} must be whole numbers with spaces between them, got {text!r:.40}")
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
