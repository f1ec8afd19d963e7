"""Conversations about recordings as tokens, with features or a frozen encoder's states of their clips, in batches."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from .instructions import Conversation, list_clips
from .left_out import report_left_out
from .packing import pack_sequences
from .timed_transcripts import TimedTranscript, find_targets, tokenize_words
from .utterances import digest_samples, read_concatenated

logger = logging.getLogger(__name__)


class ClipWindows(torch.utils.data.Dataset):
    """
    The recordings of conversations, as windows that an encoder hears: what a cache of its states is built of.

    Args:
        conversations: Or transcripts, whose clips they are.
        processor: Of the model.

    Attributes:
        windows (`list[list[list[int]]]`): The windows of each clip of each conversation, by their numbers.
        faulty (`dict[int, str]`): What is wrong with conversations that lack a clip, by their numbers.

    Raises:
        AudioError: More than 5 % of the recordings cannot be used.
    """

    augmentation = None  # the same in every epoch, for `build_cache`

    def __init__(self, conversations: Sequence[Conversation | TimedTranscript], processor):
        self.processor = processor
        self.groups: list[tuple[int, int, int]] = []  # row, first and last sample of each window
        self.windows: list[list[list[int]]] = [[] for _ in conversations]
        self.faulty: dict[int, str] = {}
        if not any(conversation.clips for conversation in conversations):
            return  # text alone
        corpus = list_clips(conversations)
        rate = processor.feature_extractor.sampling_rate
        clips = read_concatenated(corpus, {"conversation": corpus["conversation"][:]}, sampling_rate=rate)
        self.clips: Dataset = clips
        self._samples = clips.with_format("numpy", columns=["samples"])
        for row, (number, num_samples) in enumerate(zip(clips["conversation"], clips["num_samples"], strict=True)):
            self.windows[number].append(list(self._split(row, num_samples)))
        self.faulty = {
            number: f"{conversation.name} has {len(conversation.clips)} clips, {len(windows)} of which can be heard"
            for number, (conversation, windows) in enumerate(zip(conversations, self.windows, strict=True))
            if len(windows) != len(conversation.clips)
        }

    def _split(self, row: int, num_samples: int):
        most = int(self.processor.max_seconds * self.processor.feature_extractor.sampling_rate)
        sizes = [num_samples]
        if num_samples > most:
            sizes = [len(window) for window in self.processor.split_clip(self._samples[row]["samples"])]
        start = 0
        for size in sizes:
            self.groups.append((row, start, start + size))
            yield len(self.groups) - 1
            start += size

    @cached_property
    def num_tokens(self) -> list[int]:
        """Placeholders that each window takes."""
        return [self.processor.count_tokens(self._count_inputs(*group)) for group in self.groups]

    def _count_inputs(self, row: int, first: int, last: int) -> int:
        extractor = self.processor.feature_extractor
        if "input_values" in extractor.model_input_names:
            return last - first
        if hasattr(extractor, "n_samples"):  # Whisper's: a frame for each hop that is begun
            return -(-(last - first) // extractor.hop_length)
        return self.processor.num_inputs(self.processor.extract(self._samples[row]["samples"][first:last]))

    @property
    def lengths(self) -> list[int]:
        """Samples of every window."""
        return [last - first for _, first, last in self.groups]

    @property
    def references(self) -> list[str]:
        """Nothing that is said is part of an encoder's states."""
        return []

    @cached_property
    def samples_digest(self) -> str:
        """As [`digest_samples`]."""
        return digest_samples(self.clips)

    @property
    def seconds(self) -> float:
        """Seconds of audio."""
        return sum(self.lengths) / self.processor.feature_extractor.sampling_rate

    def read(self, index: int):
        """Returns the samples `(samples,)` of a window."""
        row, first, last = self.groups[index]
        return self._samples[row]["samples"][first:last]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Returns the features of a window, as the processor extracts them."""
        return self.processor.extract(self.read(index))


class ConversationDataset(torch.utils.data.Dataset):
    """
    Conversations as tokens and labels, with their windows as features or as cached states.

    Args:
        conversations: With answers.
        windows: Of their clips.
        processor: Of the model; its [`encode_conversations`] makes prompts as the model is asked.
        max_answer_tokens: Conversations with more tokens to learn are left out, counted and named.

    Raises:
        ValueError: More than 5 % of the answers are over the limit, or of the conversations lack a clip.
    """

    def __init__(
        self, conversations: Sequence[Conversation], windows: ClipWindows, processor, *, max_answer_tokens: int
    ):
        self.windows, self.states, self.processor = windows, None, processor
        self.kept: list[int] = []
        self.sequences: list[tuple[torch.Tensor, torch.Tensor]] = []
        reasons = list(windows.faulty.values())
        for number, conversation in enumerate(conversations):
            if number in windows.faulty:
                continue
            counts = [sum(windows.num_tokens[window] for window in clip) for clip in windows.windows[number]]
            encoded = processor.encode_conversations([list(conversation.messages)], num_audio_tokens=counts)
            ids, labels = encoded["input_ids"][0], encoded["labels"][0]
            if (num_learned := int((labels >= 0).sum())) > max_answer_tokens:
                reasons.append(f"{conversation.name} has answers of {num_learned} tokens")
                continue
            self.kept.append(number)
            self.sequences.append((ids, labels))
        report_left_out(
            reasons,
            len(conversations),
            what=f"conversations have no clip to hear or answers over the limit of {max_answer_tokens} tokens",
            remedy="Raise `max_answer_tokens`, or correct the rows.",
        )
        self.conversations = [conversations[number] for number in self.kept]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every conversation, for batches of similar length."""
        return [len(ids) for ids, _ in self.sequences]

    @property
    def seconds(self) -> float:
        """Seconds of audio in one epoch."""
        return self.windows.seconds

    def list_windows(self, index: int) -> list[int]:
        """Returns the windows of a conversation, in the order of its clips."""
        return [window for clip in self.windows.windows[self.kept[index]] for window in clip]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict:
        """Returns `sequence` (tokens and labels) and `features` of its windows, or their `states` where cached."""
        windows = self.list_windows(index)
        item = {"sequence": self.sequences[index]}
        if self.states is None:
            return item | {"features": [self.windows[window] for window in windows]}
        return item | {"states": [self.states[window]["states"] for window in windows]}


