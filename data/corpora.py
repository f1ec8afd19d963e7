"""Every corpus as one `datasets.Dataset` with the same columns, found once and checked once."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice, zip_longest
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import xxhash
from datasets import Audio, Dataset, Features, IterableDataset, Value
from filelock import FileLock

from data.audio import MIX, audio_seconds, parse_channel
from data.code_digest import digest_code
from data.hub_corpora import download_recordings, list_cache_folders, open_tables
from data.layouts import CHOICES, find_file_source, find_folder_sources, list_parquet, make_dataset_source
from data.left_out import StreamedRows, report_left_out
from data.parallel_synthesis import SOURCES, write_parallel_corpus
from data.rows import (
    NAME_COLUMNS,
    TEXT_COLUMNS,
    RowError,
    Source,
    check_columns,
    find_renames,
    is_empty,
    read_cells,
    read_recording,
)
from data.segments import Cutter, cut_part
from data.synthesis import LANGUAGES, write_synthetic_corpus
from data.tables import TABLE_SUFFIXES
from data.translation_rows import check_source_frames, read_target

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = "train"  # of rows that name none
# Examples on their way into a dataset are encoded, and the `Audio` feature needs torchcodec for that even when it does
# not decode; a finished table is cast without.
UNDECODED_AUDIO = {"path": Value("string"), "bytes": Value("binary")}
RECORDING_COLUMNS = ("audio", "target_audio")
STRING_COLUMNS = (*TEXT_COLUMNS, *NAME_COLUMNS, "split")
NUM_TYPED_ROWS = 100  # rows whose values tell a streamed corpus's column types
# The embedded corpora: their languages and who writes them.
SYNTHETIC = {
    "synthetic": (LANGUAGES, write_synthetic_corpus),
    "synthetic_s2st": (SOURCES, write_parallel_corpus),
}
LEFT_OUT = {"what": "rows cannot be used", "remedy": "Correct them or remove the rows."}


def load_corpus(
    dataset: str,
    *,
    split: str | None = None,
    dataset_config: str | None = None,
    text_column: str | None = None,
    required_columns: Sequence[str] = ("audio",),
    streaming: bool = False,
    channel: str = MIX,
) -> Dataset | IterableDataset:
    """
    Returns a corpus whose column `audio` holds undecoded recordings, `{"path": absolute path or None, "bytes": ...}`.

    Args:
        dataset: One of
            - "synthetic" or "synthetic/<language>": espeak-ng voices, made on first use in the datasets cache,
            - "synthetic_s2st/<language>": Spanish ("es") or Korean ("ko") with its English, made likewise,
            - a folder with `metadata.csv` or `.jsonl`, or with one in each split's sub-folder (column `file_name`), or
              in another layout of `data.layouts`,
            - a manifest .csv, .tsv, .jsonl or .parquet (column `audio`, `file_name` or `path`, relative to it),
            - a name on the Hub, or a folder with a Hub corpus's parquet files; a Hub corpus of single recordings is
              downloaded whole.
        split: Rows whose column `split` has this value; all rows by default. Rows that name none are "train".
        dataset_config: Of a Hub corpus with several configurations, the one that is read.
        text_column: The column that is `text`; default: `text`, `sentence`, `transcription` or `transcript`.
        required_columns: Columns that must exist, with a value in every row of the split.
        streaming: Gives an `IterableDataset` that reads rows, and checks them, while they are used.
        channel: "left", "right" or a number from 1 takes this channel of every recording; "mix" averages them.

    Returns:
        The rows with the columns of `data.rows.KEPT_COLUMNS` that there are, and the required ones; columns that
        other projects call differently are renamed (`data.rows.RENAMED_COLUMNS`). `speaker_id` and `domain`, the kind
        of recording, are strings, `units` lists of numbers, `target_audio` recordings as `audio` is. A row with
        `offset` and `duration`, `start` and `end`, or `begin_time` and `end_time` in seconds hears that part of its
        recording. The fingerprint follows the recordings' sizes and times of change, so that features computed from
        an older recording are not found in the cache. Rows that lack a value or a recording are left out with a
        warning, up to 5 % of them.

    Raises:
        ValueError: The corpus, split or a required column does not exist, more than 5 % of the rows lack a value or a
            recording, a recording lies outside the corpus, no row is left, or `channel` names none.

    Example:
        >>> load_corpus("synthetic/ko", split="test").column_names
        ['speaker_id', 'text', 'split', 'domain', 'audio']
    """
    parse_channel(channel)
    if dataset.split("/")[0] in SYNTHETIC:
        dataset = str(_make_synthetic(dataset))
    sources = _find_sources(dataset, dataset_config, text_column, streaming)
    columns = ("audio", *(column for column in required_columns if column != "audio"))
    arguments = {"sources": sources, "split": split, "text_column": text_column, "required_columns": columns}
    if streaming:
        return _stream(dataset, arguments, channel)
    summary = _Summary()
    for row, part in _iterate_rows(**arguments, note=summary.note):
        summary.add(row, part)
    report_left_out(summary.reasons, summary.num_rows + len(summary.reasons), **LEFT_OUT)
    if not summary.num_rows:
        raise _no_rows_error(dataset, sources, split)
    features = _infer_features(summary.values, required_columns, dataset)
    # A file in the cache, and not a table in memory, because only then `map` keeps what it computes.
    corpus = Dataset.from_generator(
        lambda: _iterate_examples(**arguments, names=tuple(features), channel=channel, note=_say_nothing),
        features=features,
        fingerprint=summary.digest(features, channel),
    )
    for column in RECORDING_COLUMNS:
        corpus = corpus.cast_column(column, Audio(decode=False)) if column in features else corpus
    return corpus


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
        The taken rows in the order of taking, with a column `seconds` of their durations.

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
    if "seconds" in corpus.column_names:
        corpus = corpus.remove_columns("seconds")
    return corpus.select(taken).add_column("seconds", [seconds[index] for index in taken])


def _make_synthetic(dataset: str) -> Path:
    name, _, language = dataset.partition("/")
    languages, write = SYNTHETIC[name]
    language = language or languages[0]
    if language not in languages:
        choices = ", ".join(f'"{name}/{choice}"' for choice in languages)
        raise ValueError(f"`dataset` must be one of {choices}, got {dataset!r}. Choose one of them.")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"speech_adapter_{name}_{language}_{digest_code(write)}"
    with FileLock(f"{folder}.lock"):  # the processes of one training start together
        if not folder.exists():
            write(folder, language=language)
    return folder


def _find_sources(dataset: str, dataset_config: str | None, text_column: str | None, streaming: bool) -> list[Source]:
    path = Path(os.path.abspath(os.path.expanduser(dataset)))
    if path.is_file():
        _refuse_config(dataset, dataset_config)
        return [find_file_source(path)]
    if path.is_dir():
        folder, own_config = (path / dataset_config, None) if dataset_config else (path, None)
        folder, own_config = (folder, None) if folder.is_dir() else (path, dataset_config)
        sources = find_folder_sources(folder, text_column)
        if sources:
            _refuse_config(dataset, own_config)
            return sources
        splits = open_tables(str(path), dataset_config, streaming=streaming)
        folders = tuple(dict.fromkeys([path, *(file.parent for file in list_parquet(path))]))
        return [make_dataset_source(part, str(path), split, folders, (path,)) for split, part in splits.items()]
    if dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1 or dataset.lower().endswith(TABLE_SUFFIXES):
        raise ValueError(f"`dataset` must be a corpus, got {dataset}, which does not exist. {CHOICES}")
    folder = download_recordings(dataset)
    if folder is not None:
        _refuse_config(dataset, dataset_config)
        repository = folder.parents[1]  # its files may be links into the part that all revisions share
        return [replace(source, roots=(repository,)) for source in find_folder_sources(folder, text_column)]
    splits = open_tables(dataset, dataset_config, streaming=streaming)
    return [make_dataset_source(part, dataset, split, (), list_cache_folders()) for split, part in splits.items()]


def _refuse_config(dataset: str, dataset_config: str | None) -> None:
    if dataset_config is not None:
        raise ValueError(
            f"`dataset_config` must be left out for {dataset}, which has no configurations, got {dataset_config!r}."
        )


def _iterate_rows(
    sources: Sequence[Source],
    split: str | None,
    text_column: str | None,
    required_columns: Sequence[str],
    note: Callable[[str | None], None],
) -> Iterator[tuple[dict[str, object], tuple[float, float] | None]]:
    """
    Yields the checked rows of one split in the project's columns, each with the part of its recording that it hears.

    Args:
        note: Called for every row, with what is wrong if it cannot be used.
    """
    cutter = Cutter()
    for source in sources:
        if source.has_fixed_split and split not in (None, source.default_split):
            continue
        for number, cells in enumerate(source.read(), start=1):
            renames = find_renames(tuple(cells), text_column, source.name)
            row = {renames[column]: value for column, value in cells.items() if column in renames}
            row["split"] = _find_split(row, source)
            if split not in (None, row["split"]):
                continue
            check_columns(required_columns, row, source.name)
            where = f"row {number} in {source.name}"  # a header is not counted
            try:
                kept = read_cells(row, required_columns, f"of {where}")
                kept["audio"] = read_recording(row, f"`audio` of {where}", source)
                part = cutter.find_part(row, kept["audio"], where, is_nemo="audio_filepath" in cells)
                check_source_frames(row, kept["audio"], part, where)
                kept |= read_target(row, required_columns, where, source)
            except RowError as error:
                note(str(error))
                continue
            note(None)
            yield kept, part


def _find_split(row: Mapping[str, object], source: Source) -> str:
    return source.default_split if is_empty(row.get("split")) else str(row["split"])


def _iterate_examples(
    names: Sequence[str], channel: str, note: Callable[[str | None], None] | None = None, **arguments
) -> Iterator[dict[str, object]]:
    """Yields the examples of a dataset with columns `names`; without `note`, of a stream, which counts for itself."""
    note = note or StreamedRows(**LEFT_OUT).note
    for row, part in _iterate_rows(**arguments, note=note):
        row["audio"] = cut_part(row["audio"], part, channel)
        yield {name: row.get(name) for name in names}


def _say_nothing(_reason: str | None) -> None:
    """Stands where rows that are left out have been named before."""


class _Summary:
    """What the first pass over a corpus finds: how many rows, which are left out, their types, and a digest."""

    def __init__(self):
        self.num_rows = 0
        self.reasons: list[str] = []
        self.values: dict[str, list] = {}  # of the columns that are not text; `None` would cost as much
        self._digest = xxhash.xxh3_128()

    def note(self, reason: str | None) -> None:
        """Keeps what is wrong with a row."""
        if reason is not None:
            self.reasons.append(reason)

    def add(self, row: Mapping[str, object], part: tuple[float, float] | None) -> None:
        """Counts a row that is used."""
        others = {name: value for name, value in row.items() if name not in RECORDING_COLUMNS}
        recordings = [_describe_recording(row[name]) for name in RECORDING_COLUMNS if row.get(name) is not None]
        self._digest.update(repr((others, *recordings, part)).encode())
        for name, value in row.items():
            column = self.values.setdefault(name, [])
            if name in others and name not in STRING_COLUMNS:
                column.append(value)
        self.num_rows += 1

    def digest(self, features: Features, channel: str) -> str:
        """Returns 32 hexadecimal digits over all rows that are used, and the channel that is."""
        self._digest.update(repr((features, channel)).encode())
        return self._digest.hexdigest()


def _describe_recording(audio: Mapping) -> tuple:
    """Returns what changes when a recording does."""
    if audio["bytes"] is not None:
        return audio["path"], xxhash.xxh3_128_hexdigest(audio["bytes"])
    status = os.stat(audio["path"])
    return audio["path"], (status.st_size, status.st_mtime_ns)


def _stream(dataset: str, arguments: dict, channel: str) -> IterableDataset:
    summary = _Summary()
    for row, part in islice(_iterate_rows(**arguments, note=summary.note), NUM_TYPED_ROWS):
        summary.add(row, part)
    if summary.num_rows < NUM_TYPED_ROWS:
        report_left_out(summary.reasons, summary.num_rows + len(summary.reasons), **LEFT_OUT)
    if not summary.num_rows:
        raise _no_rows_error(dataset, arguments["sources"], arguments["split"])
    features = _infer_features(summary.values, arguments["required_columns"], dataset)
    arguments = {**arguments, "names": tuple(features), "channel": channel}
    return IterableDataset.from_generator(_iterate_examples, features=features, gen_kwargs=arguments)


def _no_rows_error(dataset: str, sources: Sequence[Source], split: str | None) -> ValueError:
    splits = {source.default_split for source in sources if source.has_fixed_split}
    for source in (source for source in sources if not source.has_fixed_split):
        splits |= {_find_split(row, source) for row in source.read()}
    if split is None or not splits or split in splits:
        return ValueError(
            f"`dataset` must have rows, got the empty corpus {dataset}. Add rows or name another corpus."
        )
    remedy = "Choose one of them."
    if splits == {DEFAULT_SPLIT}:
        remedy += " Rows to evaluate on must not be trained on: give them another `split`."
    return ValueError(f"`split` must be one of {', '.join(sorted(splits))} in {dataset}, got {split!r}. {remedy}")


def _infer_features(values: Mapping[str, list], required_columns: Sequence[str], name: str) -> Features:
    features = {}
    for column, cells in values.items():
        if column == "audio":
            continue
        if column in STRING_COLUMNS:
            features[column] = Value("string")
            continue
        if column in RECORDING_COLUMNS:
            features[column] = UNDECODED_AUDIO
            continue
        try:
            features |= Features.from_arrow_schema(pyarrow.schema([(column, pyarrow.array(cells).type)]))
        except (pyarrow.ArrowException, OverflowError) as error:
            if column in required_columns:
                raise ValueError(
                    f"`{column}` of {name} must hold one type, got ({error}). Correct the column."
                ) from error
            logger.warning("Column %r of %s is left out: its cells are not of one type (%s).", column, name, error)
    return Features(features | {"audio": UNDECODED_AUDIO})
