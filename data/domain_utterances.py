"""Utterances of one domain or of pairs, as samples or as states of a frozen audio tower, and their batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from .prompts import Prompt, check_placeholders
from .utterances import digest_samples, join_clips


class DomainUtterances(torch.utils.data.Dataset):
    """
    What is said in one domain: clips of one speaker joined at random, or the parts of long ones.

    Args:
        clips: From [`split_long`].
        max_samples: Most samples of an utterance; of clips that would be longer together fewer are joined.
        concatenate: Fewest and most clips of one speaker in an utterance.
        seed: Draws which clips come together.
        is_whole: Leave the parts of long clips out, as for training on transcripts, which cannot be cut with them.

    Attributes:
        num_left_out (`int`): Split clips that were left out.

    Raises:
        ValueError: No utterance is left, or clips of unknown speakers or with instructions shall be joined.
    """

    # What a cache asks of a dataset: these utterances are the same in every epoch.
    augmentation = None

    def __init__(
        self,
        clips: Dataset,
        *,
        max_samples: int,
        concatenate: tuple[int, int] = (1, 1),
        seed: int = 0,
        is_whole: bool = False,
    ):
        self.clips = clips.with_format("numpy", columns=["samples"], output_all_columns=True)
        self.texts, self.instructions = list(clips["text"]), list(clips["instruction"])
        self.num_samples = list(clips["num_samples"])
        speaker_ids, num_parts = list(clips["speaker_id"]), list(clips["num_parts"])
        if concatenate[1] > 1 and (not all(speaker_ids) or any(self.instructions)):
            raise ValueError(
                "`concatenate_max` above 1 joins clips of one speaker and needs a column `speaker_id` and no "
                "instructions. Set it to 1."
            )
        single = [row for row, parts in enumerate(num_parts) if parts == 1]
        groups = join_clips(
            [speaker_ids[row] for row in single], minimum=concatenate[0], maximum=concatenate[1], seed=seed
        )
        self.groups = [part for group in groups for part in self._fit([single[row] for row in group], max_samples)]
        cut = [[row] for row, parts in enumerate(num_parts) if parts > 1]
        # Split clips that are left out, for whoever says so.
        self.num_left_out = len({clips[rows[0]]["utterance"] for rows in cut}) if is_whole else 0
        self.groups += [] if is_whole else cut
        if not self.groups:
            raise ValueError("`dataset` must have at least one usable utterance, got none. Cut long recordings first.")
        # Parts of one clip are answered one by one and count as one utterance.
        origins = list(clips["utterance"])
        numbers = {key: number for number, key in enumerate(dict.fromkeys(origins[rows[0]] for rows in self.groups))}
        self.utterances = [numbers[origins[rows[0]]] for rows in self.groups]
        self.speaker_ids = speaker_ids

    def _fit(self, rows: list[int], max_samples: int) -> list[list[int]]:
        """Returns `rows` as groups none of which is longer than a model hears."""
        groups: list[list[int]] = []
        total = max_samples + 1
        for row in rows:
            if total + self.num_samples[row] > max_samples:
                groups.append([])
                total = 0
            groups[-1].append(row)
            total += self.num_samples[row]
        return groups

    def find_text(self, index: int) -> str:
        """Returns what is said in an item."""
        return " ".join(self.texts[row] for row in self.groups[index])

    @property
    def references(self) -> list[str]:
        """The text of every utterance."""
        texts = {}
        for index, utterance in enumerate(self.utterances):
            texts.setdefault(utterance, self.find_text(index))
        return list(texts.values())

    @property
    def speakers(self) -> list[str]:
        """The speaker of every utterance, "" for one not known."""
        speakers = {}
        for rows, utterance in zip(self.groups, self.utterances, strict=True):
            speakers.setdefault(utterance, self.speaker_ids[rows[0]])
        return list(speakers.values())

    @property
    def lengths(self) -> list[int]:
        """Samples of every item, for batches of similar length."""
        return [sum(self.num_samples[row] for row in rows) for rows in self.groups]

    @cached_property
    def samples_digest(self) -> str:
        """As [`digest_samples`]."""
        return digest_samples(self.clips)

    def __len__(self) -> int:
        return len(self.groups)

    def describe(self, index: int) -> dict:
        """Returns an item's `num_samples`, `text` and `instruction` (`None` for the default one)."""
        rows = self.groups[index]
        return {
            "num_samples": sum(self.num_samples[row] for row in rows),
            "text": self.find_text(index),
            "instruction": self.instructions[rows[0]] or None,
        }

    def __getitem__(self, index: int) -> dict:
        """Returns `samples` `(samples,)` and what [`describe`] says of them."""
        samples = np.concatenate([self.clips[row]["samples"] for row in self.groups[index]])
        return {"samples": samples.astype(np.float32, copy=False), **self.describe(index)}


