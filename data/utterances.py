"""Utterances for recognition: clips decoded once, joined, augmented and turned into features when a batch is made."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import torch
import xxhash
from datasets import Dataset, Features, List, Value

from .audio import AudioError, read_audio
from .augmentation import Augmentation
from .code_digest import map_versioned
from .left_out import report_left_out
from .spelling import MAX_CLIP_SECONDS, drop_long, note_language, note_unspelled, select_spelled, warn_of_silence
from .text import find_normalizer, find_text_unit

# Clips whose samples are read at a time to digest them: 10 MB for clips of 10 s.
NUM_DIGESTED = 16
CLIP_FEATURES = Features({"samples": List(Value("float32")), "num_samples": Value("int64"), "fault": Value("string")})


def decode_clips(
    corpus: Dataset,
    processor,
    *,
    samples_per_logit: int,
    max_speed: float = 1.0,
    is_joined: bool = False,
    is_evaluation: bool = False,
    max_clip_seconds: float = MAX_CLIP_SECONDS,
) -> Dataset:
    """
    Reads and checks every clip of `corpus` once; the result is cached by the fingerprint of corpus and settings.

    Args:
        corpus: Columns `audio` (undecoded), `text` and optionally `speaker_id`, as from [`load_corpus`].
        processor: Feature extractor and CTC tokenizer of the model.
        samples_per_logit: Samples of audio a frame of logits (`config.inputs_to_logits_ratio`).
        max_speed: Fastest speed perturbation that the clips must still be long enough for.
        is_joined: Whether clips will be joined, so that each needs a frame more, for the space between words.
        is_evaluation: Whether the transcripts are references, which may hold what the model cannot write, and clips
            of any duration.
        max_clip_seconds: Longest clip to train on.

    Returns:
        Columns `name`, `speaker_id`, `text` (normalised), `labels` and `samples` `(samples,)`.

    Raises:
        AudioError: More than 5 % of the clips are unreadable, empty, silent or too short. Fewer of them are dropped,
            counted and named in a warning.
        ValueError: More than 5 % of the transcripts need more frames than their audio has or, for training, have no
            word or characters outside the vocabulary, or more than 5 % of the clips are too long. Fewer of them are
            dropped, counted and named in a warning. No reference has a word.
    """
    tokenizer, sampling_rate = processor.tokenizer, processor.feature_extractor.sampling_rate
    texts = list(map(find_normalizer(tokenizer), corpus["text"]))
    note_language(corpus["text"], tokenizer)
    if is_evaluation:
        note_unspelled(texts, tokenizer)
    else:
        kept = select_spelled(texts, name_rows(corpus), tokenizer)
        if len(kept) < len(texts):
            corpus, texts = corpus.select(kept), [texts[row] for row in kept]
    speakers = corpus["speaker_id"][:] if "speaker_id" in corpus.column_names else [""] * len(corpus)
    speakers = [speaker or "" for speaker in speakers]
    columns = {"speaker_id": speakers, "text": texts, "labels": tokenizer(texts).input_ids}
    table = read_concatenated(corpus, columns, sampling_rate=sampling_rate)
    if not is_evaluation:
        table = drop_long(table, max_seconds=max_clip_seconds, sampling_rate=sampling_rate)
    warn_of_silence(table, sampling_rate=sampling_rate)
    count = partial(count_logit_frames, processor.feature_extractor, samples_per_logit=samples_per_logit)
    return drop_infeasible(table, count, max_speed=max_speed, is_joined=is_joined)


def name_rows(corpus: Dataset) -> list[str]:
    """Returns what messages call the rows of a corpus: their recordings' paths, or their numbers from 1."""
    return [clip["path"] or f"row {row}" for row, clip in enumerate(corpus["audio"], start=1)]


def read_concatenated(corpus: Dataset, columns: Mapping[str, Sequence], *, sampling_rate: int) -> Dataset:
    """
    Reads and checks every recording once; the result is cached by the fingerprint of corpus, rate and code.

    Args:
        corpus: A column `audio`, undecoded.
        columns: Further columns of the result, a value a row.
        sampling_rate: Of the samples in Hz.

    Returns:
        Columns `samples` `(samples,)`, `num_samples`, `name` and `columns`, without the rows that cannot be used.

    Raises:
        AudioError: More than 5 % of the recordings are unreadable, empty, silent or too short. Fewer of them are left
            out, counted and named in a warning.
    """
    names = name_rows(corpus)
    table = map_versioned(
        corpus.select_columns(["audio"]),
        read_clip,
        fn_kwargs={"sampling_rate": sampling_rate},
        features=CLIP_FEATURES,
        remove_columns=["audio"],
        desc="reading audio",
    )
    faults = {row: fault for row, fault in enumerate(table["fault"]) if fault}
    report_left_out(
        list(faults.values()),
        len(table),
        what="recordings cannot be used",
        remedy="Correct them or remove the rows.",
        error_class=AudioError,
    )
    table = table.remove_columns("fault").add_column("name", names)
    for column, values in columns.items():
        table = table.add_column(column, values)
    return table.select([row for row in range(len(table)) if row not in faults]) if faults else table


