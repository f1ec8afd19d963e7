"""Clips of two domains, such as a microphone's and a vibrometer's: chosen, read, paired, cut to what a model hears."""

import logging
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from .spelling import warn_of_silence
from .text import normalize_text
from .utterances import read_concatenated

logger = logging.getLogger(__name__)

QUIET_SAMPLES = 320  # 20 ms at 16 kHz: a long clip is cut in the middle of the quietest such block
NUM_NAMED = 5  # clips that a message lists
PAIR_COLUMN = "pair_id"


def select_domain(corpus: Dataset, domain: str, *, flag: str) -> Dataset:
    """
    Returns the rows of `corpus` whose column `domain` is `domain`.

    Args:
        corpus: From [`load_corpus`].
        domain: The domain.
        flag: What the user named it with.

    Raises:
        ValueError: There is no such column, or no row of the domain.
    """
    if "domain" not in corpus.column_names:
        raise ValueError(
            f"`domain` must be a column of the corpus, got the columns {', '.join(corpus.column_names)}. Add it, or "
            "simulate the domain with `--simulate_domain ldv`."
        )
    names = corpus["domain"][:]
    rows = [row for row, name in enumerate(names) if name == domain]
    if not rows:
        raise ValueError(
            f"`{flag}` must be one of the domains with data here ({', '.join(sorted(set(map(str, names))))}), got "
            f"{domain!r}: there is no data of this domain. Correct the name or record it."
        )
    return corpus.select(rows)


def decode_domain(corpus: Dataset, *, sampling_rate: int, needs_text: bool = True) -> Dataset:
    """
    Reads and checks every clip once; the result is cached by the fingerprint of corpus and rate.

    Args:
        corpus: Columns `audio` (undecoded) and, each if there, `text` or `response` (the answer), `instruction`,
            `speaker_id` and `pair_id`.
        sampling_rate: Of the result in Hz.
        needs_text: Whether every clip must have an answer.

    Returns:
        Columns `name`, `text`, `instruction` (`None` for the default one), `speaker_id`, `pair_id`, `samples`
        `(samples,)` and `num_samples`.

    Raises:
        AudioError: More than 5 % of the clips are unreadable, empty, silent or too short; fewer are left out.
        ValueError: A clip has no answer, or one without a word.
    """

    def column(*names: str, default: object) -> list:
        name = next((name for name in names if name in corpus.column_names), None)
        return [default] * len(corpus) if name is None else [value or default for value in corpus[name]]

    columns = {
        "text": column("response", "text", default=""),
        "instruction": column("instruction", default=""),
        "speaker_id": column("speaker_id", default=""),
        PAIR_COLUMN: column(PAIR_COLUMN, default=""),
    }
    clips = read_concatenated(
        corpus, {name: list(map(str, values)) for name, values in columns.items()}, sampling_rate=sampling_rate
    )
    if needs_text:
        _check_answers(clips["name"][:], clips["text"][:])
        if "response" not in corpus.column_names:
            warn_of_silence(clips, sampling_rate=sampling_rate)
    return clips


def _check_answers(names: Sequence[str], texts: Sequence[str]) -> None:
    without = [name for name, text in zip(names, texts, strict=True) if not normalize_text(text)]
    if without:
        raise ValueError(
            f"`text` (or `response`) must be given for every clip, got none for {_list_first(without)}. Write down "
            "what is said, or train on pairs with `--objective distill --tower_only`."
        )


def match_pairs(source: Dataset, target: Dataset) -> tuple[Dataset, Dataset]:
    """
    Returns both domains' clips in the same order, every row the partner of the other's.

    Args:
        source: Clips of one domain, as from [`decode_domain`], with `pair_id`.
        target: Of the other.

    Raises:
        ValueError: A clip has no `pair_id`, shares it within its domain, has no partner, or its partner has another
            length. The message names the clips.
    """
    rows = [_index_pairs(source), _index_pairs(target)]
    lonely = [
        clips[row]["name"]
        for clips, own, others in ((source, *rows), (target, *reversed(rows)))
        for pair_id, row in own.items()
        if pair_id not in others
    ]
    if lonely:
        raise ValueError(
            f"Every clip must have a partner in the other domain, got none for {_list_first(lonely)}. Add the "
            "partners or remove the clips."
        )
    target = target.select([rows[1][pair_id] for pair_id in source[PAIR_COLUMN]])
    pairs = zip(source["name"], source["num_samples"], target["name"], target["num_samples"], strict=True)
    differing = [f"{left} ({many}) and {right} ({few})" for left, many, right, few in pairs if many != few]
    if differing:
        raise ValueError(
            f"The clips of a pair must have the same number of samples, got {_list_first(differing)}. Cut them to the "
            "same moment."
        )
    return source, target


