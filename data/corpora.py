"""Every corpus as one `datasets.Dataset` with the same columns, found once and checked once."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Audio, Dataset, Features, IterableDataset, Value
from filelock import FileLock
from huggingface_hub import snapshot_download

from data.audio import audio_seconds
from data.code_digest import digest_code
from data.synthesis import LANGUAGES, write_synthetic_corpus

AUDIO_COLUMNS = ("audio", "file_name", "path")  # in this order of preference
RENAMED_COLUMNS = {
    "sentence": "text",
    "transcription": "text",
    "transcript": "text",
    "speaker": "speaker_id",
    "client_id": "speaker_id",
}
STRING_COLUMNS = ("speaker_id", "domain")  # names, even where a corpus writes them as numbers
MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # those of the audiofolder convention
CHOICES = "Give a manifest (.csv, .tsv, .jsonl, .parquet), a folder with metadata.csv, a Hub name, or `synthetic`."
DEFAULT_SPLIT = "train"  # of rows that name none
# Examples on their way into a dataset are encoded, and the `Audio` feature needs torchcodec for that even when it does
# not decode; a finished table is cast without.
UNDECODED_AUDIO = {"path": Value("string"), "bytes": Value("binary")}
NUM_TYPED_ROWS = 100  # rows whose values tell a streamed manifest's column types


def load_corpus(
    dataset: str,
    *,
    split: str | None = None,
    required_columns: Sequence[str] = ("audio",),
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    Returns a corpus whose column `audio` holds undecoded recordings, `{"path": absolute path or None, "bytes": ...}`.

    Args:
        dataset: One of
            - "synthetic" or "synthetic/<language>": espeak-ng voices, made on first use in the datasets cache,
            - a folder with `metadata.csv` or `.jsonl`, or with one in each split's sub-folder (column `file_name`),
            - a manifest .csv, .tsv, .jsonl or .parquet (column `audio`, `file_name` or `path`, relative to it),
            - a name on the Hub, or a folder with a Hub corpus's parquet files; a Hub corpus of single recordings is
              downloaded whole.
        split: Rows whose column `split` has this value; all rows by default. Rows that name none are "train".
        required_columns: Columns that must exist, with a value in every row of the split.
        streaming: Gives an `IterableDataset` that reads rows, and checks them, while they are used.

    Returns:
        The rows with all their columns; `sentence`, `transcription` and `transcript` are renamed to `text`, `speaker`
        and `client_id` to `speaker_id`; that and `domain`, the kind of recording, are strings. The fingerprint follows
        the recordings' sizes and times of change, so that features computed from an older recording are not found in
        the cache.

    Raises:
        ValueError: The corpus, split or a required column does not exist, a row lacks a value, its recording is
            missing or lies outside the corpus through "..", or no row is left.

    Example:
        >>> load_corpus("synthetic/ko", split="test").column_names
        ['speaker_id', 'text', 'split', 'domain', 'voice', 'audio']
    """
    if dataset.split("/")[0] == "synthetic":
        dataset = str(_make_synthetic(dataset))
    manifests = _find_manifests(dataset)
    if not manifests:
        return _load_tables(dataset, split, required_columns, streaming)
    if streaming:
        return _stream_manifests(manifests, split, required_columns)
    rows = list(_iterate_rows(manifests, split, required_columns))
    if not rows:
        raise _no_rows_error(dataset, manifests, split)
    # A file in the cache, and not a table in memory, because only then `map` keeps what it computes.
    corpus = Dataset.from_generator(
        lambda: iter(rows), features=_infer_features(rows, dataset), fingerprint=_hash_rows(rows)
    )
    return corpus.cast_column("audio", Audio(decode=False))