def read_clip(row: dict, *, sampling_rate: int) -> dict:
    """Returns a row's `samples` `(samples,)` at `sampling_rate` Hz, their number, and `fault`: what is wrong."""
    try:
        samples, fault = read_audio(row["audio"], sampling_rate=sampling_rate), None
    except AudioError as error:
        samples, fault = np.empty(0, dtype=np.float32), str(error).removesuffix(".")
    return {"samples": samples, "num_samples": len(samples), "fault": fault}


def digest_samples(clips: Dataset) -> str:
    """Returns 32 hexadecimal digits over the samples of every clip, in their order; a few clips are read at a time."""
    digest = xxhash.xxh3_128(repr(list(clips["num_samples"])).encode())
    for table in clips.with_format("arrow", columns=["samples"]).iter(NUM_DIGESTED):
        for chunk in table["samples"].chunks:
            digest.update(chunk.flatten().to_numpy())
    return digest.hexdigest()


def count_ctc_frames(labels: Sequence[int]) -> int:
    """Returns the frames that CTC needs for `labels`: one a label, and a blank between two equal ones."""
    return len(labels) + sum(left == right for left, right in zip(labels, labels[1:], strict=False))


def count_logit_frames(extractor, num_samples: int, *, samples_per_logit: int) -> int:
    """
    Returns the frames of logits that a clip of `num_samples` samples gives.

    Features are centred on their times, so that a frame stands at either end, or they are made of whole windows.

    Args:
        extractor: The model's feature extractor.
        num_samples: Samples of the clip.
        samples_per_logit: Samples of audio a frame of logits.

    Example:

    ```python
    >>> from data.utterances import count_logit_frames
    >>> from modeling import DeepSpeech2FeatureExtractor, EchoStreamFeatureExtractor

    >>> count_logit_frames(DeepSpeech2FeatureExtractor(), 6400, samples_per_logit=320)
    21
    >>> count_logit_frames(EchoStreamFeatureExtractor(), 6400, samples_per_logit=640)  # 38 windows, four a frame
    9

    ```
    """
    if getattr(extractor, "has_whole_windows", False):
        return extractor.get_num_frames(num_samples) // (samples_per_logit // extractor.hop_length)
    return num_samples // samples_per_logit + 1


def drop_infeasible(
    table: Dataset, count: Callable[[int], int], *, max_speed: float = 1.0, is_joined: bool = False
) -> Dataset:
    """
    Drops rows whose `labels` need more frames than their samples give, and says which.

    Args:
        table: Columns `name`, `labels` and `num_samples`.
        count: Returns the frames of logits for a number of samples.
        max_speed: Fastest speed perturbation that the clips must still be long enough for.
        is_joined: Whether clips will be joined, so that each needs a frame more.

    Raises:
        ValueError: They are more than 5 % of the rows.
    """
    # Joined clips share the one frame that stands at an utterance's end, and have a delimiter between them.
    needed = [count_ctc_frames(labels) + 2 * is_joined for labels in table["labels"]]
    there = [count(int(samples / max_speed)) for samples in table["num_samples"]]
    bad = [row for row in range(len(table)) if needed[row] > there[row]]
    if not bad:
        return table
    names = table["name"][:]
    report_left_out(
        [f"{names[row]} ({needed[row]} frames needed, {there[row]} there)" for row in bad],
        len(table),
        what="utterances have transcripts longer than their audio for CTC",
        remedy="Check that column `text` belongs to column `audio`.",
    )
    return table.select(sorted(set(range(len(table))) - set(bad)))


def join_clips(
    speaker_ids: Sequence[str], *, minimum: int, maximum: int, seed: int, order_seed: int | None = None
) -> list[list[int]]:
    """
    Groups rows of one speaker into utterances of `minimum` to `maximum` clips; every row is in one group.

    Args:
        speaker_ids: The speaker of each row.
        minimum: Fewest clips of an utterance; a speaker's last one may have fewer.
        maximum: Most clips.
        seed: Draws the sizes, so that their number is the same for every `order_seed`.
        order_seed: Draws which clips come together; default `seed`.

    Raises:
        ValueError: `minimum` is below 1 or above `maximum`.

    Example:

    ```python
    >>> from data.utterances import join_clips

    >>> join_clips(["a", "a", "b"], minimum=1, maximum=1, seed=0)
    [[0], [1], [2]]

    ```
    """
    if not 1 <= minimum <= maximum:
        raise ValueError(
            f"`concatenate_min` must be at least 1 and at most `concatenate_max`, got {minimum} and {maximum}."
        )
    if maximum == 1:
        return [[row] for row in range(len(speaker_ids))]
    sizes = np.random.default_rng(seed)
    order = np.random.default_rng([seed if order_seed is None else order_seed, 1])
    groups = []
    for speaker_id in sorted(set(speaker_ids)):
        rows = [row for row, other in enumerate(speaker_ids) if other == speaker_id]
        rows = order.permutation(rows).tolist()
        while rows:
            size = int(sizes.integers(minimum, maximum + 1))
            groups.append(rows[:size])
            rows = rows[size:]
    return groups


