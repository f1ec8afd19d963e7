"""States of a model's frozen part, computed once for every utterance and read from a memory-mapped file afterwards."""

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import huggingface_hub.constants
import torch
import xxhash
from filelock import FileLock
from safetensors import safe_open
from tqdm.auto import tqdm

from .cache_file import TABLES, CacheWriter, find_cache_damage
from .code_digest import digest_code

logger = logging.getLogger(__name__)

CACHE_NAME = "states.safetensors"
# Files that a run is writing, or was writing when it was killed.
SCRATCH_PREFIX = ".writing-"
# Part of every key: raised when the same key would stand for other content.
VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Returns the states `(batch, frames, width)` of a batch by name, and their lengths `(batch,)` in frames.
Run = Callable[[dict], tuple[dict[str, torch.Tensor], torch.Tensor]]


class CacheableUtterances(Protocol):
    """
    What a cache asks of a dataset: utterances that are drawn by seed and epoch, and what they are made of.

    Attributes:
        samples_digest: Digest of all samples.
        groups: Which clips make each utterance, in this epoch.
        references: The transcript of each utterance.
        labels: Its tokens.
        lengths: How long each is, in any unit: they are computed longest first.
        augmentation: A dataclass with `changes`, whether it does anything; or none.
        seed: Of all that is drawn.
        epoch: The one that is drawn.
        is_random: Whether epochs differ.
    """

    samples_digest: str
    groups: Sequence[Sequence[int]]
    references: Sequence[str]
    labels: Sequence[Sequence[int]]
    lengths: Sequence[int]
    augmentation: object | None
    seed: int
    epoch: int
    is_random: bool

    def set_epoch(self, epoch: int) -> None:
        """Draws the utterances of an epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def resolve_cache_folder(folder: str | Path | None = None) -> Path:
    """Returns where caches are: `folder`, by default `frozen_features` in the Hugging Face cache (`HF_HOME`)."""
    return Path(folder or Path(huggingface_hub.constants.HF_HOME, "frozen_features")).expanduser()


def digest_utterances(dataset: CacheableUtterances) -> str:
    """
    Returns 32 hexadecimal digits over everything of the data that the utterances of this epoch are made of.

    Samples, transcripts, which clips come together, in which order, and, where they are drawn, the augmentation with
    seed and epoch. The feature extractor is not part of it.
    """
    content = {"samples": dataset.samples_digest, "groups": dataset.groups, "references": dataset.references}
    if dataset.augmentation is not None and dataset.augmentation.changes:
        content |= {"augmentation": asdict(dataset.augmentation), "seed": dataset.seed, "epoch": dataset.epoch}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


class FeatureCache:
    """
    States of utterances in a memory-mapped file; item `index` is a dict of views `(frames, width)`, not copies.

    What is read stays in the system's file cache and not in the process, however large the file is.

    Args:
        path: Whole file from [`build_cache`].

    Attributes:
        lengths (`list[int]`): Frames of every utterance.
        num_frames (`int`): Frames of all of them.
        nbytes (`int`): Size of the file.
        dtype (`torch.dtype`): Of the states.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with safe_open(self.path, framework="pt") as file:
            self._states = {name: file.get_tensor(name) for name in file.offset_keys() if name not in TABLES}
            self.lengths, self._starts = (file.get_tensor(name).tolist() for name in TABLES)
        self.num_frames, self.nbytes = sum(self.lengths), self.path.stat().st_size
        self.dtype = next(iter(self._states.values())).dtype

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self._starts[index]
        return {name: value[start : start + self.lengths[index]] for name, value in self._states.items()}

    def __reduce__(self):
        return FeatureCache, (self.path,)  # another process maps the file itself


def build_cache(
    dataset: CacheableUtterances,
    run: Run,
    *,
    collate: Callable[[list[dict]], dict],
    key: Mapping[str, object],
    folder: str | Path,
    batch_size: int,
    dtype: str = "float32",
) -> FeatureCache:
    """
    Returns the cached states of every utterance, computed where no whole cache of the same content is in `folder`.

    A cache is found by the hash of its key and checked to the last byte. One that is damaged is built anew, with a
    warning that says what is wrong. Of several processes that want the same cache one builds and the others wait.

    Args:
        dataset: Utterances of the epoch that it is set to.
        run: Returns states `(batch, frames, width)` by name and their lengths `(batch,)`; called under inference mode
            with batches of similar length, the longest first.
        collate: Makes a batch of utterances.
        key: What the states depend on beside the utterances and the code of the arguments above: weights, processor,
            the code of both; anything JSON can hold.
        folder: Where all caches are, as from [`resolve_cache_folder`].
        batch_size: Utterances that `run` is given together.
        dtype: "float32" or "bfloat16", which halves the file.

    Raises:
        ValueError: `dtype` is another, `batch_size` is below 1, or `run` does not return what it has to.
        OSError: The cache could not be written.
    """
    cache, verb = _find_or_build(
        dataset, run, collate=collate, key=key, folder=folder, batch_size=batch_size, dtype=dtype
    )
    _log_caches([cache], [verb])
    return cache


