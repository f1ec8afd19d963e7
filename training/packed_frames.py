"""Frames of a batch one after the other without padding, in the order of torch's `PackedSequence`."""

from functools import cached_property

import torch


class PackedOrder:
    """
    Where the frames of a batch are in packed tensors `(frames, width)`.

    Rows are sorted by length, longest first; frame 0 of every row comes before frame 1 of every row that has one:

        a0 a1 a2
        b0 b1       ->   a0 b0 c0 a1 b1 a2
        c0

    Args:
        lengths: Frames of each row `(batch,)`, longest first.
        device: Where the packed tensors are.

    Raises:
        ValueError: The lengths are not sorted, or below 1.

    Example:

    ```python
    >>> import torch
    >>> from training.packed_frames import PackedOrder

    >>> order = PackedOrder(torch.tensor([3, 2, 1]))
    >>> order.batch_sizes, order.rows.tolist(), order.reverse.tolist()
    ([3, 2, 1], [0, 1, 2, 0, 1, 0], [5, 4, 2, 3, 1, 0])

    ```
    """

    def __init__(self, lengths: torch.Tensor, device: torch.device | str = "cpu"):
        self.lengths, self.device = lengths.detach().cpu(), torch.device(device)
        if len(lengths) == 0 or self.lengths[-1] < 1 or (self.lengths[1:] > self.lengths[:-1]).any():
            raise ValueError(
                f"`logits_lengths` must be at least 1 and the longest first, got {self.lengths.tolist()}. "
                "Sort the rows."
            )
        is_frame = torch.arange(int(self.lengths[0])).unsqueeze(1) < self.lengths  # (steps, batch)
        self.batch_sizes: list[int] = is_frame.sum(-1).tolist()
        steps, rows = is_frame.nonzero(as_tuple=True)
        self.steps, self.rows = steps.to(self.device), rows.to(self.device)

    @cached_property
    def cells(self) -> torch.Tensor:
        """Where each frame is in a padded `(steps * batch, ...)` grid: `(frames,)`."""
        return self.steps * len(self.lengths) + self.rows

    @cached_property
    def reverse(self) -> torch.Tensor:
        """The frame that stands in the place of each when every row runs backwards: `(frames,)`; its own inverse."""
        sizes = torch.tensor(self.batch_sizes, device=self.device)
        starts = sizes.cumsum(0) - sizes
        return starts[self.lengths.to(self.device)[self.rows] - 1 - self.steps] + self.rows

    def pad(self, frames: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """Returns packed `frames` `(frames, width)` as `(steps, batch, width)`, with `value` in the padding."""
        shape = (len(self.batch_sizes), len(self.lengths), frames.shape[-1])
        grid = frames.new_full((shape[0] * shape[1], shape[2]), value)
        return grid.index_copy(0, self.cells, frames).view(shape)
