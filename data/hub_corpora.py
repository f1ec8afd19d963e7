"""Corpora that `datasets` reads: tables of the Hub or in a folder, by configuration and split."""

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import huggingface_hub.constants
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download
from pyarrow import ArrowException

from data.layouts import CHOICES, METADATA_NAMES

FAILURES = (ValueError, OSError, RuntimeError, TypeError, DatasetsError, ArrowException)
MAX_CAUSE = 400  # characters of another library's message


def open_tables(name: str, dataset_config: str | None, *, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    """
    Returns the splits of a corpus of tables.

    Args:
        name: On the Hub, or a folder of Parquet files.
        dataset_config: The configuration, of a corpus with several.
        streaming: Read rows while they are used.

    Raises:
        ValueError: There is no such corpus or configuration, or it cannot be read; the message says which.
    """
    try:
        return dict(datasets.load_dataset(name, dataset_config, streaming=streaming))
    except FAILURES as error:
        configs = _list_configs(name)
        if configs and (dataset_config not in configs if dataset_config else len(configs) > 1):
            raise ValueError(
                f"`dataset_config` must be one of {', '.join(configs)} for {name}, got {dataset_config}. "
                "Choose one of them."
            ) from error
        cause = " ".join(str(error.__cause__ or error).split())[:MAX_CAUSE]
        raise ValueError(f"`dataset` must be a corpus that can be read, got {name!r} ({cause}). {CHOICES}") from error


def _list_configs(name: str) -> Sequence[str]:
    try:
        return datasets.get_dataset_config_names(name)
    except FAILURES:
        return []


def download_recordings(name: str) -> Path | None:
    """
    Returns the folder of a Hub corpus of single recordings, downloaded whole; None for one of tables.

    `datasets` cannot read such a corpus without torchcodec.

    Raises:
        ValueError: There is no such corpus, or no access to it.
    """
    patterns = [pattern for metadata in METADATA_NAMES for pattern in (metadata, f"*/{metadata}")]
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
        if not any(path.is_file() for pattern in patterns for path in folder.glob(pattern)):
            return None
        return Path(snapshot_download(name, repo_type="dataset"))
    except (ValueError, OSError) as error:  # not a repository's name; no such corpus, no access, or no network
        raise ValueError(f"`dataset` must be a corpus, got {name!r} ({error}). {CHOICES}") from error


def list_cache_folders() -> tuple[Path, ...]:
    """Returns the folders below which files are that came from the Hub."""
    folders = (huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    return tuple(Path(os.path.abspath(folder)) for folder in folders)
