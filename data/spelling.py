"""Which transcripts a recogniser can learn from, and what it cannot write of those that it is judged by."""

import logging
from collections.abc import Mapping, Sequence
from statistics import median

import regex
from datasets import Dataset

from .left_out import NUM_NAMED, report_left_out
from .text import find_language, find_text_unit, find_unknown_characters, list_writable, name_characters

logger = logging.getLogger(__name__)

# Longest clip that is trained on unless a recipe's flag says otherwise; LibriSpeech's longest utterance has 35 s.
MAX_CLIP_SECONDS = 40.0
# Fewer characters a second than these, or than this share of the corpus's median, are hardly all that is said.
MIN_CHARACTER_RATE = 0.5
MIN_RATE_SHARE = 0.1
TURKIC_LETTER = regex.compile("[\u0131\u0130]")


def find_faults(texts: Sequence[str], tokenizer) -> dict[int, str]:
    """
    Returns what keeps normalised transcripts from being trained on, by row: no word, or unknown characters.

    Example:
        >>> find_faults(["go", ""], type("Tokenizer", (), {"get_vocab": lambda self: {"g": 3, "o": 4}})())
        {1: 'no word'}
    """
    faults = {row: "no word" for row, text in enumerate(texts) if not text}
    unknown = find_unknown_characters(texts, list_writable(tokenizer), text_unit=find_text_unit(tokenizer))
    rows: dict[int, list[str]] = {}
    for character, numbers in unknown.items():
        for number in numbers:
            rows.setdefault(number - 1, []).append(character)
    return dict(sorted((faults | {row: name_characters(found) for row, found in rows.items()}).items()))


def select_spelled(texts: Sequence[str], names: Sequence[str], tokenizer) -> list[int]:
    """
    Returns the rows of normalised transcripts that can be trained on; the others are named in a warning.

    Args:
        texts: Normalised transcripts, one a row.
        names: What messages call the rows.
        tokenizer: CTC tokenizer.

    Raises:
        ValueError: More than 5 % of the rows have no word, or characters outside the vocabulary.
    """
    faults = find_faults(texts, tokenizer)
    report_left_out(
        [f"{names[row]}: {fault}" for row, fault in faults.items()],
        len(texts),
        what=f"values of `text` have no word or characters outside the vocabulary of {len(tokenizer)} tokens",
        remedy="Correct them or remove the rows, or use a model whose vocabulary has the characters.",
    )
    return [row for row in range(len(texts)) if row not in faults]


def note_unspelled(texts: Sequence[str], tokenizer) -> None:
    """
    Says how many references hold what the model cannot write, which counts as errors.

    Args:
        texts: Normalised references.
        tokenizer: CTC tokenizer.

    Raises:
        ValueError: No reference has a word.
    """
    if not any(texts):
        raise ValueError(
            f"`text` must have a word in some reference, got {len(texts)} without. Check the transcripts."
        )
    unknown = find_unknown_characters(texts, list_writable(tokenizer), text_unit=find_text_unit(tokenizer))
    if unknown:
        logger.warning(
            "%d of %d references have characters outside the model's vocabulary, which count as errors: %s.",
            *(len(set().union(*unknown.values())), len(texts), name_characters(unknown)),
        )
    if num_empty := sum(not text for text in texts):
        logger.warning("%d of %d references have no word: every word heard there is an error.", num_empty, len(texts))


def note_language(texts: Sequence[str], tokenizer) -> None:
    """Warns where raw transcripts look Turkish and no language says how "I" is written in lower case."""
    turkic = [text for text in texts if TURKIC_LETTER.search(text)]
    if turkic and find_language(tokenizer) is None and any("I" in text for text in texts):
        logger.warning(
            '%d of %d transcripts have a dotless \u0131 or a dotted \u0130, %r first, and "I" is read as i. Give '
            "`--language tr` (or az, kk ...) if it is the capital of \u0131.",
            *(len(turkic), len(texts), turkic[0]),
        )


def drop_long(table: Dataset, *, max_seconds: float, sampling_rate: int) -> Dataset:
    """
    Returns the clips of at most `max_seconds`; the others are named in a warning.

    Raises:
        ValueError: `max_seconds` is not positive, or more than 5 % of the clips are longer.
    """
    if not max_seconds > 0:
        raise ValueError(f"`max_clip_seconds` must be positive, got {max_seconds}. Give the longest clip's seconds.")
    seconds = [samples / sampling_rate for samples in table["num_samples"]]
    long = [row for row in range(len(seconds)) if seconds[row] > max_seconds]
    names = table["name"][:] if long else []
    report_left_out(
        [f"{names[row]} ({seconds[row]:.1f} s)" for row in long],
        len(seconds),
        what=f"clips are longer than `max_clip_seconds` ({max_seconds:g})",
        remedy="Cut them with their transcripts, or raise `max_clip_seconds` if each transcript says all of its clip.",
    )
    return table.select(sorted(set(range(len(seconds))) - set(long))) if long else table


def warn_of_silence(clips: Mapping[str, Sequence], *, sampling_rate: int) -> None:
    """
    Warns of clips whose transcript is so short that much of what is said, or most of the clip, may be missing.

    Args:
        clips: Columns `name`, `text` (normalised) and `num_samples`.
        sampling_rate: Of the samples in Hz.
    """
    names, texts, samples = (clips[column][:] for column in ("name", "text", "num_samples"))
    rates = [len(text) * sampling_rate / count for text, count in zip(texts, samples, strict=True)]
    limit = max(MIN_CHARACTER_RATE, MIN_RATE_SHARE * median(rates or [0.0]))
    few = [row for row in range(len(rates)) if texts[row] and rates[row] < limit]
    if few:
        named = "; ".join(
            f"{names[row]} ({len(texts[row])} characters in {samples[row] / sampling_rate:.1f} s)"
            for row in few[:NUM_NAMED]
        )
        logger.warning(
            "%d of %d clips have fewer than %.1f characters a second in their transcript: %s%s. Check that it says "
            "all that is heard.",
            *(len(few), len(rates), limit, named, " ..." if len(few) > NUM_NAMED else ""),
        )
