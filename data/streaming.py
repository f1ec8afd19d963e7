"""Utterances for recognition from a corpus that does not fit a disk: read, checked and encoded while they are used."""

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch
from datasets import IterableDataset

from .augmentation import Augmentation
from .left_out import StreamedRows
from .spelling import MAX_CLIP_SECONDS, find_faults
from .text import find_normalizer
from .utterances import count_ctc_frames, count_logit_frames, read_clip

# Rows, undecoded, among which the next one is drawn.
SHUFFLED_ROWS = 256


def stream_utterances(
    corpus: IterableDataset,
    processor,
    *,
    samples_per_logit: int,
    augmentation: Augmentation | None = None,
    max_clip_seconds: float = MAX_CLIP_SECONDS,
    seed: int = 0,
    epoch: int = 0,
) -> IterableDataset:
    """
    Returns the clips of a streamed corpus as training examples, in the corpus's order.

    Args:
        corpus: Columns `audio` and `text`, from `load_corpus(..., streaming=True)`.
        processor: Feature extractor and CTC tokenizer of the model.
        samples_per_logit: Samples of audio a frame of logits.
        augmentation: For training; drawn by seed, epoch and row.
        max_clip_seconds: Longest clip to train on.
        seed: Of everything drawn.
        epoch: Of everything drawn, too.

    Returns:
        `input_features` `(frames, mel)` and `labels` `(tokens,)`. Rows whose recording is unreadable, empty, silent,
        too long or too short, also for the transcript, or whose transcript has no word or characters outside the
        vocabulary, are left out, each with a warning.

    Raises:
        ValueError: While iterating, where more than 5 % of the rows are left out.
    """
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    normalize, max_samples = find_normalizer(tokenizer), max_clip_seconds * extractor.sampling_rate
    augmentation = augmentation or Augmentation()
    rows = StreamedRows(what="streamed recordings cannot be used", remedy="Correct them or remove the rows.")

    def find_fault(name: str, text: str, clip: dict) -> str | None:
        """What keeps a clip as it was recorded from being trained on."""
        if spelling := find_faults([text], tokenizer).get(0):
            return f"{name}: `text` has {spelling}" + (" outside the vocabulary" if text else "")
        too_long = f"{name}: {clip['num_samples'] / extractor.sampling_rate:.1f} s, more than `max_clip_seconds`"
        return clip["fault"] or (too_long if clip["num_samples"] > max_samples else None)

    def encode(row: dict, index: int) -> dict:
        generator = np.random.default_rng([seed, epoch, index])
        name = row["audio"]["path"] or f"row {index + 1}"
        text = normalize(row["text"])
        clip, labels = read_clip(row, sampling_rate=extractor.sampling_rate), tokenizer(text).input_ids
        if fault := find_fault(name, text, clip):
            rows.note(fault)
            return {"input_features": [], "labels": labels, "is_usable": False}
        pauses = augmentation.draw_pauses(2 + (" " in text), np.random.default_rng([seed, epoch, index, 1]))
        samples = augmentation.hear([clip["samples"]], pauses, generator)
        # Pauses are no room for words.
        needed = count_ctc_frames(labels)
        there = count_logit_frames(extractor, len(samples) - sum(pauses), samples_per_logit=samples_per_logit)
        rows.note(f"{name}: CTC needs {needed} frames, {there} are there" if needed > there else None)
        features = extractor.normalize(extractor.log_mel(samples))
        return {
            "input_features": augmentation.mask(features, generator).numpy(),
            "labels": labels,
            "is_usable": needed <= there,
        }

    examples = corpus.map(encode, with_indices=True, remove_columns=list(corpus.features or next(iter(corpus))))
    return examples.filter(lambda row: row["is_usable"]).remove_columns("is_usable")


class EndlessUtterances(torch.utils.data.IterableDataset):
    """
    Pass after pass over a streamed corpus, each in another order and with other augmentation, without an end.

    What follows depends on nothing but the seed, so that a training that is resumed finds its place by reading on.

    Args:
        corpus: As for [`stream_utterances`]; its rows are shuffled within a buffer.
        seed: Of everything drawn.
        read: Returns the utterances of a shuffled corpus in an epoch: [`stream_utterances`] with its options.

    Raises:
        ValueError: While iterating, where a pass has no utterance.
    """

    def __init__(self, corpus: IterableDataset, *, seed: int, read: Callable[..., IterableDataset]):
        self.corpus, self.seed, self.read = corpus, seed, read

    def __iter__(self) -> Iterator[dict]:
        for epoch in count():
            is_empty = True
            shuffled = self.corpus.shuffle(seed=self.seed + epoch, buffer_size=SHUFFLED_ROWS)
            for example in self.read(shuffled, seed=self.seed, epoch=epoch):
                is_empty = False
                yield example
            if is_empty:
                worker = torch.utils.data.get_worker_info()
                if worker is not None and worker.id:
                    return  # there are fewer files than workers, and the first one has some
                raise ValueError("`train_split` must have at least one usable utterance, got none. Check the corpus.")
