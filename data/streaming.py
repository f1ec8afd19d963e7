"""Utterances for recognition from a corpus that does not fit a disk: read, checked and encoded while they are used."""

import logging

import numpy as np
from datasets import IterableDataset

from .asr import count_ctc_frames, find_text_unit, read_clip
from .augmentation import Augmentation
from .text import check_characters, normalize_text

logger = logging.getLogger(__name__)


def stream_utterances(
    corpus: IterableDataset,
    processor,
    *,
    samples_per_logit: int,
    augmentation: Augmentation | None = None,
    seed: int = 0,
) -> IterableDataset:
    """
    Returns the clips of a streamed corpus as training examples, in the corpus's order.

    Args:
        corpus: Columns `audio` and `text`, from `load_corpus(..., streaming=True)`.
        processor: Feature extractor and CTC tokenizer of the model.
        samples_per_logit: Samples of audio a frame of logits.
        augmentation: For training; drawn by seed and row, the same in every epoch.
        seed: Of everything drawn.

    Returns:
        `input_features` `(frames, mel)` and `labels` `(tokens,)`. Rows whose transcript needs more frames than
        there are, are left out and named in a warning.

    Raises:
        AudioError: While iterating, at a clip that is unreadable, empty, silent or too short.
        ValueError: While iterating, at a transcript with characters outside the vocabulary.
    """
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    augmentation = augmentation or Augmentation()

    def encode(row: dict, index: int) -> dict:
        generator = np.random.default_rng([seed, index])
        name = row["audio"]["path"] or f"row {index + 1}"
        text = normalize_text(row["text"])
        check_characters([text], tokenizer.get_vocab(), text_unit=find_text_unit(tokenizer), name=f"text of {name}")
        samples = read_clip(row, sampling_rate=extractor.sampling_rate)["samples"]
        samples = augmentation.change_speed(samples, generator)
        labels = tokenizer(text).input_ids
        needed, there = count_ctc_frames(labels), len(samples) // samples_per_logit + 1
        if needed > there:
            logger.warning("%s is left out: CTC needs %d frames, %d are there.", name, needed, there)
        features = extractor.normalize(extractor.log_mel(samples))
        return {
            "input_features": augmentation.mask(features, generator).numpy(),
            "labels": labels,
            "is_feasible": needed <= there,
        }

    examples = corpus.map(encode, with_indices=True, remove_columns=list(corpus.features or next(iter(corpus))))
    return examples.filter(lambda row: row["is_feasible"]).remove_columns("is_feasible")
