"""Sequences of tokens packed into rows: several behind one another, so that at most a tenth of a batch is padding.

    row 0   a a a a a a a   c c c     tokens of three sequences, and a cell of padding
    row 1   b b b b b b b b b b .
    position_ids of row 0: 0 1 2 3 4 5 6   0 1 2   a sequence begins where they begin again, and attends to itself

transformers makes the block-diagonal mask from such positions where no `attention_mask` is given.
"""

from collections.abc import Sequence

import torch

from .collators import IGNORED_LABEL

MAX_PADDING = 0.1  # share of a batch's cells


def plan_rows(lengths: Sequence[int], *, max_padding: float = MAX_PADDING) -> list[list[int]]:
    """
    Returns which sequences share a row: as few tokens a row as `max_padding` allows, because attention costs squares.

    Rows are filled first fit, the longest sequence first. One row of all sequences has no padding, so there is always
    a plan.

    Args:
        lengths: Tokens of each sequence.
        max_padding: Largest share of the cells of all rows that may be padding.

    Example:

    ```python
    >>> from data.packing import plan_rows

    >>> plan_rows([7, 10, 3])
    [[1], [0, 2]]

    ```
    """
    total, longest = sum(lengths), max(lengths)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for num_rows in range(len(lengths), 1, -1):
        capacity = max(longest, -(-total // num_rows))
        rows = _fill(order, lengths, capacity)
        width = max(sum(lengths[index] for index in row) for row in rows)
        if total >= (1 - max_padding) * width * len(rows):
            return rows
    return [order]


def _fill(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[int] = []
    for index in order:
        place = next((row for row, room in enumerate(free) if room >= lengths[index]), None)
        if place is None:
            rows.append([])
            free.append(capacity)
            place = len(rows) - 1
        rows[place].append(index)
        free[place] -= lengths[index]
    return rows


def pack_sequences(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_token_id: int
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """
    Packs tokens and labels into rows by [`plan_rows`].

    Args:
        sequences: Tokens and labels of each, of one length; the label of a sequence's first token is never learned.
        pad_token_id: Fills the ends of rows, as sequences of their own that nothing attends to.

    Returns:
        `input_ids`, `position_ids` and `labels`, all `(rows, tokens)`, and the order in which the sequences now stand,
        row after row: clips of audio must follow it.
    """
    rows = plan_rows([len(tokens) for tokens, _ in sequences])
    width = max(sum(len(sequences[index][0]) for index in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORED_LABEL)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)  # a cell of padding is a sequence of one token
    for row, indices in enumerate(rows):
        start = 0
        for index in indices:
            tokens, targets = (torch.as_tensor(values) for values in sequences[index])
            end = start + len(tokens)
            input_ids[row, start:end], labels[row, start:end] = tokens, targets
            labels[row, start] = IGNORED_LABEL  # what comes before it belongs to another sequence
            position_ids[row, start:end] = torch.arange(len(tokens))
            start = end
    order = [index for indices in rows for index in indices]
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}, order


__all__ = ["MAX_PADDING", "pack_sequences", "plan_rows"]
