"""Rows of a corpus in the project's columns: names, transcripts, and recordings that exist and may be read."""

import difflib
import io
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import scipy.io.wavfile

from data.tables import AUDIO_COLUMNS

RENAMED_COLUMNS = {
    "sentence": "text",
    "transcription": "text",
    "transcript": "text",
    "speaker": "speaker_id",
    "client_id": "speaker_id",
    "src_text": "text",
    "tgt_text": "target_text",
    "translation": "target_text",
    "tgt_audio": "units",  # of fairseq's and StreamSpeech's manifests
    "tgt_durations": "durations",
}
TEXT_COLUMNS = ("text", "target_text", "instruction", "response")
NAME_COLUMNS = ("speaker_id", "domain", "pair_id")  # names, even where a corpus writes them as numbers
# Columns that later steps may use beside those that a recipe requires; others, whatever they hold, stay behind.
KEPT_COLUMNS = ("audio", *TEXT_COLUMNS, *NAME_COLUMNS, "split", "target_audio", "units", "durations")
RATE_COLUMNS = ("sampling_rate", "sample_rate")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".webm", ".mp4", ".aiff", ".au", ".amr")
SLICE = re.compile(r"(.+\.zip):(\d+):(\d+)", re.IGNORECASE)  # a recording inside an archive: offset and bytes
AUDIO_STARTS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")
NUMPY_START = b"\x93NUMPY"
MAX_CHANNELS = 8
MAX_WHOLE = 32_768  # of samples of 16 bits


@dataclass(frozen=True)
class Source:
    """
    Where rows of a corpus come from.

    Args:
        name: What messages call it.
        read: Yields the rows as they stand there.
        folders: Where a recording's relative path begins; the file must be in one of them alone.
        roots: Folders outside which a recording may not lie.
        is_trusted: The user named this very manifest, which may then name files anywhere by absolute paths.
        default_split: Split of rows that name none.
        has_fixed_split: Whether no row names a split of its own.
    """

    name: str
    read: partial[Iterator[dict[str, object]]]
    folders: tuple[Path, ...] = ()
    roots: tuple[Path, ...] = ()
    is_trusted: bool = False
    default_split: str = "train"
    has_fixed_split: bool = False


class RowError(ValueError):
    """What is wrong with one row, without a full stop; the row is left out where few are."""


@lru_cache(maxsize=64)
def find_renames(columns: tuple[str, ...], text_column: str | None, name: str) -> dict[str, str]:
    """
    Returns a table's columns and the project's names of them; a column whose name another one takes is left out.

    Args:
        columns: As they stand in the table; case does not matter where a name is known.
        text_column: The column that is `text`; default: `text`, or the first of those that usually hold it.
        name: Of the table.

    Raises:
        ValueError: There is no column `text_column`.
    """
    if text_column is not None and text_column not in columns:
        raise ValueError(
            f"`text_column` must be a column of {name}, got {text_column!r} where the columns are "
            f"{', '.join(columns)}. Choose one of them."
        )
    folded = {column.strip().casefold(): column for column in columns}
    renames = {} if text_column is None else {text_column: "text"}
    known = [(column, "audio") for column in AUDIO_COLUMNS] + [(column, column) for column in KEPT_COLUMNS]
    for old, new in [*known, *RENAMED_COLUMNS.items()]:
        if old in folded and folded[old] not in renames and new not in renames.values():
            renames[folded[old]] = new
    taken = set(renames.values())
    return {column: renames.get(column, column) for column in columns if column in renames or column not in taken}


def check_columns(required_columns: Iterable[str], columns: Iterable[str], name: str) -> None:
    """
    Makes sure that a table has the columns that a recipe needs.

    Raises:
        ValueError: One is missing; the message lists those that are there.
    """
    for column in required_columns:
        if column not in columns:
            also = f" (or {', '.join(AUDIO_COLUMNS[1:])})" if column == "audio" else ""
            remedies = {"text": "Name it with `--text_column`, or add or rename it."}
            remedies["audio"] = "Add or rename it; the first line of a table must name its columns."
            remedy = remedies.get(column, "Add or rename it.")
            raise ValueError(
                f"`{column}`{also} must be a column of {name}, got the columns {', '.join(columns)}. {remedy}"
            )


def read_text(value: object) -> str:
    """
    Returns a transcript; a whole number in its digits.

    Raises:
        RowError: It is something else.
    """
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise RowError(f"must be text, got half a character: {value!a:.80}")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"must be text, got {value!r:.80}")


