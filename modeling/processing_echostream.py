"""Processor of EchoStream: features of audio, labels of both languages and of units."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin


class EchoStreamProcessor(ProcessorMixin):
    """
    Joins [`EchoStreamFeatureExtractor`] and a tokenizer of subwords a language.

    Args:
        feature_extractor: The feature extractor.
        tokenizer: Of the source language: what is said. Its blank, id 0, is no subword.
        target_tokenizer: Of the target language: what it means.
    """

    def __init__(self, feature_extractor=None, tokenizer=None, target_tokenizer=None):
        super().__init__(feature_extractor, tokenizer, target_tokenizer)

    def __call__(
        self,
        audio: np.ndarray | list[np.ndarray] | None = None,
        text: str | list[str] | None = None,
        target_text: str | list[str] | None = None,
        *,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            audio: One utterance `(samples,)` or a batch.
            text: One transcript or a batch; becomes `asr_labels`, lists of ids.
            target_text: One translation or a batch; becomes `target_labels`.
            sampling_rate: Rate of `audio` in Hz.
            return_tensors: Type of the features, as in the feature extractor.

        Returns:
            `input_features` and `attention_mask` of `audio`, `asr_labels` of `text`, `target_labels` of `target_text`;
            labels without a token for the start or the end.

        Raises:
            ValueError: Nothing is given.
        """
        if audio is None and text is None and target_text is None:
            raise ValueError("`audio`, `text` or `target_text` must be given, got none.")
        batch = BatchFeature()
        if audio is not None:
            options = {"sampling_rate": sampling_rate, "return_tensors": return_tensors}
            batch.update(self.feature_extractor(audio, **options, **kwargs))
        if text is not None:
            batch["asr_labels"] = self.tokenizer(text, add_special_tokens=False).input_ids
        if target_text is not None:
            batch["target_labels"] = self.target_tokenizer(target_text, add_special_tokens=False).input_ids
        return batch

    def decode_source(self, ids: Sequence[Sequence[int]] | torch.Tensor) -> list[str]:
        """Returns transcripts of subwords of the source language, such as the model's `collapse` gives."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def batch_decode(self, ids: Sequence[Sequence[int]] | torch.Tensor, **kwargs) -> list[str]:
        """Returns translations of subwords of the target language, such as `generate` gives."""
        return self.target_tokenizer.batch_decode(ids, **{"skip_special_tokens": True, **kwargs})

    def decode(self, ids: Sequence[int] | torch.Tensor, **kwargs) -> str:
        """Returns the translation of one row of subwords."""
        return self.target_tokenizer.decode(ids, **{"skip_special_tokens": True, **kwargs})
