"""Processor of EchoStream: features of audio, labels of both languages and of units."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

# What a tokenizer keeps beside its subwords.
SETTINGS = ("bos_token", "pad_token", "eos_token", "unk_token", "transcripts")


class EchoStreamProcessor(ProcessorMixin):
    """
    Joins [`EchoStreamFeatureExtractor`] and a tokenizer of subwords a language.

    The target's subwords are in `processor_config.json`: the library would put a second tokenizer into a folder of its
    own, and a checkpoint here is one flat folder.

    Args:
        feature_extractor: The feature extractor.
        tokenizer: Of the source language: what is said. Its first subword is the blank of CTC.
        target_vocabulary: Tokenizer of the target language, what it means, or what [`describe_tokenizer`] has made of
            it.
    """

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        target_vocabulary: PreTrainedTokenizerBase | Mapping | None = None,
    ):
        super().__init__(feature_extractor, tokenizer)
        if isinstance(target_vocabulary, Mapping):
            target_vocabulary = make_tokenizer(target_vocabulary)
        self.target_tokenizer = target_vocabulary

    def to_dict(self, *args, **kwargs) -> dict:
        """As the library's, with the target's subwords in place of their tokenizer."""
        target_tokenizer, self.target_tokenizer = self.target_tokenizer, None
        try:
            values = super().to_dict(*args, **kwargs)
        finally:
            self.target_tokenizer = target_tokenizer
        values.pop("target_tokenizer", None)
        return values | {
            "target_vocabulary": None if target_tokenizer is None else describe_tokenizer(target_tokenizer)
        }

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


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Returns a tokenizer as a mapping that JSON can hold: its subwords and its special tokens."""
    settings = {name: tokenizer.init_kwargs.get(name) for name in SETTINGS}
    settings |= {name: str(value) for name, value in settings.items() if name.endswith("_token") and value is not None}
    return {"tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()), "settings": settings}


def make_tokenizer(description: Mapping) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of which [`describe_tokenizer`] has made `description`."""
    settings = {name: value for name, value in description["settings"].items() if name in SETTINGS}
    backend = Tokenizer.from_str(json.dumps(description["tokenizer"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