def read_name(value: object) -> str:
    """
    Returns a speaker's or a domain's name; a whole number without the fraction that a table with gaps gives it.

    Raises:
        RowError: It is no name.
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return read_text(value)


def is_empty(value: object) -> bool:
    """Returns whether a cell holds nothing: none, NaN, or blanks."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def read_cells(row: Mapping[str, object], required_columns: Sequence[str], where: str) -> dict[str, object]:
    """
    Returns a row's kept columns, each of its type, but for `audio` as it stands there.

    Args:
        row: In the project's names.
        required_columns: Columns that must have a value; others that cannot be read are None.
        where: What a message puts behind the column's name.

    Raises:
        RowError: A required column is empty or of another type.
    """
    cells = {column: row[column] for column in row if column in KEPT_COLUMNS or column in required_columns}
    for column in required_columns:
        if is_empty(row[column]):
            raise RowError(f"`{column}` {where} must not be empty, got {row[column]!r}")
    for column in cells.keys() & {*TEXT_COLUMNS, *NAME_COLUMNS}:
        read = read_name if column in NAME_COLUMNS else read_text
        try:
            cells[column] = None if is_empty(row[column]) else read(row[column])
        except RowError as error:
            if column in required_columns:
                raise RowError(f"`{column}` {where} {error}") from error
            cells[column] = None
    return cells


def read_recording(row: Mapping[str, object], where: str, source: Source) -> dict[str, str | bytes | None]:
    """
    Returns `{"path", "bytes"}` with an absolute path to an existing file, or with the bytes as they are.

    Args:
        row: Its `audio`: a path, `file.zip:offset:length` in bytes, a mapping with `path`, `bytes` or `array`, or
            samples.
        where: What a message calls the cell.
        source: Of the row.

    Raises:
        RowError: There is no such recording.
        ValueError: The path leads out of the corpus.
    """
    value = row["audio"]
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return {"path": value.get("path"), "bytes": value["bytes"]}
        if value.get("array") is not None:
            return {"path": value.get("path"), "bytes": _encode(value["array"], value.get("sampling_rate"), where)}
        value = value.get("path")
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        rate = next((row[column] for column in RATE_COLUMNS if row.get(column)), None)
        return {"path": None, "bytes": _encode(value, rate, where)}
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where} must be a path or hold bytes, got {value!r:.80}")
    if match := SLICE.fullmatch(value.strip()):
        return {"path": None, "bytes": _read_slice(match, where, source)}
    return {"path": _locate(value, where, source), "bytes": None}


def _encode(samples: object, sampling_rate: object, where: str) -> bytes:
    """Returns samples as the bytes of a wav: floats as they are, whole numbers as those of 16 bits."""
    if not isinstance(sampling_rate, int | float) or not sampling_rate > 0:
        raise RowError(f"{where} must say the rate of its samples in `sampling_rate`, in Hz, got {sampling_rate!r}")
    array = np.asarray(samples)
    is_whole = np.issubdtype(array.dtype, np.integer)
    if not (is_whole or np.issubdtype(array.dtype, np.floating)):
        raise RowError(f"{where} must hold samples, got {samples!r:.80}")
    if is_whole and np.abs(array.astype(float)).max(initial=0) > MAX_WHOLE:
        raise RowError(f"{where} must hold samples of 16 bits or floats in [-1, 1], got larger whole numbers")
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T  # (samples, channels)
    if array.ndim > 2 or (array.ndim == 2 and array.shape[1] > MAX_CHANNELS):
        raise RowError(f"{where} must hold samples of one or a few channels, got an array of shape {array.shape}")
    array = array.astype(np.int16 if is_whole else np.float32)
    file = io.BytesIO()
    scipy.io.wavfile.write(file, int(sampling_rate), array)  # libsndfile would write the time of day, too
    return file.getvalue()


def _read_slice(match: re.Match[str], where: str, source: Source) -> bytes:
    """Returns the bytes of a member that is stored uncompressed in an archive, `file.zip:offset:length`."""
    path, offset, num_bytes = _locate(match[1], where, source), int(match[2]), int(match[3])
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(num_bytes)
    if len(content) < num_bytes or not num_bytes:
        raise RowError(f"{where} must lie inside {path!r}, got {num_bytes} bytes from {offset}")
    if content.startswith(NUMPY_START):
        raise RowError(f"{where} must be a recording, got an array of features; store the audio itself in the archive")
    if not content.startswith(AUDIO_STARTS):
        raise RowError(
            f"{where} must be a recording stored without compression, got other bytes from {offset}; count the offset "
            "from the member's content, behind its header, and write the archive with `zip -0`"
        )
    return content


