"""Utterances in blocks of segments: what lets Emformer compute whole utterances at a cost linear in their duration."""

from functools import cached_property

import torch
from torch import nn

from .configuration_emformer import EmformerConfig

# Blocks of fewer frames than this cost more in calls than they save in attention.
MIN_BLOCK_FRAMES = 32


def make_additive_mask(is_allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Returns what attention adds to its scores: 0 where `is_allowed`, and a very low number elsewhere.

    Queries without any key, which are padding, see all of them: their values are finite and are used nowhere.

    Args:
        is_allowed: Whether a query sees a key `(..., queries, keys)`.
        dtype: Of the scores.
    """
    is_allowed = is_allowed | ~is_allowed.any(-1, keepdim=True)
    mask = torch.zeros(is_allowed.shape, dtype=dtype, device=is_allowed.device)
    return mask.masked_fill_(~is_allowed, torch.finfo(dtype).min)


class EmformerBlocks:
    """
    Lays utterances out in blocks of segments, each with the rows that it queries and the keys that these see.

    With 2 segments `a b` a block, 3 frames a segment, right context 1 and left context 2, the second block of an
    utterance `0 1 2 | 3 4 5 | 6 7 8 | 9 ...` is

        rows     memory of a, of b | right contexts 9 12 | frames 6 7 8 9 10 11
        queries                      right contexts 9 12 | frames 6 7 8 9 10 11 | summaries of a, of b
        keys     earlier memories    right contexts 9 12 | frames 4 5 6 7 8 9 10 11

    A frame of `b` sees frames 7 to 11, right context 12 and the memories before `b`. A right context is a copy of the
    frames behind its segment that goes through all layers with it, so that no output waits for more than these.

    Args:
        config: Of the model.
        lengths: Real frames of each utterance `(batch,)`, or None where all are as long as the batch.
        num_frames: Frames of the batch.
        segment_length: Frames a segment.
        dtype: Of the attention mask.
        device: Of everything.
    """

    def __init__(
        self,
        config: EmformerConfig,
        lengths: torch.Tensor | None,
        num_frames: int,
        *,
        segment_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.segment_length = segment_length
        self.right_context_length = config.right_context_length
        self.left_context_length = config.left_context_length
        self.max_memory_size = config.max_memory_size
        self.has_summaries = config.max_memory_size > 0 and config.memory_type == "attention"
        self.lengths, self.num_frames, self.dtype, self.device = lengths, num_frames, dtype, device
        # A block is at least as long as what it sees of the past, which is then found in the block before.
        num_segments = -(-num_frames // segment_length)
        past_segments = -(-max(config.left_context_length, MIN_BLOCK_FRAMES) // segment_length)
        self.num_blocks = max(1, num_segments // max(past_segments, config.max_memory_size))
        self.block_segments = -(-num_segments // self.num_blocks)

    @property
    def num_memory_rows(self) -> int:
        """Rows of a block that are memories."""
        return self.block_segments if self.has_summaries else 0

    def lay_out(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the rows `(batch, rows, hidden)` of frames `(batch, frames, hidden)`, block after block."""
        batch, num_frames, hidden = hidden_states.shape
        num_segments = self.num_blocks * self.block_segments
        missing = num_segments * self.segment_length - num_frames
        segments = nn.functional.pad(hidden_states, (0, 0, 0, missing)).view(batch, num_segments, -1, hidden)
        rows = [segments]
        if self.right_context_length:
            # The frames behind a segment are the first of the next one.
            rows.insert(0, nn.functional.pad(segments[:, 1:, : self.right_context_length], (0, 0, 0, 0, 0, 1)))
        if self.has_summaries:
            rows.insert(0, segments.mean(2))  # what the paper gives the first layer in place of a memory
        rows = [part.reshape(batch, self.num_blocks, -1, hidden) for part in rows]
        return torch.cat(rows, 2).flatten(1, 2)

    def take_frames(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the frames `(batch, frames, hidden)` among rows `(batch, rows, hidden)`."""
        block_frames = self.block_segments * self.segment_length
        return rows.unflatten(1, (self.num_blocks, -1))[:, :, -block_frames:].flatten(1, 2)[:, : self.num_frames]

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns rows `(batch, rows, hidden)` as blocks `(batch * blocks, rows of one, hidden)`."""
        return rows.view(len(rows) * self.num_blocks, -1, rows.shape[-1])

    def update(self, key_value: torch.Tensor, memory_key_value: torch.Tensor | None, _layer_idx: int) -> torch.Tensor:
        """
        Returns the keys and values that each block sees, `(batch * blocks, keys, width)`.

        Args:
            key_value: Keys and values of the blocks' right contexts and frames `(batch * blocks, rows, width)`.
            memory_key_value: Those of their memories `(batch * blocks, segments, width)`, where there are summaries.
        """
        block_frames = self.block_segments * self.segment_length
        right, frames = key_value.split([key_value.shape[1] - block_frames, block_frames], 1)
        parts = [right, *self._before(frames, self.left_context_length), frames]
        if self.max_memory_size:
            if memory_key_value is None:  # a linear map of a mean is the mean of the linear map
                memory_key_value = frames.unflatten(1, (-1, self.segment_length)).mean(2)
            parts = [*self._before(memory_key_value, self.max_memory_size), memory_key_value, *parts]
        return torch.cat(parts, 1)

    def _before(self, rows: torch.Tensor, count: int) -> list[torch.Tensor]:
        """The last `count` rows of the block before each block, zeros before the first; none if there is one block."""
        if self.num_blocks == 1 or count == 0:
            return []
        blocks = rows.unflatten(0, (-1, self.num_blocks))
        zeros = blocks.new_zeros(len(blocks), 1, count, rows.shape[-1])
        return [torch.cat([zeros, blocks[:, :-1, -count:]], 1).flatten(0, 1)]

    @cached_property
    def attention_mask(self) -> torch.Tensor:
        """What attention adds to the scores `(batch * blocks, 1, queries, keys)`."""
        is_allowed = self._is_in_reach & self._is_real_key.unsqueeze(-2)  # (batch or 1, blocks, queries, keys)
        return make_additive_mask(is_allowed, self.dtype).flatten(0, 1).unsqueeze(1)

    def expand_mask(self, num_utterances: int) -> torch.Tensor:
        """Returns the attention mask for so many utterances, where they share one."""
        if self.lengths is not None or num_utterances == 1:
            return self.attention_mask
        return self.attention_mask.repeat(num_utterances, 1, 1, 1)

    def _arange(self, *args: int) -> torch.Tensor:
        return torch.arange(*args, device=self.device)

    @cached_property
    def _key_places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each key of a block: segment (memories, right contexts) or frame, counted from the block's start."""
        is_alone = self.num_blocks == 1
        memories = self._arange(-self.max_memory_size if not is_alone else 0, self.block_segments)
        memories = memories if self.max_memory_size else memories[:0]
        rights = self._arange(self.block_segments).repeat_interleave(self.right_context_length)
        first = 0 if is_alone else -self.left_context_length
        return memories, rights, self._arange(first, self.block_segments * self.segment_length)

    @cached_property
    def _is_in_reach(self) -> torch.Tensor:
        """Whether a query may see a key, `(queries, keys)`, the ends of utterances apart."""
        memories, rights, frames = self._key_places
        summaries = self._arange(self.num_memory_rows)
        queries = torch.cat([rights, self._arange(self.block_segments).repeat_interleave(self.segment_length)])
        queries = torch.cat([queries, summaries])[:, None]  # segment of each query
        start = queries * self.segment_length
        sees_memory = (memories < queries) & (memories >= queries - self.max_memory_size)
        if len(summaries):
            sees_memory[-len(summaries) :] = False
        sees_frame = (frames >= start - self.left_context_length) & (frames < start + self.segment_length)
        return torch.cat([sees_memory, rights == queries, sees_frame], 1)

    @cached_property
    def _is_real_key(self) -> torch.Tensor:
        """Whether a key lies between the ends of its utterance, `(batch or 1, blocks, keys)`."""
        memories, rights, frames = self._key_places
        blocks = self._arange(self.num_blocks)[:, None]
        lengths = torch.tensor([self.num_frames], device=self.device) if self.lengths is None else self.lengths
        ends = lengths.to(self.device)[:, None, None]
        copies = self._arange(self.right_context_length).repeat(self.block_segments)
        right_frames = (blocks * self.block_segments + rights + 1) * self.segment_length + copies
        frames = blocks * self.block_segments * self.segment_length + frames
        has_begun = (blocks * self.block_segments + memories >= 0).expand(len(ends), -1, -1)
        return torch.cat([has_begun, right_frames < ends, (frames >= 0) & (frames < ends)], 2)
