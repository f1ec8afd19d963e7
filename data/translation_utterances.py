"""Utterances for speech translation: clips with labels of both languages and units, and their batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from .augmentation import Augmentation
from .collators import IGNORED_LABEL
from .left_out import report_left_out
from .spelling import MAX_CLIP_SECONDS, drop_long
from .text import find_normalizer
from .utterances import count_ctc_frames, read_concatenated

LABEL_COLUMNS = ("asr_labels", "target_labels", "unit_labels")


@dataclass(frozen=True)
class LabelSpace:
    """
    What labels a model has room for.

    Args:
        subsampling_factor: Frames of features a frame of the encoder.
        unit_upsampling: Frames of the unit decoder a subword.
        unit_offset: Class of unit 0.
        num_units: Units that there are.
    """

    subsampling_factor: int
    unit_upsampling: int
    unit_offset: int
    num_units: int


def read_translations(
    corpus: Dataset,
    processor,
    space: LabelSpace,
    *,
    max_speed: float = 1.0,
    is_evaluation: bool = False,
    max_clip_seconds: float = MAX_CLIP_SECONDS,
) -> Dataset:
    """
    Reads and checks every clip of `corpus` once, with its labels.

    Args:
        corpus: Columns `audio` (undecoded), `text`, `target_text` and optionally `units`, as from [`load_corpus`].
        processor: Feature extractor and the tokenizers of both languages.
        space: Of the model.
        max_speed: Fastest speed perturbation that the clips must still be long enough for.
        is_evaluation: Whether references may need more frames than there are: nothing is aligned to them.
        max_clip_seconds: Longest clip to train on.

    Returns:
        Columns `name`, `samples` `(samples,)`, `num_samples`, `text` and `target_text` (normalised), `asr_labels`,
        `target_labels`, and `unit_labels` where the corpus has units.

    Raises:
        AudioError: More than 5 % of the clips cannot be read. Fewer of them are left out, counted and named.
        ValueError: More than 5 % of the rows are shorter than a frame, have a text without words on one side, a unit
            that the model does not know, or, for training, labels that no alignment fits into their frames or too
            long a clip. Fewer of them are left out, counted and named.
    """
    columns = _label_rows(corpus, processor, space)
    table = read_concatenated(corpus, columns, sampling_rate=processor.feature_extractor.sampling_rate)
    checks = {"cannot be used": _find_fault(space)}
    if not is_evaluation:
        table = drop_long(table, max_seconds=max_clip_seconds, sampling_rate=processor.feature_extractor.sampling_rate)
        checks["have labels that their frames do not fit"] = _find_misfit(processor, space, max_speed)
    for what, find in checks.items():
        table = _drop_rows(table, find, what=f"utterances {what}")
    return table


def _label_rows(corpus: Dataset, processor, space: LabelSpace) -> dict[str, list]:
    columns: dict[str, list] = {}
    sides = (("text", "asr_labels", processor.tokenizer), ("target_text", "target_labels", processor.target_tokenizer))
    for column, labels, tokenizer in sides:
        columns[column] = list(map(find_normalizer(tokenizer), corpus[column]))
        columns[labels] = tokenizer(columns[column], add_special_tokens=False).input_ids
    if "units" in corpus.column_names:
        columns["unit_labels"] = [[unit + space.unit_offset for unit in units or ()] for units in corpus["units"]]
    return columns


def _find_fault(space: LabelSpace) -> Callable[[Mapping], str | None]:
    """Returns what says why a row cannot be used at all."""

    def find(row: Mapping) -> str | None:
        for column, labels in (("text", "asr_labels"), ("target_text", "target_labels")):
            if not row[labels]:
                return f"column `{column}` has no word"
        units = [label - space.unit_offset for label in row.get("unit_labels") or ()]
        if outside := [unit for unit in units if not 0 <= unit < space.num_units]:
            return f"unit {outside[0]} is none of the model's {space.num_units}"
        return None

    return find


def _find_misfit(processor, space: LabelSpace, max_speed: float) -> Callable[[Mapping], str | None]:
    """Returns what says which labels of a row CTC cannot align."""

    def find(row: Mapping) -> str | None:
        features = processor.feature_extractor.get_num_frames(int(row["num_samples"] / max_speed))
        frames = features // space.subsampling_factor
        rooms = {"asr_labels": frames, "target_labels": frames}
        rooms["unit_labels"] = (len(row["target_labels"]) + 1) * space.unit_upsampling
        for labels, room in rooms.items():
            needed = count_ctc_frames(row.get(labels) or ())
            if needed > room or not room:
                return f"{labels}: {needed} frames needed, {room} there"
        return None

    return find


def _drop_rows(table: Dataset, find: Callable[[Mapping], str | None], *, what: str) -> Dataset:
    names = table["name"][:]
    rows = table.remove_columns("samples")
    faults = {number: fault for number, row in enumerate(rows) if (fault := find(row))}
    report_left_out(
        [f"{names[number]} ({fault})" for number, fault in faults.items()],
        len(table),
        what=what,
        remedy="Check the columns of these rows, or take a model with room for them.",
    )
    return table.select([number for number in range(len(table)) if number not in faults]) if faults else table


class TranslationUtterances(torch.utils.data.Dataset):
    """
    Utterances with features and labels, each determined by seed, epoch and index.

    Args:
        clips: From [`read_translations`].
        processor: Of the model.
        augmentation: For training, drawn anew each epoch.
        seed: Of everything drawn.

    Raises:
        ValueError: There are no clips.
    """

    def __init__(self, clips: Dataset, processor, *, augmentation: Augmentation | None = None, seed: int = 0):
        if not len(clips):
            raise ValueError("`dataset` must have at least one usable utterance, got none.")
        self.clips = clips.with_format("numpy", columns=["samples"])
        self.processor, self.augmentation, self.seed = processor, augmentation, seed
        self.names, self.references = clips["name"][:], clips["text"][:]
        self.target_references = clips["target_text"][:]
        self.num_samples = clips["num_samples"][:]
        self.labels = {name: clips[name][:] for name in LABEL_COLUMNS if name in clips.column_names}
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the utterances of an epoch; the Trainer calls it. Without augmentation every epoch is the same."""
        self.epoch = epoch if self.augmentation else 0
        self.pauses = [self._draw_pauses(index) for index in range(len(self.clips))]

    def _draw_pauses(self, index: int) -> list[int]:
        if not self.augmentation or not self.augmentation.pause_share:
            return []
        generator = np.random.default_rng([self.seed, self.epoch, index, 1])
        return self.augmentation.draw_pauses(3, generator)

    @property
    def lengths(self) -> list[int]:
        """Samples of every utterance, pauses included, for batches of similar length."""
        return [num + sum(pauses) for num, pauses in zip(self.num_samples, self.pauses, strict=True)]

    @property
    def seconds(self) -> float:
        """Seconds of speech in one epoch."""
        return sum(self.num_samples) / self.processor.feature_extractor.sampling_rate

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        """Returns `input_features` `(frames, mel)`, the labels `(tokens,)` that there are, and `index`."""
        generator = np.random.default_rng([self.seed, self.epoch, index])
        samples = self.clips[index]["samples"]
        if self.augmentation:
            samples = self.augmentation.hear([samples], self.pauses[index], generator)
        extractor = self.processor.feature_extractor
        features = extractor.normalize(extractor.log_mel(samples))
        if self.augmentation:
            features = self.augmentation.mask(features, generator)
        labels = {name: rows[index] for name, rows in self.labels.items()}
        return {"input_features": features, **labels, "index": index}


@dataclass(frozen=True)
class TranslationCollator:
    """
    Pads features with the extractor's value and labels with -100.

    Args:
        processor: Of the model.
    """

    processor: object

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """
        Returns `input_features` `(batch, frames, mel)`, `attention_mask` `(batch, frames)`, the labels that any row
        has `(batch, tokens)`, and `index` `(batch,)`: which utterances they are.
        """
        features = [torch.as_tensor(example["input_features"]) for example in examples]
        num_frames = torch.tensor([len(rows) for rows in features])
        value = self.processor.feature_extractor.padding_value
        batch = {
            "input_features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=value),
            "attention_mask": (torch.arange(int(num_frames.max())) < num_frames.unsqueeze(1)).long(),
            "index": torch.tensor([example["index"] for example in examples]),
        }
        for name in LABEL_COLUMNS:
            if any(example.get(name) for example in examples):
                rows = [torch.tensor(example.get(name) or [], dtype=torch.long) for example in examples]
                batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED_LABEL)
        return batch