class UtteranceDataset(torch.utils.data.Dataset):
    """
    Utterances made of decoded clips: joined, augmented, with features, each determined by seed, epoch and index.

    Without randomness of its own, a resumed training sees what the uninterrupted one would have seen.

    Args:
        clips: From [`decode_clips`].
        processor: Feature extractor and CTC tokenizer of the model.
        concatenate: Fewest and most clips of one speaker in an utterance.
        augmentation: For training; also draws each epoch which clips come together.
        seed: Of everything drawn.
    """

    def __init__(
        self,
        clips: Dataset,
        processor,
        *,
        concatenate: tuple[int, int] = (1, 1),
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        self.clips = clips.with_format("numpy", columns=["samples"], output_all_columns=True)
        self.processor, self.augmentation, self.concatenate, self.seed = processor, augmentation, concatenate, seed
        if not len(clips):
            raise ValueError("`dataset` must have at least one usable utterance, got none.")
        if concatenate[1] > 1 and not all(clips["speaker_id"]):
            raise ValueError(
                "`concatenate_max` above 1 joins clips of one speaker and needs a column `speaker_id`, got none."
            )
        self.speaker_ids = list(clips["speaker_id"])
        self.texts = list(clips["text"])
        self.num_samples = list(clips["num_samples"])
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the utterances of an epoch; the Trainer calls it. Without augmentation every epoch is the same."""
        self.epoch = epoch if self.augmentation else 0
        minimum, maximum = self.concatenate
        self.groups = join_clips(
            self.speaker_ids, minimum=minimum, maximum=maximum, seed=self.seed, order_seed=self.seed + self.epoch
        )
        self.pauses = [self._draw_pauses(index) for index in range(len(self.groups))]

    def _draw_pauses(self, index: int) -> list[int]:
        if not self.augmentation or not self.augmentation.pause_share:
            return []
        # A generator of their own: the lengths of all utterances are wanted before any is made.
        generator = np.random.default_rng([self.seed, self.epoch, index, 1])
        group = self.groups[index]
        has_words = len(group) == 1 and " " in self.texts[group[0]]
        return self.augmentation.draw_pauses(len(group) + 1 + has_words, generator)

    @property
    def lengths(self) -> list[int]:
        """Samples of every utterance, pauses included, for batches of similar length."""
        return [
            sum(self.num_samples[row] for row in group) + sum(pauses)
            for group, pauses in zip(self.groups, self.pauses, strict=True)
        ]

    @property
    def speakers(self) -> list[str]:
        """The speaker of every utterance."""
        return [self.speaker_ids[group[0]] for group in self.groups]

    @property
    def references(self) -> list[str]:
        """The transcript of every utterance."""
        return [" ".join(self.texts[row] for row in group) for group in self.groups]

    @property
    def labels(self) -> list[list[int]]:
        """The tokens of every utterance's transcript."""
        return self.processor.tokenizer(self.references).input_ids

    @property
    def seconds(self) -> float:
        """Seconds of speech in one epoch."""
        return sum(self.num_samples) / self.processor.feature_extractor.sampling_rate

    @property
    def is_random(self) -> bool:
        """Whether the utterances differ from epoch to epoch, by augmentation or by which clips come together."""
        return self.augmentation is not None and (self.concatenate[1] > 1 or self.augmentation.changes)

    @cached_property
    def samples_digest(self) -> str:
        """As [`digest_samples`]."""
        return digest_samples(self.clips)

    def __len__(self) -> int:
        return len(self.groups)

    def hear(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """Returns the samples `(samples,)` of one utterance; `generator` draws how it is augmented."""
        clips = [self.clips[row]["samples"] for row in self.groups[index]]
        if self.augmentation:
            return self.augmentation.hear(clips, self.pauses[index], generator)
        return np.concatenate(clips)

    def __getitem__(self, index: int) -> dict:
        """Returns the model's input, such as `input_features` `(frames, mel)`, and `labels` of one utterance."""
        generator = np.random.default_rng([self.seed, self.epoch, index])
        name, features = self._extract(self.hear(index, generator), generator)
        reference = " ".join(self.texts[row] for row in self.groups[index])
        return {name: features, "labels": self.processor.tokenizer(reference).input_ids}

    def _extract(self, samples: np.ndarray, generator: np.random.Generator) -> tuple[str, np.ndarray]:
        extractor = self.processor.feature_extractor
        name = extractor.model_input_names[0]
        if not hasattr(extractor, "log_mel"):  # of transformers: waves, or features that its models mask themselves
            options = {"sampling_rate": extractor.sampling_rate, "return_tensors": "np", "return_attention_mask": True}
            inputs = extractor(samples, **options)
            return name, inputs[name][0][: int(inputs["attention_mask"][0].sum())]
        features = extractor.normalize(extractor.log_mel(samples))
        return name, (self.augmentation.mask(features, generator) if self.augmentation else features).numpy()


__all__ = [
    "AudioError",
    "UtteranceDataset",
    "count_ctc_frames",
    "decode_clips",
    "drop_infeasible",
    "find_text_unit",
    "join_clips",
]
