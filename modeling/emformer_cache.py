"""What Emformer's streams remember: keys and values of the left context and of memories, and frames that wait."""

from collections.abc import Sequence

import torch
from torch import nn

from .configuration_emformer import EmformerConfig, check_segment_length
from .emformer_blocks import make_additive_mask


def append_rows(
    first: torch.Tensor | None, num_first: Sequence[int], second: torch.Tensor, num_second: Sequence[int]
) -> torch.Tensor:
    """
    Puts the real frames of `second` behind those of `first`, row by row.

        first  a b .    second  x y z    num_first 2 1    ->   a b x y z
               c . .            u v .    num_second 3 2        c u v . .

    Args:
        first: `(batch, frames, width)`, or None for no frames.
        num_first: Real frames of each row of `first`.
        second: `(batch, frames, width)`.
        num_second: Real frames of each row of `second`.

    Returns:
        `(batch, most frames of a row, width)`; what stands behind a row's real frames means nothing.
    """
    if first is None or not any(num_first):
        return second
    if set(num_first) == {first.shape[1]}:
        return torch.cat([first, second], 1)
    is_real = torch.cat([is_before(num_first, first.shape[1]), is_before(num_second, second.shape[1])], 1)
    return align_left(torch.cat([first, second], 1), is_real)


def is_before(counts: Sequence[int], num_frames: int) -> torch.Tensor:
    """Returns which of `num_frames` frames are among the first `counts` of their row, `(batch, num_frames)`."""
    return torch.arange(num_frames) < torch.tensor(counts)[:, None]


