"""Rows of a corpus by speaker."""

import logging
import unicodedata
from collections.abc import Iterable, Sequence

from datasets import Dataset

logger = logging.getLogger(__name__)

NUM_NAMED = 10  # speakers that a message lists


def select_speakers(corpus: Dataset, speaker_ids: Sequence[str], *, exclude: bool = False) -> Dataset:
    """
    Returns the rows of some speakers, or of all the others.

    Args:
        corpus: Dataset with a column `speaker_id`.
        speaker_ids: Speakers, each with at least one row. An accent may be composed in one place and not in the other.
        exclude: Takes the others' rows.

    Raises:
        ValueError: There is no column `speaker_id`, no row of a speaker, or no row left.
    """
    if "speaker_id" not in corpus.column_names:
        raise ValueError(
            f"`speaker_id` must be a column of the corpus, got the columns {', '.join(corpus.column_names)}. Add or "
            "rename it."
        )
    row_speakers = corpus["speaker_id"][:]
    known = sorted({speaker for speaker in row_speakers if speaker is not None})
    chosen = {_find_speaker(speaker_id, known) for speaker_id in speaker_ids}
    rows = [index for index, speaker in enumerate(row_speakers) if (speaker in chosen) != exclude]
    if not rows:
        raise ValueError(
            f"`speaker_ids` must leave some of the {len(known)} speakers ({_list_first(known)}), got "
            f"{list(speaker_ids)} {'excluded' if exclude else 'selected'}: no data is left. Name other speakers."
        )
    return corpus.select(rows)


def share_speakers(train: Dataset, evaluation: Dataset) -> list[str]:
    """
    Returns the sorted speakers of both corpora; those of one of them alone are named in a warning.

    Args:
        train: Rows to train on, with `speaker_id`.
        evaluation: Rows to evaluate on, likewise.

    Raises:
        ValueError: No speaker is in both.
    """
    names = [{speaker for speaker in corpus["speaker_id"][:] if speaker} for corpus in (train, evaluation)]
    reasons = []
    for own, others, missing in ((*names, "evaluate"), (*names[::-1], "train")):
        if alone := sorted(own - others):
            reasons.append(f"nothing to {missing} on for {_list_first(alone)}")
    num_all, shared = len(names[0] | names[1]), sorted(names[0] & names[1])
    if not shared:
        raise ValueError(
            "`speaker_id` all must find a speaker with data to train and to evaluate on, got none of "
            f"{num_all}: {'; '.join(reasons)}. Record more, split each speaker's recordings, or name other splits."
        )
    if reasons:
        logger.warning("%d of %d speakers are left out: %s.", num_all - len(shared), num_all, "; ".join(reasons))
    return shared


def _find_speaker(speaker_id: str, known: Sequence[str]) -> str:
    """Returns a speaker as the corpus spells it, whose Unicode may be composed or not."""
    composed = unicodedata.normalize("NFC", speaker_id)
    alike = [name for name in known if unicodedata.normalize("NFC", name) == composed]
    if speaker_id not in known and len(alike) != 1:
        raise ValueError(
            f"`speaker_id` must be one of the {len(known)} speakers with data here ({_list_first(known)}), got "
            f"{speaker_id!r}: there is no data for this speaker. Correct the name, or record and add the speaker."
        )
    return speaker_id if speaker_id in known else alike[0]


def _list_first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
