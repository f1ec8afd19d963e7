"""Rows of a corpus that cannot be used: a few are left out and named, many mean that the corpus is wrong."""

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)

MAX_SHARE = 0.05  # above it the corpus is wrong rather than a few of its rows
NUM_NAMED = 5  # rows that a message names before it says how many more there are
MIN_STREAMED = 100  # rows of a stream before its share is judged


def report_left_out(
    reasons: Sequence[str], num_rows: int, *, what: str, remedy: str, error_class: type[ValueError] = ValueError
) -> None:
    """
    Warns of rows that are left out, once.

    Args:
        reasons: What is wrong with each of them, without a full stop.
        num_rows: All rows, with those left out.
        what: The message's middle, after "3 of 200 ".
        remedy: What to do where they are too many.
        error_class: What to raise then.

    Raises:
        ValueError: They are more than 5 % of the rows.
    """
    if not reasons:
        return
    more = f" and {len(reasons) - NUM_NAMED} more" if len(reasons) > NUM_NAMED else ""
    message = f"{len(reasons)} of {num_rows} {what}: {'; '.join(reasons[:NUM_NAMED])}{more}."
    if len(reasons) > MAX_SHARE * num_rows:
        raise error_class(f"{message} {remedy}")
    logger.warning("%s They are left out.", message)


class StreamedRows:
    """
    Counts the rows of a stream, whose share of unusable ones shows only while it is read.

    Args:
        what: As for [`report_left_out`].
        remedy: Likewise.
    """

    def __init__(self, *, what: str, remedy: str):
        self.what, self.remedy = what, remedy
        self.num_rows, self.reasons = 0, []

    def note(self, reason: str | None) -> None:
        """
        Counts a row; one with a reason is left out, with a warning.

        Raises:
            ValueError: More than 5 % of the rows so far, and of the first 100, are unusable.
        """
        self.num_rows += 1
        if reason is not None:
            self.reasons.append(reason)
            logger.warning("%s. It is left out.", reason)
            if len(self.reasons) > MAX_SHARE * max(self.num_rows, MIN_STREAMED):
                report_left_out(self.reasons, self.num_rows, what=self.what, remedy=self.remedy)
