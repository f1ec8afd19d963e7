"""Collators: examples of different lengths into one padded batch, cached states into one without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# The loss ignores labels with this value, as everywhere in transformers.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class CTCCollator:
    """
    Pads the model's inputs with the feature extractor and `labels` with -100; packs what has cached states instead.

    Args:
        processor: Feature extractor and CTC tokenizer of the model.
    """

    processor: object

    def __call__(self, examples: list[dict]) -> dict[str, object]:
        """
        Returns inputs such as `input_features` `(batch, frames, mel)`, `attention_mask` `(batch, frames)` and `labels`
        `(batch, tokens)`, or what [`pack_states`] does; and `adapter_names` where the examples have `adapter_name`.
        """
        if "states" in examples[0]:
            return pack_states(examples)
        extractor = self.processor.feature_extractor
        name = extractor.model_input_names[0]
        features = [{name: example[name]} for example in examples]
        batch = extractor.pad(features, padding=True, return_tensors="pt", return_attention_mask=True)
        return {**batch, "labels": _pad_labels(examples), **_name_adapters(examples)}


def pack_states(examples: Sequence[dict]) -> dict[str, object]:
    """
    Packs cached states without padding, in the order of torch's `PackedSequence`.

        rows    a a a a     b b b     c          lengths 4, 3, 1: the longest first
        packed  a b c  a b  a b  a               frame 0 of all, then frame 1 of those that have one, ...

    Args:
        examples: `states` `(frames, width)` by name, `labels` `(tokens,)`, and in all or none `adapter_name`.

    Returns:
        `labels` `(batch, tokens)` padded with -100, `logits_lengths` `(batch,)`, `frozen_states` `(frames, width)` by
        name and, where the examples name them, `adapter_names`: rows longest first, in the given order where they are
        equally long.

    Example:

    ```python
    >>> import torch
    >>> from data.collators import pack_states

    >>> rows = [torch.full((1, 1), 3.0), torch.full((4, 1), 1.0), torch.full((3, 1), 2.0)]
    >>> batch = pack_states([{"states": {"hidden_states": row}, "labels": [5]} for row in rows])
    >>> batch["frozen_states"]["hidden_states"].flatten().tolist(), batch["logits_lengths"].tolist()
    ([1.0, 2.0, 3.0, 1.0, 2.0, 1.0, 2.0, 1.0], [4, 3, 1])

    ```
    """
    examples = sorted(examples, key=_count_frames, reverse=True)
    lengths = torch.tensor([_count_frames(example) for example in examples])
    names = examples[0]["states"]
    # The labels come first: whoever asks a batch for its size, as accelerate does, takes the first tensor's.
    return {
        "labels": _pad_labels(examples),
        "logits_lengths": lengths,
        "frozen_states": {name: _pack([example["states"][name] for example in examples], lengths) for name in names},
        **_name_adapters(examples),
    }


def _pad_labels(examples: Sequence[dict]) -> torch.Tensor:
    labels = [torch.as_tensor(example["labels"], dtype=torch.long) for example in examples]
    return torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)


def _name_adapters(examples: Sequence[dict]) -> dict[str, list[str]]:
    named = "adapter_name" in examples[0]
    return {"adapter_names": [example["adapter_name"] for example in examples]} if named else {}


def _count_frames(example: dict) -> int:
    return len(next(iter(example["states"].values())))


def _pack(rows: list[torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
    """Returns the frames of `rows`, each `(frames, width)` and longest first, in packed order `(frames, width)`."""
    first, width = rows[0], rows[0].shape[1]
    pointers = {row.untyped_storage().data_ptr() for row in rows}
    if len(pointers) == 1 and all(row.is_contiguous() and row.storage_offset() % width == 0 for row in rows):
        # Views of one file: gathered from there in one pass, where joining them first takes two.
        num_frames = first.untyped_storage().nbytes() // first.element_size() // width
        frames = first.as_strided((num_frames, width), (width, 1), 0)
        starts = torch.tensor([row.storage_offset() // width for row in rows])
    else:
        frames, starts = torch.cat(rows), lengths.cumsum(0) - lengths
    times = torch.arange(len(first)).unsqueeze(1)  # (frames, 1)
    return frames.index_select(0, (times + starts)[times < lengths].to(frames.device))
