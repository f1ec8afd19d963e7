"""Collators: examples of different lengths into one padded batch."""

from dataclasses import dataclass

import torch

# The loss ignores labels with this value, as everywhere in transformers.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class CTCCollator:
    """
    Pads `input_features` with the feature extractor and `labels` with -100.

    Args:
        processor: Feature extractor and CTC tokenizer of the model.
    """

    processor: object

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns `input_features` `(batch, frames, mel)`, `attention_mask` `(batch, frames)` and `labels`
        `(batch, tokens)`.
        """
        features = [{"input_features": example["input_features"]} for example in examples]
        batch = self.processor.feature_extractor.pad(features, padding=True, return_tensors="pt")
        labels = [torch.as_tensor(example["labels"], dtype=torch.long) for example in examples]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
        return dict(batch)