def take_seconds(corpus: Dataset, max_seconds: float, *, seed: int) -> Dataset:
    """
    Returns at most `max_seconds` of speech that cover as many different transcripts as possible.

    The rows are shuffled; then each distinct transcript gives one clip in turn, as a person does who reads a list of
    prompts again and again. A clip that no longer fits is passed over.

    Args:
        corpus: Dataset with a column `audio` and, for the turns, a column `text`.
        max_seconds: Budget in seconds.
        seed: Seed of the shuffle.

    Returns:
        The taken rows in the order of taking, with a column `seconds`.

    Raises:
        ValueError: `max_seconds` is not positive, or every clip is longer.
    """
    if not max_seconds > 0:
        raise ValueError(f"`max_seconds` must be positive, got {max_seconds}. Give the seconds of speech to use.")
    sources = corpus["audio"][:]
    seconds = [audio_seconds(source) for source in sources]
    texts = corpus["text"][:] if "text" in corpus.column_names else range(len(corpus))
    turns: dict[str | int, list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(corpus)).tolist():
        turns.setdefault(texts[index], []).append(index)
    taken, taken_seconds = [], 0.0
    for index in chain.from_iterable(zip_longest(*turns.values())):
        if index is not None and taken_seconds + seconds[index] <= max_seconds:
            taken.append(index)
            taken_seconds += seconds[index]
    if not taken:
        shortest = int(np.argmin(seconds))
        raise ValueError(
            f"`max_seconds` must be at least {seconds[shortest]:.2f}, the seconds of the shortest clip "
            f"({sources[shortest]['path']}), got {max_seconds}. Raise it or cut the clips."
        )
    return corpus.select(taken).add_column("seconds", [seconds[index] for index in taken])


@dataclass(frozen=True)
class _Manifest:
    path: Path
    corpus_folder: Path  # recordings may not lie outside it
    default_split: str


def _make_synthetic(dataset: str) -> Path:
    language = dataset.partition("/")[2] or LANGUAGES[0]
    if language not in LANGUAGES:
        choices = ", ".join(f'"synthetic/{choice}"' for choice in LANGUAGES)
        raise ValueError(f"`dataset` must be one of {choices}, got {dataset!r}. Choose one of them.")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"speech_adapter_synthetic_{language}_{digest_code(write_synthetic_corpus)}"
    with FileLock(f"{folder}.lock"):  # the processes of one training start together
        if not folder.exists():
            write_synthetic_corpus(folder, language=language)
    return folder


def _find_manifests(dataset: str) -> list[_Manifest]:
    """Returns the manifests behind a local name; none where `datasets` has to find the data."""
    path = Path(os.path.abspath(Path(dataset).expanduser()))
    if path.is_file():
        if path.suffix not in MANIFEST_SUFFIXES:
            raise ValueError(f"`dataset` must be a corpus, got the file {dataset}. {CHOICES}")
        return [_Manifest(path, path.parent, DEFAULT_SPLIT)]
    if path.is_dir():
        manifests = _list_metadata(path)
        if not manifests and not any((*path.glob("*.parquet"), *path.glob("*/*.parquet"))):
            raise ValueError(f"`dataset` must be a corpus, got the folder {dataset} without metadata. {CHOICES}")
        return manifests
    if dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1 or dataset.endswith(MANIFEST_SUFFIXES):
        raise ValueError(f"`dataset` must be a corpus, got {dataset}, which does not exist. {CHOICES}")
    return _download_recordings(dataset)


def _list_metadata(folder: Path) -> list[_Manifest]:
    for name in METADATA_NAMES:
        if (folder / name).is_file():
            return [_Manifest(folder / name, folder, DEFAULT_SPLIT)]
    in_splits = [path for name in METADATA_NAMES for path in sorted(folder.glob(f"*/{name}"))]
    return [_Manifest(path, folder, path.parent.name) for path in in_splits]


