"""Scores of translations over sacrebleu: BLEU and chrF of text, and the error rate of speech units."""

from collections.abc import Sequence

import jiwer
from sacrebleu.metrics import BLEU, CHRF

from .scripts import has_spaces

# How sacrebleu cuts a text into tokens: at spaces and punctuation, or into characters where no spaces part words.
SPACED_TOKENIZER, CHARACTER_TOKENIZER, CHINESE_TOKENIZER = "13a", "char", "zh"


def choose_tokenizer(references: Sequence[str], language: str | None = None) -> str:
    """
    Returns the name of sacrebleu's tokenizer for a language.

    Args:
        references: Texts that show whether words are parted by spaces.
        language: Code of their language, if known.

    Example:
        >>> choose_tokenizer(["turn on the light"]), choose_tokenizer(["\u958b\u71c8"], "zh")
        ('13a', 'zh')
    """
    if language == "zh":
        return CHINESE_TOKENIZER
    return SPACED_TOKENIZER if has_spaces(references, language) else CHARACTER_TOKENIZER


def score_bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, language: str | None = None
) -> dict[str, float | str]:
    """
    Returns `bleu` and `chrf` of a corpus, from 0 to 100, and the signatures by which others compute the same.

    Args:
        hypotheses: A translation each row.
        references: The right one of each row.
        language: Of the texts, for the tokens that BLEU counts.

    Raises:
        ValueError: They are not as many, or no reference has a word.

    Example:
        >>> scores = score_bleu(["press one to go on"], ["press one to go on"])
        >>> round(scores["bleu"], 1), round(scores["chrf"], 1), scores["bleu_signature"][:40]
        (100.0, 100.0, 'nrefs:1|case:mixed|eff:no|tok:13a|smooth')
    """
    if len(hypotheses) != len(references):
        raise ValueError(
            f"`hypotheses` and `references` must be as many, got {len(hypotheses)} and {len(references)}. Give one of "
            "each an utterance."
        )
    if not any(reference.strip() for reference in references):
        raise ValueError(
            f"`references` must have a word in some row, got {len(references)} empty ones. Check column `target_text`."
        )
    scores: dict[str, float | str] = {}
    for name, metric in (("bleu", BLEU(tokenize=choose_tokenizer(references, language))), ("chrf", CHRF())):
        scores[name] = metric.corpus_score(list(hypotheses), [list(references)]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def unit_error_rate(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """
    Returns substitutions, insertions and deletions of all rows over the units of their references.

    Raises:
        ValueError: They are not as many, or a reference is empty.

    Example:
        >>> unit_error_rate([[3, 1, 4]], [[3, 1, 5, 4]])
        0.25
    """
    if len(hypotheses) != len(references) or not all(len(reference) for reference in references):
        raise ValueError(
            f"`references` must be units, one list a hypothesis, got {len(hypotheses)} hypotheses and "
            f"{sum(1 for reference in references if len(reference))} references with units."
        )
    pairs = [[" ".join(map(str, units)) for units in rows] for rows in (references, hypotheses)]
    return jiwer.wer(*pairs)
