"""Tables of people's corpora as rows: CSV in its dialects, TSV, JSON, Parquet, Arrow, compressed or not."""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, IterableDataset

# Columns that say where a recording is, in this order of preference.
AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_filepath", "audio_path", "filename", "src_audio")
TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))
DELIMITERS = (",", ";", "\t", "|")
BATCH_ROWS = 16  # of a table with recordings inside; they are in memory together
NUM_COMPARED = 100  # rows that tell what the columns of a table without a header are
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # Excel's first line
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def is_table(path: Path) -> bool:
    """Returns whether a file's name is one of a table that can be read."""
    return path.name.lower().endswith(TABLE_SUFFIXES)


def read_table(path: Path) -> Iterator[dict[str, object]]:
    """
    Yields the rows of a file as they stand there.

    Args:
        path: `.csv` (split at commas, semicolons, tabs or pipes), `.tsv`, `.json` and `.jsonl` (an object a line, or
            one list of them), each compressed by gzip or not, UTF-8 or with a byte order mark; or `.parquet`.

    Raises:
        ValueError: The file is none of these or damaged; the message says what was found where.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    with _naming(path, suffix):
        if suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            features = Features.from_arrow_schema(file.schema_arrow)
            yield from _read_batches(file.iter_batches(batch_size=BATCH_ROWS), features)
            return
        with open_text(path) as file:
            yield from _read_delimited(file, suffix) if suffix in (".csv", ".tsv") else _read_json(file)


def read_dataset(dataset: Dataset | IterableDataset) -> Iterator[dict[str, object]]:
    """Yields the rows of a dataset without decoding them, the names of classes in place of their numbers."""
    batches = dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)
    yield from _read_batches(batches, dataset.features or {})


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOBase]:
    """Opens a text file, compressed by gzip or not, in UTF-8 or as its byte order mark says."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        mark = file.read(3)
    encoding = next((name for start, name in BYTE_ORDER_MARKS.items() if mark.startswith(start)), "utf-8")
    with opener(path, "rt", encoding=encoding, newline="") as file:
        yield file


@contextmanager
def _naming(path: Path, suffix: str) -> Iterator[None]:
    """Adds the file's name and a remedy to what its readers raise."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path}` must be a UTF-8 {suffix} manifest, got ({error}). Save it as UTF-8, for example with "
            f"`iconv -f WINDOWS-1252 -t UTF-8`, naming the encoding that it has."
        ) from error
    except (csv.Error, json.JSONDecodeError, pyarrow.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"`{path}` must be a UTF-8 {suffix} manifest, got ({error}). Correct the file.") from error


def _read_batches(batches: Iterable, features: Features) -> Iterator[dict[str, object]]:
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    for batch in batches:
        for row in batch.to_pylist():
            names = {name: _name_class(row[name], classes[name]) for name in classes if name in row}
            yield row | names


def _name_class(number: int | None, names: Sequence[str]) -> str | None:
    return None if number is None or number < 0 else names[number]  # -1: not labelled


def _read_json(file: io.TextIOBase) -> Iterator[dict[str, object]]:
    first = next((line for line in file if line.strip()), "")
    rows: Iterable = (json.loads(line) for line in chain([first], file) if line.strip())
    if first.lstrip().startswith("["):
        rows = json.loads(first + file.read())
    for row in rows:
        if not isinstance(row, dict):
            raise csv.Error(f"a row that is no object: {row}")
        yield row


def _read_delimited(file: io.TextIOBase, suffix: str) -> Iterator[dict[str, object]]:
    line = next((line for line in file if line.strip()), "")
    if separator := SEPARATOR_LINE.fullmatch(line.strip()):
        delimiter, line = separator[1], next(file, "")
    else:
        delimiter = _find_delimiter(line, "\t" if suffix == ".tsv" else ",")
    if "\0" in line:
        raise csv.Error("NUL characters, as of UTF-16 without a byte order mark: `iconv -f UTF-16LE -t UTF-8`")
    lines = chain([line] if line else [], file)
    rows = _split_lines(lines, delimiter) if delimiter in "\t|" else _split_csv(lines, delimiter)
    header = _strip_empty(next(rows, []))
    if delimiter == "|" and not _has_audio_column(header):
        yield from _read_without_header(chain([header], rows))
        return
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise csv.Error(f"several columns {repeated[0]!r}; name each differently")
    for number, cells in enumerate(rows, start=1):
        if len(cells) > len(header) and not any(cells[len(header) :]):
            cells = cells[: len(header)]
        if len(cells) != len(header):
            raise csv.Error(
                f"a row whose number of cells is not the header's: row {number} has {len(cells)}, not {len(header)}, "
                f"split at {delimiter!r}: {cells}; put a text that holds {delimiter!r} in quotes"
            )
        yield dict(zip(header, cells, strict=True))


def _strip_empty(header: Sequence[str]) -> list[str]:
    """Returns the names of columns without the empty ones at the end, which a spreadsheet leaves there."""
    names = [name.strip() for name in header]
    while names and not names[-1]:
        names.pop()
    return names


def _find_delimiter(header: str, default: str) -> str:
    """Returns what a header is split at: that which makes one of its columns a recording's."""
    candidates = [default, *DELIMITERS]
    found = (one for one in candidates if _has_audio_column(next(csv.reader([header], delimiter=one), [])))
    # Without a header the lines of LJSpeech and its kind have pipes.
    return next(found, "|" if "|" in header else default)


def _has_audio_column(header: Sequence[str]) -> bool:
    return any(name.strip().casefold() in AUDIO_COLUMNS for name in header)


def _split_lines(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Splits lines whose quotes are characters, but for cells that are quoted as CSV's are."""
    for line in lines:
        if line.strip("\r\n"):
            yield [_unquote(cell) for cell in line.rstrip("\r\n").split(delimiter)]


def _unquote(cell: str) -> str:
    """Takes the quotes off a cell that has them at both ends and, inside, doubled ones only."""
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _split_csv(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    # A sentence that opens a quote and does not close it would swallow the rows up to the next quote.
    for cells in csv.reader(lines, delimiter=delimiter, strict=True):
        for cell in cells:
            if any(part.count(delimiter) >= len(cells) - 1 > 0 for part in re.split(r"[\r\n]+", cell)[1:]):
                raise csv.Error(f"a cell that has other rows inside: {cell[:80]!r}; double its quotes or remove them")
        if cells:
            yield cells


def _read_without_header(rows: Iterable[list[str]]) -> Iterator[dict[str, object]]:
    """Yields the rows of LJSpeech and its kind: a file's name, the transcript, and it once more, written out."""
    rows = iter(rows)
    first = list(islice(rows, NUM_COMPARED))
    num_cells = len(first[0])
    alike = sum(bool(set(cells[1].lower().split()) & set(cells[-1].lower().split())) for cells in first if cells[1:])
    if num_cells not in (2, 3) or 2 * alike < len(first):
        raise csv.Error(
            f"columns without names: {first[0]}; write a first line that names them, such as path|speaker_id|text"
        )
    for number, cells in enumerate(chain(first, rows), start=1):
        if len(cells) != num_cells:
            raise csv.Error(f"a row whose number of cells is not the first's, row {number}: {cells}")
        yield {"path": cells[0], "text": cells[-1] or cells[1]}