def _download_recordings(name: str) -> list[_Manifest]:
    """Returns the manifests of a Hub corpus of single recordings, which `datasets` cannot read without torchcodec."""
    patterns = [pattern for metadata in METADATA_NAMES for pattern in (metadata, f"*/{metadata}")]
    try:
        manifests = _list_metadata(Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns)))
        if manifests:
            snapshot_download(name, repo_type="dataset")
    except (ValueError, OSError) as error:  # not a repository's name; no such corpus, no access, or no network
        raise ValueError(f"`dataset` must be a corpus, got {name!r} ({error}). {CHOICES}") from error
    return manifests


def _stream_manifests(
    manifests: list[_Manifest], split: str | None, required_columns: Sequence[str]
) -> IterableDataset:
    arguments = {"manifests": manifests, "split": split, "required_columns": tuple(required_columns)}
    first_rows = list(islice(_iterate_rows(**arguments), NUM_TYPED_ROWS))
    if not first_rows:
        raise _no_rows_error(str(manifests[0].corpus_folder), manifests, split)
    features = _infer_features(first_rows, str(manifests[0].path))
    return IterableDataset.from_generator(_iterate_rows, features=features, gen_kwargs=arguments)


def _iterate_rows(
    manifests: list[_Manifest], split: str | None, required_columns: Sequence[str]
) -> Iterator[dict[str, object]]:
    """Yields the checked rows of one split, in the project's columns."""
    for manifest in manifests:
        for number, row in enumerate(_read_rows(manifest), start=1):
            if split is None or row["split"] == split:
                _check_columns(["audio", *required_columns], row, str(manifest.path))
                yield _check_row(row, number, manifest, required_columns)


def _read_rows(manifest: _Manifest) -> Iterator[dict[str, object]]:
    """Yields a manifest's rows as they are, but with the project's column names and a split."""
    path = manifest.path
    try:
        for row in _parse_rows(path):
            audio_column = next((name for name in AUDIO_COLUMNS if name in row), None)
            renames = {audio_column: "audio"} | _find_renames(row)
            row = {renames.get(name, name): value for name, value in row.items()}
            yield row | {"split": str(row.get("split") or manifest.default_split)}
    except (csv.Error, json.JSONDecodeError, UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        raise ValueError(
            f"`{path}` must be a UTF-8 {path.suffix} manifest, got ({error}). Correct the file."
        ) from error


def _parse_rows(path: Path) -> Iterator[dict[str, object]]:
    if path.suffix == ".parquet":
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            for row in (json.loads(line) for line in file if line.strip()):
                if not isinstance(row, dict):
                    raise csv.Error(f"a row that is no object: {row}")
                yield row
            return
        for row in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","):
            if None in row or None in row.values():
                raise csv.Error(f"a row whose number of cells is not the header's: {list(row.values())}")
            yield row


def _find_renames(columns: Iterable[str]) -> dict[str, str]:
    """Returns old to new names; the first of several old ones, and none where the corpus has the new name already."""
    renames: dict[str, str] = {}
    for old, new in RENAMED_COLUMNS.items():
        if old in columns and new not in columns and new not in renames.values():
            renames[old] = new
    return renames


def _check_columns(required_columns: Iterable[str], columns: Iterable[str], name: str) -> None:
    for column in required_columns:
        if column not in columns:
            also = f" (or {', '.join(AUDIO_COLUMNS[1:])})" if column == "audio" else ""
            raise ValueError(
                f"`{column}`{also} must be a column of {name}, got the columns {', '.join(columns)}. Add or rename it."
            )


def _check_row(
    row: dict[str, object], number: int, manifest: _Manifest, required_columns: Sequence[str]
) -> dict[str, object]:
    where = f"of row {number} in {manifest.path}"  # the header is not counted
    for column in required_columns:
        if row[column] is None or not str(row[column]).strip():
            raise ValueError(f"`{column}` {where} must not be empty. Fill it in or remove the row.")
    row = {**row, "audio": _locate_audio(row["audio"], f"`audio` {where}", manifest)}
    for column in {"text", *STRING_COLUMNS} & row.keys():
        row[column] = None if row[column] is None else str(row[column])
    return row


