"""Processor of DeepSpeech2: features of audio, labels of text."""

import numpy as np
from transformers import BatchFeature, ProcessorMixin


class DeepSpeech2Processor(ProcessorMixin):
    """
    Joins [`DeepSpeech2FeatureExtractor`] and a CTC tokenizer (`Wav2Vec2CTCTokenizer` or [`JamoCTCTokenizer`]).

    Args:
        feature_extractor: The feature extractor.
        tokenizer: The tokenizer, whose `pad_token` is the CTC blank.
    """

    def __init__(self, feature_extractor=None, tokenizer=None):
        super().__init__(feature_extractor, tokenizer)

    def __call__(
        self,
        audio: np.ndarray | list[np.ndarray] | None = None,
        text: str | list[str] | None = None,
        *,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            audio: One utterance `(samples,)` or a batch.
            text: One transcript or a batch; becomes `labels`, lists of ids.
            sampling_rate: Rate of `audio` in Hz.
            return_tensors: Type of the features, as in the feature extractor.

        Returns:
            `input_features` and `attention_mask` of `audio`, `labels` of `text`.

        Raises:
            ValueError: Neither `audio` nor `text` is given.
        """
        if audio is None and text is None:
            raise ValueError("`audio` or `text` must be given, got neither.")
        batch = BatchFeature()
        if audio is not None:
            batch.update(
                self.feature_extractor(audio, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs)
            )
        if text is not None:
            batch["labels"] = self.tokenizer(text).input_ids
        return batch

    def decode(self, *args, **kwargs):
        """As the tokenizer's `decode`: collapses CTC labels into text."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        """As the tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)