class ConversationCollator:
    """
    Packs conversations into rows and puts their windows in the order of their placeholders.

    Args:
        processor: Of the model.

    Attributes:
        num_cells (`int`): Cells of all rows that were made.
        num_tokens (`int`): Those that hold a token.
    """

    def __init__(self, processor):
        self.processor, self.num_cells, self.num_tokens = processor, 0, 0

    @property
    def padding(self) -> float:
        """Share of the cells of all rows that hold no token."""
        return 1 - self.num_tokens / max(1, self.num_cells)

    def __call__(self, items: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """
        Returns `labels`, `input_ids` and `position_ids` `(rows, tokens)`; of clips `input_features` and
        `input_features_mask`, or `states` `(windows, frames, width)` and `num_frames` `(windows,)`.
        """
        sequences = [item["sequence"] for item in items]
        packed, order = pack_sequences(sequences, pad_token_id=self.processor.tokenizer.pad_token_id)
        self.num_cells += packed["position_ids"].numel()
        self.num_tokens += sum(len(ids) for ids, _ in sequences)
        # The labels come first: whoever asks a batch for its size takes the first tensor's.
        batch = {name: packed[name] for name in ("labels", "input_ids", "position_ids")}
        return batch | collate_windows([items[index] for index in order], self.processor)


def collate_windows(items: Sequence[Mapping], processor) -> dict[str, torch.Tensor]:
    """Returns the windows of `items`, one behind the other, as features or as states; nothing where there are none."""
    if states := [state for item in items for state in item.get("states", ())]:
        num_frames = torch.tensor([len(state) for state in states])
        return {"states": pad_sequence(states, batch_first=True), "num_frames": num_frames}
    features = [window for item in items for window in item.get("features", ())]
    return processor.pad_features(features) if features else {}


class TranscriptCollator:
    """
    Makes batches for the alignment of a projector: windows and the token that each row says, no prompts.

    Args:
        processor: Of the model.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, items: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Returns `targets` `(rows of all clips,)`, and the windows as [`collate_windows`]."""
        targets = torch.cat([item["targets"] for item in items])
        return {"targets": targets, **collate_windows(items, self.processor)}


class TranscriptDataset(torch.utils.data.Dataset):
    """
    Windows with the token that each row of them says, for the alignment of a projector.

    With cached states, each window begins a few frames later in every epoch, so that its rows fall elsewhere.

    Args:
        transcripts: With the times of their words.
        windows: Of their clips.
        processor: Of the model.
        seed: Of where windows begin.

    Raises:
        ValueError: More than 5 % of the clips cannot be heard; fewer are left out, counted and named.
    """

    def __init__(self, transcripts: Sequence[TimedTranscript], windows: ClipWindows, processor, *, seed: int = 0):
        self.windows, self.states, self.processor, self.seed = windows, None, processor, seed
        self.tokens: list[tuple[int, list[tuple[int, float, float]]]] = []
        rate = processor.feature_extractor.sampling_rate
        samples = processor.frame_stride * getattr(processor.feature_extractor, "hop_length", 1)
        self.frame_seconds = samples / rate
        for number, transcript in enumerate(transcripts):
            if number in windows.faulty:
                continue
            said, start = tokenize_words(transcript.words, processor.tokenizer), 0.0
            for window in windows.windows[number][0]:
                end = start + windows.lengths[window] / rate
                own = [
                    (token, first - start, last - start) for token, first, last in said if start < last and first < end
                ]
                self.tokens.append((window, [(token, max(0.0, first), last) for token, first, last in own]))
                start = end
        report_left_out(
            list(windows.faulty.values()), len(transcripts), what="clips cannot be heard", remedy="Correct the files."
        )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws how many frames later each window begins; the Trainer calls it."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        size = self.processor.window_frames
        self.skipped = torch.randint(size, (len(self.tokens),), generator=generator).tolist()

    @property
    def lengths(self) -> list[int]:
        """Rows of audio of every window."""
        return [self.windows.num_tokens[window] for window, _ in self.tokens]

    @property
    def vocabulary(self) -> torch.Tensor:
        """The tokens of all transcripts, sorted."""
        return torch.tensor(sorted({token for _, said in self.tokens for token, _, _ in said}), dtype=torch.long)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        """Returns `targets` `(rows,)`, and `features` of the window or its `states` where cached."""
        window, said = self.tokens[index]
        processor, num_rows, skipped = self.processor, self.windows.num_tokens[window], 0
        if self.states is None:
            item = {"features": [self.windows[window]]}
        else:
            states = self.states[window]["states"]
            skipped = self.skipped[index] if len(states) > processor.window_frames else 0
            item = {"states": [states[skipped:]]}
            num_rows = -(-(len(states) - skipped) // processor.window_frames) * processor.window_tokens
        offset = skipped * self.frame_seconds
        said = [(token, first - offset, last - offset) for token, first, last in said if last > offset]
        row_seconds = self.frame_seconds * processor.window_frames / processor.window_tokens
        return item | {"targets": find_targets(said, num_rows=num_rows, row_seconds=row_seconds)}


__all__ = [
    "ClipWindows",
    "ConversationCollator",
    "ConversationDataset",
    "TranscriptCollator",
    "TranscriptDataset",
]