def _locate(path: str, where: str, source: Source) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|[A-Za-z]:[\\/]|\\\\", path):
        raise RowError(
            f"{where} must be a file here, got {path!r}; copy it and write its path from the corpus's folder"
        )
    if os.path.isabs(path):
        return _locate_absolute(path, where, source)
    found = {file: None for folder in source.folders for file in _find_files(folder, path, where, source)}
    if len(found) > 1:
        raise RowError(f"{where} must be one file, got {path!r}, which is {' and '.join(map(repr, found))}")
    if not found:
        raise RowError(f"{where} must be an existing file, got {path!r}{_explain_missing(path, source)}")
    (file,) = found
    _check_inside(file, path, where, source)
    return file


def _locate_absolute(path: str, where: str, source: Source) -> str:
    located = os.path.normpath(path)
    if not source.is_trusted and not _is_inside(located, source.roots):
        raise ValueError(
            f"{where} must lie in {_list_roots(source)}, got {path!r}. A corpus may not name files elsewhere: write "
            "relative paths, or give the manifest itself as `dataset` if it is yours."
        )
    if not os.path.isfile(located):
        raise RowError(f"{where} must be an existing file, got {path!r}{_explain_missing(path, source)}")
    _check_inside(located, path, where, source)
    return located


def _find_files(folder: Path, path: str, where: str, source: Source) -> list[str]:
    """Returns the files that a relative path can mean below `folder`; of several spellings the first that exists."""
    for spelling in dict.fromkeys([path, path.strip(), path.replace("\\", "/")]):
        named = [spelling]
        if not spelling.lower().endswith(AUDIO_SUFFIXES):
            named += [spelling + suffix for suffix in AUDIO_SUFFIXES]
        files = [os.path.normpath(os.path.join(folder, name)) for name in named]
        if not all(_is_inside(file, source.roots) for file in files):
            raise ValueError(
                f"{where} must lie in {_list_roots(source)}, got {path!r}. Move the file or correct the path."
            )
        if files := [file for file in files if os.path.isfile(file)]:
            return files
        if files := _find_normalized(folder, spelling):
            return files
    return []


def _find_normalized(folder: Path, path: str) -> list[str]:
    """Returns files whose names have the same letters as `path`, composed (NFC) or not."""
    places = [str(folder)]
    for part in Path(path).parts:
        composed = unicodedata.normalize("NFC", part)
        places = [os.path.join(place, name) for place in places for name in _list_composed(place).get(composed, ())]
    return [place for place in places if os.path.isfile(place)]


def _list_composed(folder: str) -> dict[str, list[str]]:
    """Returns the names in a folder by their composed form."""
    try:
        return _list_names(folder, os.stat(folder).st_mtime_ns)
    except OSError:  # no folder
        return {}


@lru_cache(maxsize=16)
def _list_names(folder: str, _changed: int) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {"..": [".."]}
    for name in os.listdir(folder):
        names.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return names


def _check_inside(file: str, path: str, where: str, source: Source) -> None:
    """Raises where a link leads out of a corpus that may not name files elsewhere."""
    if source.is_trusted:
        return
    folder, name = os.path.split(file)
    real = os.path.realpath(file) if os.path.islink(file) else os.path.join(_resolve_folder(folder), name)
    if not _is_inside(real, [_resolve_folder(str(root)) for root in source.roots]):
        raise ValueError(
            f"{where} must lie in {_list_roots(source)}, got {path!r}, a link to {real}. Copy the file, or give the "
            "manifest itself as `dataset` if it is yours."
        )


def _is_inside(path: str, roots: Iterable[str | Path]) -> bool:
    """Returns whether a normal path is below one of `roots`; pathlib's answer takes ten times as long."""
    return any(path.startswith(os.path.join(root, "")) for root in roots)


@lru_cache(maxsize=1024)
def _resolve_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _list_roots(source: Source) -> str:
    return " or ".join(map(str, source.roots)) or "the corpus"


def _explain_missing(path: str, source: Source) -> str:
    """Returns what to write in place of a path, where a file with a similar name is there."""
    if re.search(r"[\x00-\x1f]", path):
        return ", which holds a control character: write / or \\\\ for a backslash"
    for folder in source.folders:
        parent = os.path.join(folder, os.path.dirname(path.replace("\\", "/")))
        name = os.path.basename(path.replace("\\", "/"))
        there = [entry for entries in _list_composed(parent).values() for entry in entries]
        folded = {entry.casefold(): entry for entry in there} | {Path(entry).stem.casefold(): entry for entry in there}
        alike = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.9)
        alike = alike or difflib.get_close_matches(Path(name).stem.casefold(), folded, n=1, cutoff=1.0)
        if alike and folded[alike[0]] != name:
            return f" (there is {folded[alike[0]]!r}: write that)"
    return ""
