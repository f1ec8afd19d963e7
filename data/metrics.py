"""Word and character error rates over jiwer, offline, pooled over a corpus and by speaker."""

import logging
from collections.abc import Mapping, Sequence

import datasets
import evaluate
import jiwer

from .scripts import has_spaces

logger = logging.getLogger(__name__)

FEATURES = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
COUNTS = ("substitutions", "insertions", "deletions")
TABLE_HEADER = ("speaker", "utterances", "words", "WER %", "CER %", *COUNTS)


class WordErrorRate(evaluate.Metric):
    """
    Word error rate: substitutions, insertions and deletions of the whole corpus over the words of its references.

    A reference may be empty: words heard there are insertions. Needs no network, unlike `evaluate.load("wer")`.

    Raises:
        ValueError: From `compute`, when no reference has a word.

    Example:
        >>> metric = WordErrorRate()
        >>> metric.compute(predictions=["turn it on on"], references=["turn it off"])["words"]
        3
    """

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=type(self).__doc__, citation="", features=FEATURES)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | int]:
        rate, counts, total = _count_errors(jiwer.process_words, predictions, references)
        return {"wer": rate, **counts, "words": total}


class CharacterErrorRate(evaluate.Metric):
    """
    Character error rate, pooled as [`WordErrorRate`]; the space between two words is a character.

    Raises:
        ValueError: From `compute`, when no reference has a character.

    Example:
        >>> metric = CharacterErrorRate()
        >>> metric.compute(predictions=["on"], references=["one"])["deletions"]
        1
    """

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=type(self).__doc__, citation="", features=FEATURES)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | int]:
        rate, counts, total = _count_errors(jiwer.process_characters, predictions, references)
        return {"cer": rate, **counts, "characters": total}


def score_by_speaker(
    hypotheses: Sequence[str], references: Sequence[str], speakers: Sequence[str], *, language: str | None = None
) -> dict[str, dict]:
    """
    Scores a corpus as a whole and each of its speakers.

    Args:
        hypotheses: What was recognised, one an utterance.
        references: What was said.
        speakers: Who said it; "" for nobody known, who counts in the whole alone.
        language: Code of what they speak, if known.

    Returns:
        `{"overall": scores, "speakers": {name: scores}}`, names sorted. Scores are `wer` and `cer` (1.0 is 100 %),
        word-level `substitutions`, `insertions` and `deletions`, `words`, `characters` and `utterances`, and `rate`,
        the one that judges: "cer" where no spaces part words, as [`has_spaces`] tells, so that a whole transcript is
        one word. A speaker whose references are all empty counts in the whole alone, with a warning.

    Raises:
        ValueError: The three differ in number, or all references are empty.
    """
    if not len(hypotheses) == len(references) == len(speakers):
        raise ValueError(
            "`hypotheses`, `references` and `speakers` must be as many, got "
            f"{len(hypotheses)}, {len(references)} and {len(speakers)}. Give one of each an utterance."
        )
    rate = "wer" if has_spaces(references, language) else "cer"
    by_speaker, without = {}, []
    for speaker in sorted(set(speakers) - {""}):
        rows = [row for row, other in enumerate(speakers) if other == speaker]
        if any(references[row].strip() for row in rows):
            by_speaker[speaker] = _score([hypotheses[row] for row in rows], [references[row] for row in rows], rate)
        else:
            without.append(speaker)
    if without:
        logger.warning("No reference of these speakers has a word, so that they have no rate: %s.", ", ".join(without))
    return {"overall": _score(hypotheses, references, rate), "speakers": by_speaker}


def format_score_table(scores: Mapping[str, Mapping]) -> str:
    """
    Returns the scores of [`score_by_speaker`] as an aligned table, one line a speaker and the whole last.

    Example:
        >>> print(format_score_table(score_by_speaker(["one too"], ["one two"], ["ann"])))
        speaker  utterances  words   WER %   CER %  substitutions  insertions  deletions
        ann               1      2   50.00   14.29              1           0          0
        overall           1      2   50.00   14.29              1           0          0
    """
    rows = [TABLE_HEADER]
    for name, entry in [*scores["speakers"].items(), ("overall", scores["overall"])]:
        rates = [f"{100 * entry[rate]:6.2f}" for rate in ("wer", "cer")]
        rows.append((name, str(entry["utterances"]), str(entry["words"]), *rates, *(str(entry[c]) for c in COUNTS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(TABLE_HEADER))]
    lines = []
    for name, *figures in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _score(hypotheses: Sequence[str], references: Sequence[str], rate: str) -> dict[str, float | int | str]:
    pairs = {"predictions": list(hypotheses), "references": list(references)}
    words, characters = WordErrorRate().compute(**pairs), CharacterErrorRate().compute(**pairs)
    counts = {name: words[name] for name in COUNTS}
    totals = {"words": words["words"], "characters": characters["characters"], "utterances": len(hypotheses)}
    return {"wer": words["wer"], "cer": characters["cer"], "rate": rate, **counts, **totals}


def _count_errors(align, predictions: list[str], references: list[str]) -> tuple[float, dict[str, int], int]:
    """Returns the pooled rate, the counts of each error, and the number of reference words or characters."""
    # Transcripts are compared as words with one space between, so that a doubled space is no error.
    output = align([" ".join(text.split()) for text in references], [" ".join(text.split()) for text in predictions])
    counts = {name: getattr(output, name) for name in COUNTS}
    total = output.hits + output.substitutions + output.deletions
    if not total:
        raise ValueError(
            f"`references` must have a word in some row, got {len(references)} empty ones. Check column `text`."
        )
    return sum(counts.values()) / total, counts, total
