"""Labels for CTC: how many frames they need, and whether there are so many."""

import torch


def check_labels_fit(labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Returns how many labels each row has `(batch,)`.

    Args:
        labels: Classes `(batch, tokens)`, negative beyond a transcript's end.
        lengths: Frames of logits of each row `(batch,)`.

    Raises:
        ValueError: A transcript needs more frames than there are (CTC would be infinite).
    """
    lengths, label_lengths = lengths.cpu(), (labels >= 0).sum(-1).cpu()
    required = label_lengths + count_repeats(labels).cpu()
    if (required > lengths).any():
        rows = (required > lengths).nonzero().flatten().tolist()
        raise ValueError(
            f"`labels` must fit the audio, got rows {rows} with {required[rows].tolist()} frames needed (labels "
            f"and repeats) and {lengths[rows].tolist()} there. Drop these utterances or check their transcripts."
        )
    return label_lengths


def count_repeats(labels: torch.Tensor) -> torch.Tensor:
    """
    Returns how often a label follows itself in `labels` `(batch, tokens)`, padded with negative values: `(batch,)`.

    CTC needs a blank between two equal labels, so a transcript needs its labels and its repeats in frames.
    """
    return ((labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] >= 0)).sum(-1)