def align_left(frames: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Returns the frames `(batch, frames, width)` that are real, in order, shifted to the left of their row."""
    places = is_real.logical_not().byte().argsort(dim=1, stable=True)[:, : is_real.sum(1).max()]
    return _gather(frames, places)


def drop_rows(frames: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Returns `frames` `(batch, frames, width)` without the first `counts` of each row, shifted to the left."""
    if len(set(counts)) == 1:
        return frames[:, counts[0] :]
    places = torch.arange(frames.shape[1] - min(counts)) + torch.tensor(counts)[:, None]
    return _gather(frames, places)


def _gather(frames: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    places = places.clamp(max=frames.shape[1] - 1).to(frames.device)
    return frames.gather(1, places[:, :, None].expand(-1, -1, frames.shape[2]))


class EmformerPaddingCache:
    """
    What the subsampling of streams remembers: frames that do not fill its stride yet, and each convolution's past.

    Args:
        config: Of the model.
    """

    def __init__(self, config: EmformerConfig):
        self.factor = config.subsampling_factor
        self.remainder: torch.Tensor | None = None  # (batch, frames, mel)
        self.num_remaining: list[int] = []
        self.states: list[torch.Tensor] = []  # of each convolution (batch, channels, frames)

    @property
    def batch_size(self) -> int:
        """Streams in the cache; 0 before the first call."""
        return len(self.num_remaining)

    def take_whole_strides(self, features: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """
        Returns the frames that can be subsampled now, `(batch, frames, mel)`, and how many there are in each row.

        Args:
            features: New frames `(batch, frames, mel)`.
            counts: How many of each row are real.
        """
        self.num_remaining = self.num_remaining or [0] * len(counts)
        features = append_rows(self.remainder, self.num_remaining, features, counts)
        totals = [old + new for old, new in zip(self.num_remaining, counts, strict=True)]
        usable = [total // self.factor * self.factor for total in totals]
        self.num_remaining = [total - use for total, use in zip(totals, usable, strict=True)]
        self.remainder = drop_rows(features, usable)[:, : self.factor - 1].clone()
        return features[:, : max(usable)], usable

    def update(
        self, hidden_states: torch.Tensor, counts: Sequence[int], layer_idx: int, left_padding: int
    ) -> torch.Tensor:
        """
        Returns the input of a convolution with its past before it, and remembers the last frames of each row.

        Args:
            hidden_states: `(batch, channels, frames)`.
            counts: How many frames of each row are real.
            layer_idx: Of the convolution.
            left_padding: Frames of the past that it sees; zeros before a stream's first.

        Returns:
            `(batch, channels, left_padding + frames)`.
        """
        if len(self.states) == layer_idx:
            self.states.append(hidden_states.new_zeros(*hidden_states.shape[:2], left_padding))
        padded = torch.cat([self.states[layer_idx], hidden_states], 2)
        ends = drop_rows(padded.mT, counts)[:, :left_padding].mT if left_padding else padded[:, :, :0]
        self.states[layer_idx] = ends.clone()
        return padded

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Begins new streams in `rows`, by default in all."""
        for row in range(len(self.num_remaining)) if rows is None else rows:
            self.num_remaining[row] = 0
            for state in self.states:
                state[row] = 0

    def batch_select_indices(self, indices: Sequence[int] | torch.Tensor) -> None:
        """Keeps the streams `indices`, in that order; one may come several times."""
        indices = torch.as_tensor(indices)
        self.num_remaining = [self.num_remaining[row] for row in indices.tolist()] if self.num_remaining else []
        _select(self, "remainder", indices)
        self.states = [state.index_select(0, indices.to(state.device)) for state in self.states]

    reorder_cache = batch_select_indices  # under the name that generation with beams calls


class EmformerCache:
    """
    Keys and values that streams of [`EmformerModel`] have seen, and frames that wait for their right context.

    Each layer has one preallocated tensor of keys and values side by side, of these rows:

        memories | right context | left context and segment, a ring

    A frame `f` lives at place `f mod (left_context_length + segment_length)` of the ring: a segment replaces exactly
    the frames that left the left context, and nothing moves. Rows of a batch are streams with positions of their own.

    Args:
        config: Of the model.
        segment_length: Frames a segment in place of the configuration's.

    Raises:
        ValueError: `segment_length` is under 1, or shorter than the right context.
    """

    def __init__(self, config: EmformerConfig, *, segment_length: int | None = None):
        self.config = config
        self.segment_length = config.segment_length if segment_length is None else segment_length
        check_segment_length(self.segment_length, config.right_context_length)
        self.ring_length = config.left_context_length + self.segment_length
        self.ring_start = config.max_memory_size + config.right_context_length
        self.num_keys = self.ring_start + self.ring_length
        self.key_values: torch.Tensor | None = None  # (layers, batch, num_keys, 2 * hidden)
        self.pending: torch.Tensor | None = None  # frames that no segment has taken (batch, frames, hidden)
        self.num_pending: list[int] = []
        self.num_frames: list[int] = []  # of each stream that segments have taken
        self.is_over: list[bool] = []
        self.steady_mask: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Streams in the cache; 0 before the first call."""
        return len(self.num_frames)

    def get_seq_length(self, row: int = 0) -> int:
        """Returns how many frames of a stream have been encoded."""
        return self.num_frames[row] if self.num_frames else 0

    def check(self, counts: Sequence[int]) -> None:
        """
        Makes sure that new frames fit the streams, before anything is changed.

        Args:
            counts: How many frames of each row are new.

        Raises:
            ValueError: The batch has another size than before, or a row's stream is over already.
        """
        if not self.batch_size:
            return
        if len(counts) != self.batch_size:
            raise ValueError(
                f"`past_key_values` must be of a batch of {len(counts)}, got one of {self.batch_size}. Select its "
                "rows, or begin with a new one."
            )
        late = [row for row, count in enumerate(counts) if self.is_over[row] and count]
        if late:
            raise ValueError(
                f"`input_features` must have no frames for streams that are over, got some for rows {late}. Reset "
                "these rows of both caches, or mask their frames."
            )

    def append(self, inputs_embeds: torch.Tensor, counts: Sequence[int], is_last: Sequence[bool]) -> None:
        """
        Adds new frames to those that wait.

        Args:
            inputs_embeds: New frames `(batch, frames, hidden)`.
            counts: How many of each row are real.
            is_last: Rows whose stream ends with them.
        """
        if not self.batch_size:
            self._initialize(inputs_embeds)
        self.pending = append_rows(self.pending, self.num_pending, inputs_embeds, counts)
        self.num_pending = [old + new for old, new in zip(self.num_pending, counts, strict=True)]
        self.is_over = [old or new for old, new in zip(self.is_over, is_last, strict=True)]

    def _initialize(self, inputs_embeds: torch.Tensor) -> None:
        batch, _, hidden = inputs_embeds.shape
        shape = (self.config.num_hidden_layers, batch, self.num_keys, 2 * hidden)
        self.key_values = inputs_embeds.new_zeros(shape)
        self.num_pending, self.num_frames, self.is_over = [0] * batch, [0] * batch, [False] * batch

    def find_ready_rows(self) -> list[int]:
        """Returns the rows that have a segment and its right context, or whose stream is over with frames left."""
        needed = self.segment_length + self.config.right_context_length
        return [
            row for row, count in enumerate(self.num_pending) if count >= needed or (count > 0 and self.is_over[row])
        ]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Begins new streams in `rows`, by default in all; the others go on as they were."""
        for row in range(self.batch_size) if rows is None else rows:
            self.num_pending[row] = self.num_frames[row] = 0
            self.is_over[row] = False
            self.key_values[:, row] = 0  # a stream that went wrong leaves no NaN behind

    def batch_select_indices(self, indices: Sequence[int] | torch.Tensor) -> None:
        """Keeps the streams `indices`, in that order; one may come several times, and go on in different ways."""
        indices = torch.as_tensor(indices)
        for name in ("num_pending", "num_frames", "is_over"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in indices.tolist()] if values else values)
        _select(self, "pending", indices)
        if self.key_values is not None:
            self.key_values = self.key_values.index_select(1, indices.to(self.key_values.device))

    reorder_cache = batch_select_indices  # under the name that generation with beams calls


def _select(cache: object, name: str, indices: torch.Tensor) -> None:
    tensor = getattr(cache, name)
    setattr(cache, name, None if tensor is None else tensor.index_select(0, indices.to(tensor.device)))


class EmformerStep:
    """
    One segment of each stream that has one, in the place of [`EmformerBlocks`]: its rows, its keys, its mask.

    Streams that have none go along, so that a row of the batch is always the same stream: what they compute means
    nothing, and is stored where their own next segment will be.

    Args:
        cache: Of the streams.
    """

    def __init__(self, cache: EmformerCache):
        config = cache.config
        self.cache, self.segment_length = cache, cache.segment_length
        self.right_context_length, self.max_memory_size = config.right_context_length, config.max_memory_size
        self.has_summaries = config.max_memory_size > 0 and config.memory_type == "attention"
        self.num_memory_rows = int(self.has_summaries)
        ready = cache.find_ready_rows()
        available = [count if row in ready else 0 for row, count in enumerate(cache.num_pending)]
        self.num_frames = [min(count, self.segment_length) for count in available]
        self.num_right = [
            min(count - taken, self.right_context_length)
            for count, taken in zip(available, self.num_frames, strict=True)
        ]
        self.is_full = min(self.num_frames) == self.segment_length and min(self.num_right) == self.right_context_length
        self._memories: list[torch.Tensor] = []
        right_places = range(self.max_memory_size, cache.ring_start)
        places = []  # in the keys of all streams, one behind the other
        for row, start in enumerate(cache.num_frames):
            ring = (
                frame % cache.ring_length + cache.ring_start for frame in range(start, start + self.segment_length)
            )
            places += [row * cache.num_keys + place for place in (*right_places, *ring)]
        self._places = torch.tensor(places, device=cache.key_values.device)

    def lay_out(self) -> torch.Tensor:
        """Returns the rows of the segments: memory, right context, frames `(streams, rows, hidden)`."""
        length, ahead = self.segment_length, self.right_context_length
        frames = self.cache.pending[:, : length + ahead]
        if not self.is_full:
            frames = nn.functional.pad(frames, (0, 0, 0, length + ahead - frames.shape[1]))
            counts = [own + right for own, right in zip(self.num_frames, self.num_right, strict=True)]
            is_empty = ~is_before(counts, length + ahead)[:, :, None]
            frames = frames.masked_fill(is_empty.to(frames.device), 0.0)
        rows = [frames[:, length:], frames[:, :length]]
        if self.has_summaries:
            rows.insert(0, rows[1].mean(1, keepdim=True))
        return torch.cat(rows, 1)

    def take_frames(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the frames `(streams, frames, hidden)` among rows `(streams, rows, hidden)`."""
        return rows[:, -self.segment_length :]

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """A stream takes one segment at a time: its rows are one block."""
        return rows

    def update(self, key_value: torch.Tensor, memory_key_value: torch.Tensor | None, layer_idx: int) -> torch.Tensor:
        """
        Stores the keys and values of the segments' own rows, and returns all that they see `(streams, keys, width)`.

        Args:
            key_value: Keys and values of right context and frames `(streams, rows, width)`.
            memory_key_value: Those of the memory `(streams, 1, width)`, where there are summaries.
            layer_idx: Of the layer.
        """
        if self.max_memory_size:
            if memory_key_value is None:  # a linear map of a mean is the mean of the linear map
                memory_key_value = key_value[:, -self.segment_length :].mean(1, keepdim=True)
            self._memories.append(memory_key_value[:, 0])
        layer = self.cache.key_values[layer_idx]
        layer.view(-1, layer.shape[2]).index_copy_(0, self._places, key_value.reshape(-1, layer.shape[2]))
        return layer

    def make_mask(self) -> torch.Tensor | None:
        """Returns what attention adds to the scores `(streams or 1, 1, queries, keys)`; None if nothing is hidden."""
        cache, config = self.cache, self.cache.config
        full_past = max(config.left_context_length, self.max_memory_size * self.segment_length)
        if self.is_full and min(cache.num_frames) >= full_past:
            if self.has_summaries and cache.steady_mask is None:
                cache.steady_mask = self._hide_memories(torch.ones(1, cache.num_keys, dtype=torch.bool))
            return cache.steady_mask
        # The newest frame that place p of the ring can have: before the segment's end, and p modulo the ring's length.
        starts = torch.tensor(cache.num_frames)[:, None]
        last = starts + self.segment_length - 1
        frames = last - (last - torch.arange(cache.ring_length)) % cache.ring_length
        is_frame = (frames >= 0) & (frames < starts + torch.tensor(self.num_frames)[:, None])
        is_right = is_before(self.num_right, self.right_context_length)
        is_memory = torch.arange(self.max_memory_size) < starts // self.segment_length
        return self._hide_memories(torch.cat([is_memory, is_right, is_frame], 1))

    def _hide_memories(self, is_key: torch.Tensor) -> torch.Tensor:
        """Returns the additive mask of `is_key` `(streams, keys)`, in which a summary sees no memory."""
        is_allowed = is_key[:, None, None]  # (streams, 1, queries, keys)
        if self.has_summaries:
            is_allowed = is_allowed.repeat(1, 1, self.right_context_length + self.segment_length + 1, 1)
            is_allowed[:, :, -1, : self.max_memory_size] = False
        key_values = self.cache.key_values
        return make_additive_mask(is_allowed.to(key_values.device), key_values.dtype)

    def commit(self) -> None:
        """Moves the streams on by their segments, once all layers have run."""
        cache = self.cache
        if self._memories:
            memories = torch.stack(self._memories)  # (layers, streams, 2 * hidden)
            rows = [row for row, count in enumerate(self.num_frames) if count]
            # The newest memory takes the place of the oldest.
            numbers = [cache.num_frames[row] // self.segment_length % self.max_memory_size for row in rows]
            cache.key_values[:, rows, numbers] = memories[:, rows]
        cache.num_frames = [old + count for old, count in zip(cache.num_frames, self.num_frames, strict=True)]
        cache.num_pending = [old - count for old, count in zip(cache.num_pending, self.num_frames, strict=True)]
        cache.pending = drop_rows(cache.pending, self.num_frames)


def collect_frames(
    parts: Sequence[tuple[Sequence[int], Sequence[torch.Tensor]]], batch_size: int, empty: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[int]]:
    """
    Puts the frames of several steps one behind the other, row by row, with zeros behind a stream's last.

    Args:
        parts: Of each step, how many frames of each stream are real, and states `(batch, segment, hidden)`.
        batch_size: Streams.
        empty: What each of the states is without any step, `(batch, 0, hidden)`.

    Returns:
        Each of the states `(batch, frames, hidden)`, and how many frames of each stream are real.
    """
    totals = [sum(counts[row] for counts, _ in parts) for row in range(batch_size)]
    if not parts:
        return list(empty), totals
    states = [torch.cat(steps, 1) for steps in zip(*(steps for _, steps in parts), strict=True)]
    is_real = torch.cat([is_before(counts, steps[0].shape[1]) for counts, steps in parts], 1)
    if is_real.all():
        return states, totals
    is_padding = ~is_before(totals, max(totals))[:, :, None].to(states[0].device)
    return [align_left(state, is_real).masked_fill(is_padding, 0.0) for state in states], totals