def _find_or_build(dataset, run, *, collate, key, folder, batch_size, dtype) -> tuple[FeatureCache, str]:
    if dtype not in DTYPES:
        raise ValueError(f"`cache_dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    code = digest_code(dataset, collate, getattr(run, "func", run))
    key = {**key, "utterances": digest_utterances(dataset), "dtype": dtype, "version": VERSION, "code": code}
    key = json.dumps(key, sort_keys=True)
    path = Path(folder) / xxhash.xxh3_128_hexdigest(key.encode()) / CACHE_NAME
    damage = find_cache_damage(path, key, DTYPES[dtype])
    if damage is None:
        return FeatureCache(path), "reused"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            damage = find_cache_damage(path, key, DTYPES[dtype])  # another process may have built it by now
            if damage is None:
                return FeatureCache(path), "reused"
            if path.exists():
                logger.warning("Cache %s is built anew: %s.", path, damage)
            for leftover in path.parent.glob(f"{SCRATCH_PREFIX}*"):  # who holds the lock is the only one to write
                leftover.unlink()
            _write_cache(path, dataset, run, collate=collate, key=key, batch_size=batch_size, dtype=DTYPES[dtype])
    except OSError as error:
        raise OSError(
            f"`cache_dir` must have room for the cache and be writable, got {folder} ({error}). Name another folder."
        ) from error
    return FeatureCache(path), "built"


def _write_cache(path: Path, dataset, run: Run, *, collate, key: str, batch_size: int, dtype: torch.dtype) -> None:
    scratch = path.with_name(f"{SCRATCH_PREFIX}{uuid.uuid4().hex}")
    try:
        with CacheWriter(scratch, num_utterances=len(dataset), dtype=dtype, key=key) as writer:
            for rows in _draw_batches(dataset.lengths, batch_size):
                with torch.inference_mode():
                    states, lengths = run(collate([dataset[row] for row in rows]))
                    writer.write(rows, states, lengths)
            writer.finish()
        os.replace(scratch, path)
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()


def _draw_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    # The longest first: if memory does not suffice, that shows at once.
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for start in tqdm(range(0, len(order), batch_size), desc="caching frozen states", unit="batch", disable=None):
        yield order[start : start + batch_size]


def _log_caches(caches: Sequence[FeatureCache], verbs: Sequence[str]) -> None:
    logger.info(
        "Frozen states: %d of %d variants built, %d reused; %d utterances, %d frames, %.1f MB in %s, in %s.",
        verbs.count("built"),
        len(caches),
        verbs.count("reused"),
        len(caches[0]),
        sum(cache.num_frames for cache in caches),
        sum(cache.nbytes for cache in caches) / 1e6,
        str(caches[0].dtype).removeprefix("torch."),
        caches[0].path.parents[1],
    )


class CachedUtterances(torch.utils.data.Dataset):
    """
    Utterances with cached states in place of features: `states`, by name, and `labels`.

    Epoch `e` reads variant `e % len(caches)`: the states, groups and labels that the utterances have in that epoch.

    Args:
        dataset: The utterances.
        caches: One a variant: variant `v` is of the utterances of epoch `v`.
    """

    def __init__(self, dataset: CacheableUtterances, caches: Sequence[FeatureCache]):
        self.dataset, self.caches = dataset, list(caches)
        self._labels = []
        for variant in range(len(self.caches)):
            dataset.set_epoch(variant)
            self._labels.append(dataset.labels)
        self.set_epoch(0)

    @classmethod
    def build(
        cls,
        dataset: CacheableUtterances,
        run: Run,
        *,
        collate: Callable[[list[dict]], dict],
        key: Mapping[str, object],
        folder: str | Path,
        batch_size: int,
        dtype: str = "float32",
        num_variants: int = 1,
    ) -> "CachedUtterances":
        """
        Builds or reuses a cache for each of the first `num_variants` epochs; one where all epochs are the same.

        Args:
            dataset, run, collate, key, folder, batch_size, dtype: As for [`build_cache`].
            num_variants: Epochs that differ, after which the first comes again.

        Raises:
            ValueError: `num_variants` is below 1, or as for [`build_cache`].
        """
        if num_variants < 1:
            raise ValueError(f"`cache_variants` must be at least 1 for a cache, got {num_variants}.")
        pairs = []
        for variant in range(num_variants if dataset.is_random else 1):
            dataset.set_epoch(variant)
            options = {"key": key, "folder": folder, "batch_size": batch_size, "dtype": dtype}
            pairs.append(_find_or_build(dataset, run, collate=collate, **options))
        caches, verbs = zip(*pairs, strict=True)
        _log_caches(caches, verbs)
        return cls(dataset, caches)

    def set_epoch(self, epoch: int) -> None:
        """Takes the variant of an epoch; the Trainer calls it."""
        self.variant = epoch % len(self.caches)
        self.dataset.set_epoch(self.variant)

    @property
    def lengths(self) -> list[int]:
        """Frames of states of every utterance, for batches of similar length."""
        return self.caches[self.variant].lengths

    @property
    def speakers(self) -> list[str]:
        """The speaker of every utterance."""
        return self.dataset.speakers

    @property
    def references(self) -> list[str]:
        """The transcript of every utterance."""
        return self.dataset.references

    @property
    def seconds(self) -> float:
        """Seconds of speech in one epoch."""
        return self.dataset.seconds

    def __len__(self) -> int:
        return len(self.caches[self.variant])

    def __getitem__(self, index: int) -> dict:
        return {"states": self.caches[self.variant][index], "labels": self._labels[self.variant][index]}