def _index_pairs(clips: Dataset) -> dict[str, int]:
    """The row of each pair's clip."""
    by_pair = {pair_id: row for row, pair_id in enumerate(clips[PAIR_COLUMN])}
    if "" in by_pair:
        raise ValueError(
            f"`{PAIR_COLUMN}` must say which clips are of the same moment, got none for "
            f"{clips[by_pair['']]['name']}. Fill the column in, or train with `--objective task`."
        )
    if len(by_pair) != len(clips):
        twice = [pair_id for row, pair_id in enumerate(clips[PAIR_COLUMN]) if by_pair[pair_id] != row]
        raise ValueError(
            f"`{PAIR_COLUMN}` must be given to one clip of a domain, got {_list_first(twice)} more than once. Number "
            "the pairs."
        )
    return by_pair


def _list_first(items: Sequence[str]) -> str:
    rest = f" and {len(items) - NUM_NAMED} more" if len(items) > NUM_NAMED else ""
    return "; ".join(items[:NUM_NAMED]) + rest


def find_cuts(samples: np.ndarray, max_samples: int) -> list[int]:
    """
    Returns where a long clip is cut, each part at most `max_samples` long: its start, the cuts, its end.

    A cut is in the middle of the quietest 20 ms of the last third that a part may have, between words if it can be.

    Args:
        samples: `(samples,)`.
        max_samples: Most samples of a part.

    Example:

    ```python
    >>> import numpy as np
    >>> from data.domain_clips import find_cuts

    >>> samples = np.ones(50_000)
    >>> samples[27_000:27_400] = 0
    >>> find_cuts(samples, 30_000)
    [0, 27160, 50000]

    ```
    """
    cuts = [0]
    while len(samples) - cuts[-1] > max_samples:
        first = cuts[-1] + max(2 * max_samples // 3, 1)
        blocks = np.square(samples[first : cuts[-1] + max_samples], dtype=np.float64)
        block = min(QUIET_SAMPLES, len(blocks))
        sums = np.cumsum(np.concatenate([[0.0], blocks]))
        loudness = sums[block:] - sums[:-block]
        # Rounding leaves silence at different tiny sums; the first of the quietest counts.
        quietest = int(np.argmax(loudness <= loudness.min() + 1e-9))
        cuts.append(first + quietest + block // 2)
    return [*cuts, len(samples)]


def list_cuts(clips: Dataset, max_samples: int, *, sampling_rate: int) -> list[list[int]]:
    """
    Returns where each clip is cut, as [`find_cuts`], and says how many are longer than a model hears at once.

    Args:
        clips: From [`decode_domain`].
        max_samples: Most samples of a part.
        sampling_rate: In Hz, for the message.
    """
    arrays = clips.with_format("numpy", columns=["samples"])
    cuts = [
        [0, count] if count <= max_samples else find_cuts(arrays[row]["samples"], max_samples)
        for row, count in enumerate(clips["num_samples"])
    ]
    if num_long := sum(len(places) > 2 for places in cuts):
        logger.warning(
            "%d of %d clips are longer than %g s and are split at their quietest moments.",
            num_long,
            len(clips),
            max_samples / sampling_rate,
        )
    return cuts


def split_long(clips: Dataset, cuts: list[list[int]]) -> Dataset:
    """
    Returns `clips` with those that are longer than a model hears at once cut into parts.

    Args:
        clips: From [`decode_domain`].
        cuts: Where each of them, or each of their partners, is cut, from [`list_cuts`].

    Returns:
        The columns of `clips`, `utterance` (the row that a part was cut from) and `num_parts` (of that row). A part
        keeps the text of the whole: where in it the cut lies is not known.
    """
    num_parts = [len(places) - 1 for places in cuts]
    if max(num_parts) == 1:
        return clips.add_column("utterance", list(range(len(clips)))).add_column("num_parts", num_parts)

    def split(batch: dict, indices: list[int]) -> dict:
        """Cuts a batch of one clip."""
        places = cuts[indices[0]]
        parts = [batch["samples"][0][start:end] for start, end in zip(places, places[1:], strict=False)]
        rows = {name: values * len(parts) for name, values in batch.items()}
        rows |= {"samples": parts, "num_samples": list(map(len, parts))}
        return rows | {"utterance": indices * len(parts), "num_parts": [len(parts)] * len(parts)}

    return clips.map(split, batched=True, batch_size=1, with_indices=True, desc="splitting")


__all__ = ["decode_domain", "find_cuts", "list_cuts", "match_pairs", "select_domain", "split_long"]