def _locate_audio(value: object, where: str, manifest: _Manifest) -> dict[str, str | bytes | None]:
    """Returns `{"path", "bytes"}` with an absolute path to an existing file, or with the bytes as they are."""
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, Mapping) else (value, None)
    if content is not None:
        return {"path": path, "bytes": content}
    if not path or not isinstance(path, str):
        raise ValueError(f"{where} must be a path or hold bytes, got {value!r}. Fill it in or remove the row.")
    located = os.path.normpath(manifest.path.parent / path)
    if not os.path.isabs(path) and not Path(located).is_relative_to(manifest.corpus_folder):
        raise ValueError(
            f"{where} must lie in {manifest.corpus_folder}, got {path!r}. Move the file or correct the path."
        )
    if not os.path.isfile(located):
        raise ValueError(f"{where} must be an existing file, got {path!r}. Add the file or remove the row.")
    return {"path": located, "bytes": None}


def _no_rows_error(dataset: str, manifests: list[_Manifest], split: str | None) -> ValueError:
    splits = sorted({str(row["split"]) for manifest in manifests for row in _read_rows(manifest)})
    if not splits:
        return ValueError(
            f"`dataset` must have rows, got the empty corpus {dataset}. Add rows or name another corpus."
        )
    return ValueError(f"`split` must be one of {', '.join(splits)} in {dataset}, got {split!r}. Choose one of them.")


def _infer_features(rows: list[dict[str, object]], name: str) -> Features:
    features = {}
    for column in {column: None for row in rows for column in row if column != "audio"}:
        try:
            schema = pyarrow.schema([(column, pyarrow.array([row.get(column) for row in rows]).type)])
        except pyarrow.ArrowException as error:
            raise ValueError(f"`{column}` of {name} must hold one type, got ({error}). Correct the column.") from error
        features |= Features.from_arrow_schema(schema)
    return Features(features | {"audio": UNDECODED_AUDIO})


def _hash_rows(rows: list[dict[str, object]]) -> str:
    paths = [row["audio"]["path"] for row in rows if row["audio"]["bytes"] is None]
    states = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
    return hashlib.blake2b(repr((rows, states)).encode(), digest_size=16).hexdigest()


def _load_tables(
    name: str, split: str | None, required_columns: Sequence[str], streaming: bool
) -> Dataset | IterableDataset:
    try:
        corpus = datasets.load_dataset(name, split=split, streaming=streaming)
    except (ValueError, OSError) as error:
        message = f"`split` must be one that {name} has, got {split!r} ({error}). Choose another split or corpus."
        raise ValueError(message) from error
    if isinstance(corpus, dict):
        corpus = datasets.concatenate_datasets(list(corpus.values()))
    columns = list(corpus.features or next(iter(corpus), ()))
    renames = _find_renames(columns)
    columns = [renames.get(column, column) for column in columns]
    _check_columns(["audio", *required_columns], columns, name)
    # Cast first: renaming streamed rows passes them through the features they have, which would decode them.
    corpus = corpus.cast_column("audio", UNDECODED_AUDIO if streaming else Audio(decode=False)).rename_columns(renames)
    for column in sorted(set(STRING_COLUMNS) & set(columns)):
        corpus = corpus.cast_column(column, Value("string"))
    if not streaming:  # `load_dataset` itself refuses a table without rows
        _check_texts(corpus, name, required_columns)
    elif next(iter(corpus), None) is None:
        raise ValueError(f"`dataset` must have rows, got the empty corpus {name}. Name another corpus or split.")
    return corpus


def _check_texts(corpus: Dataset, name: str, required_columns: Sequence[str]) -> None:
    if "text" in required_columns:
        for number, text in enumerate(corpus["text"], start=1):
            if not (text or "").strip():
                raise ValueError(f"`text` of row {number} in {name} must not be empty. Filter the row out.")
