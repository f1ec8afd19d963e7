"""CTC over padded batches: the loss of the rows that fit, named misfits, greedy and beam search decoding."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .ctc_labels import count_repeats

# Classes that a beam is extended with in a frame; the rest are improbable beside them.
NUM_EXTENSIONS = 12


def find_misfits(labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Returns which rows have more labels and repeats than frames `(batch,)`: no alignment fits them.

    Args:
        labels: Classes `(batch, tokens)`, negative beyond a row's end.
        lengths: Frames of each row `(batch,)`.

    Example:

    ```python
    >>> import torch
    >>> from modeling.ctc import find_misfits

    >>> find_misfits(torch.tensor([[5, 5], [5, 6]]), torch.tensor([2, 2])).tolist()  # 5 5 needs a blank between
    [True, False]

    ```
    """
    return ((labels >= 0).sum(-1) + count_repeats(labels)).to(lengths.device) > lengths


def ctc_loss_of_fitting(
    logits: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor, *, blank: int, name: str = "labels"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns the CTC loss in fp32, a label, and which rows had no part in it because they do not fit `(batch,)`.

    A row without labels has no part either: it would teach silence. An infinite loss is never set to zero: whatever
    is infinite or NaN here says so.

    Args:
        logits: Scores `(batch, frames, classes)`.
        lengths: Frames of each row that are not padding `(batch,)`.
        labels: Classes `(batch, tokens)`, negative beyond a row's end.
        blank: Class of the CTC blank.
        name: Of the labels, for messages.

    Raises:
        ValueError: A label is the blank or no class.
    """
    check_classes(labels, logits.shape[-1], blank=blank, name=name)
    lengths = lengths.to(logits.device)
    num_labels = (labels >= 0).sum(-1)
    misfits = find_misfits(labels, lengths)
    rows = (~misfits & (num_labels > 0)).nonzero().flatten()
    if not len(rows):
        return logits.sum() * 0.0, misfits
    with torch.autocast(logits.device.type, enabled=False), torch.backends.cudnn.flags(enabled=False):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_probs = logits[rows].to(dtype).log_softmax(-1).transpose(0, 1)  # (frames, rows, classes)
        targets, num_targets = labels[rows].clamp(min=0), num_labels[rows]
        loss = nn.functional.ctc_loss(log_probs, targets, lengths[rows], num_targets, blank=blank, reduction="sum")
    return loss / num_targets.sum(), misfits


def check_classes(labels: torch.Tensor, num_classes: int, *, blank: int | None, name: str) -> None:
    """
    Makes sure that labels are classes other than the blank.

    Raises:
        ValueError: One is not.
    """
    if labels.numel() and int(labels.max()) >= num_classes:
        raise ValueError(
            f"`{name}` must be classes below {num_classes}, got {int(labels.max())}. They were made with another "
            "vocabulary than the model's."
        )
    if blank is not None and (labels == blank).any():
        rows = (labels == blank).any(-1).nonzero().flatten().tolist()
        raise ValueError(
            f"`{name}` must not hold the CTC blank, {blank}, got it in rows {rows}. Pad labels with -100, and give "
            "the blank a class of its own."
        )


def collapse_ctc(
    classes: torch.Tensor, lengths: torch.Tensor, *, blank: int, dropped: Sequence[int] = ()
) -> list[list[int]]:
    """
    Returns the labels that the best class of each frame says: repeats once, then no blanks.

    Args:
        classes: Class of each frame `(batch, frames)`.
        lengths: Frames of each row that are not padding `(batch,)`.
        blank: Class of the CTC blank.
        dropped: Classes that are no labels, such as padding.

    Example:

    ```python
    >>> import torch
    >>> from modeling.ctc import collapse_ctc

    >>> collapse_ctc(torch.tensor([[5, 5, 0, 5, 7, 7]]), torch.tensor([5]), blank=0)
    [[5, 5, 7]]

    ```
    """
    unwanted = {blank, *dropped}
    return [
        [label for label in row[:num_frames].unique_consecutive().tolist() if label not in unwanted]
        for row, num_frames in zip(classes.cpu(), lengths.tolist(), strict=True)
    ]


def beam_search_ctc(log_probs: torch.Tensor, *, blank: int, num_beams: int) -> list[int]:
    """
    Returns the labels of highest probability over all their alignments that a beam search finds.

    Each beam keeps the log-probability that it ends in a blank and that it ends in its last label, so that a repeat
    with a blank between is a new label and one without is not.

    Args:
        log_probs: Log-probabilities of one row `(frames, classes)`.
        blank: Class of the CTC blank.
        num_beams: Beams that are kept.

    Raises:
        ValueError: `num_beams` is below 1.

    Source: Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition" (arXiv 1408.2873), algorithm 1.

    Example:

    ```python
    >>> import torch
    >>> from modeling.ctc import beam_search_ctc

    >>> log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()  # best path: two blanks, .36; label 1: .64
    >>> beam_search_ctc(log_probs, blank=0, num_beams=1), beam_search_ctc(log_probs, blank=0, num_beams=2)
    ([], [1])

    ```
    """
    if num_beams < 1:
        raise ValueError(f"`num_beams` must be at least 1, got {num_beams}.")
    scores, classes = log_probs.double().cpu().topk(min(NUM_EXTENSIONS, log_probs.shape[-1]), dim=-1)
    blanks = log_probs[:, blank].double().tolist()
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}  # ends in a blank, in its last label
    for frame_scores, frame_classes, blank_score in zip(scores.tolist(), classes.tolist(), blanks, strict=True):
        extended: dict[tuple[int, ...], tuple[float, float]] = {}
        for prefix, (in_blank, in_label) in beams.items():
            total = _add(in_blank, in_label)
            _note(extended, prefix, total + blank_score, -math.inf)
            for score, label in zip(frame_scores, frame_classes, strict=True):
                if label == blank:
                    continue
                if prefix and label == prefix[-1]:
                    _note(extended, prefix, -math.inf, in_label + score)
                    _note(extended, (*prefix, label), -math.inf, in_blank + score)
                else:
                    _note(extended, (*prefix, label), -math.inf, total + score)
        best = sorted(extended.items(), key=lambda beam: _add(*beam[1]), reverse=True)
        beams = dict(best[:num_beams])
    return list(max(beams.items(), key=lambda beam: _add(*beam[1]))[0])


def _note(beams: dict, prefix: tuple[int, ...], in_blank: float, in_label: float) -> None:
    before = beams.get(prefix, (-math.inf, -math.inf))
    beams[prefix] = (_add(before[0], in_blank), _add(before[1], in_label))


def _add(first: float, second: float) -> float:
    """The logarithm of a sum of two exponentials."""
    high, low = max(first, second), min(first, second)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
