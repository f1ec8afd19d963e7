"""Recordings that are trained on and evaluated on: they make an error rate say less than it seems to."""

import logging
import os
from collections.abc import Iterator

import xxhash
from datasets import Dataset

logger = logging.getLogger(__name__)

COMPARED_BYTES = 65_536  # of a recording's beginning and of its end, beside its size


def describe_overlap(train: Dataset, evaluation: Dataset, *, train_split: str, eval_split: str) -> str | None:
    """
    Returns a sentence for the model's card, and warns, if what is evaluated on is also trained on; else None.

    Args:
        train: Rows to train on, with undecoded `audio`, or a stream, of which only the split's name is looked at.
        evaluation: Rows to evaluate on.
        train_split: Name of the split that is trained on.
        eval_split: Name of the other.
    """
    sentence = None
    if train_split == eval_split:
        sentence = f"The split that was trained on, {train_split!r}, is evaluated on: that says nothing of new speech."
    elif isinstance(train, Dataset):
        known = set(_identify_recordings(train))
        num_shared = sum(recording in known for recording in _identify_recordings(evaluation))
        if num_shared:
            sentence = f"{num_shared} of the {len(evaluation)} recordings that are evaluated on were trained on too."
    if sentence:
        logger.warning("%s Give the evaluation rows of its own, with another `split`.", sentence)
    return sentence


def _identify_recordings(corpus: Dataset) -> Iterator[tuple[int, str]]:
    """Yields for each recording its size and a digest of its two ends."""
    for row in corpus.select_columns(["audio"]):
        path, content = row["audio"]["path"], row["audio"]["bytes"]
        if content is None:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                ends = file.read(COMPARED_BYTES)
                file.seek(max(0, size - COMPARED_BYTES))
                ends += file.read()
        else:
            size, ends = len(content), content[:COMPARED_BYTES] + content[-COMPARED_BYTES:]
        yield size, xxhash.xxh3_128_hexdigest(ends)