class PairedUtterances(torch.utils.data.Dataset):
    """
    The same utterances in two domains.

    Args:
        source: What the features shall become.
        target: What they are made from; of the same clips, joined alike.

    Raises:
        ValueError: Utterances differ in length.
    """

    augmentation = None

    def __init__(self, source: DomainUtterances, target: DomainUtterances):
        if source.lengths != target.lengths:
            raise ValueError("`source` and `target` must hold the same utterances, got others. Make them of pairs.")
        self.source, self.target = source, target

    @property
    def lengths(self) -> list[int]:
        """Samples of every item."""
        return self.target.lengths

    @property
    def groups(self) -> list[list[int]]:
        """The clips of every item."""
        return self.target.groups

    @property
    def references(self) -> list[str]:
        """The text of every utterance."""
        return self.target.references

    @property
    def samples_digest(self) -> str:
        """As [`DomainUtterances.samples_digest`], of both."""
        return self.source.samples_digest + self.target.samples_digest

    def __len__(self) -> int:
        return len(self.target)

    def describe(self, index: int) -> dict:
        """As [`DomainUtterances.describe`]."""
        return self.target.describe(index)

    def __getitem__(self, index: int) -> dict:
        """Returns the target's item, and the source's samples as `source_samples` `(samples,)`."""
        return {**self.target[index], "source_samples": self.source[index]["samples"]}


class CachedDomain(torch.utils.data.Dataset):
    """
    Utterances with what a frozen audio tower makes of them in place of their samples, in one or several variants.

    Epoch e reads variant e modulo their number. Clips come together differently in each, and where one variant has
    more utterances than another its last ones are left out, so that every epoch has the same number of steps.

    Args:
        variants: Pairs of utterances and their cache, from [`build_cache`].
    """

    def __init__(self, variants: Sequence[tuple[DomainUtterances | PairedUtterances, Sequence[Mapping]]]):
        self.variants = list(variants)
        self.num_items = min(len(dataset) for dataset, _ in self.variants)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Takes the variant of an epoch; the Trainer calls it."""
        self.dataset, self.states = self.variants[epoch % len(self.variants)]

    @property
    def lengths(self) -> list[int]:
        """Samples of every item."""
        return self.dataset.lengths[: self.num_items]

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict:
        """Returns the states `(frames, hidden)` of the tower, `num_samples`, `text` and `instruction`."""
        return {**self.states[index], **self.dataset.describe(index)}


@dataclass(frozen=True)
class DomainCollator:
    """
    Makes batches of utterances, of two domains or of one, as samples or as cached states of the tower.

    Args:
        prompt: What asks the model.
        has_answers: Add the tokens of prompt and answer.
        audio_token_id: Placeholder of a model that has them, to check their number.
    """

    prompt: Prompt
    has_answers: bool
    audio_token_id: int | None = None

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns the mask of the features, `num_frames` `(batch,)` that the tower makes of the samples, `input_features`
        `(batch, mel, frames)` or `states` `(batch, frames, hidden)`, of pairs also `source_features` or
        `source_states`, and with answers their tokens and `labels` `(batch, tokens)`.
        """
        num_samples = [item["num_samples"] for item in items]
        num_frames = [self.prompt.count_frames(count) for count in num_samples]
        batch = {"num_frames": torch.tensor(num_frames), **self.prompt.mask_frames(num_samples)}
        for samples, features in (("samples", "input_features"), ("source_samples", "source_features")):
            if samples in items[0]:
                batch[features] = self.prompt.extract([item[samples] for item in items])["input_features"]
        for name in {"states", "source_states"} & items[0].keys():
            batch[name] = pad_sequence([item[name] for item in items], batch_first=True)
        if self.has_answers:
            prompts = [
                self.prompt.ask(item["instruction"], [count]) for item, count in zip(items, num_frames, strict=True)
            ]
            batch |= self.prompt.pad_training(prompts, [self.prompt.answer(item["text"]) for item in items])
        if self.has_answers and self.audio_token_id is not None:
            check_placeholders(batch, audio_token_id=self.audio_token_id, num_frames=num_frames)
        return batch


__all__ = ["CachedDomain", "DomainCollator", "DomainUtterances", "PairedUtterances"]
