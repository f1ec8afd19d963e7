"""Beam search over the words of a list or of an n-gram, through flashlight-text and KenLM."""

import importlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

from data.text import find_normalizer, normalize_text

logger = logging.getLogger(__name__)

NEVER = -1e4  # log-probability of what cannot be; exp of it is 0
BEAM_TOKENS = 64  # likeliest classes of a frame that a hypothesis may go on with
BEAM_THRESHOLD = 50.0  # hypotheses that much worse than the best, in log-probability, are given up
ARPA_SECTION = re.compile(r"\\(\d+)-grams:")
ARPA_MARKS = ("<s>", "</s>", "<unk>")


@dataclass
class DecodingArguments:
    """Beam search; without a word list and an n-gram the likeliest class of each frame is taken."""

    word_list: str | None = field(
        default=None, metadata={"help": "Text file with one word a line: only these words are recognised."}
    )
    ngram: str | None = field(
        default=None, metadata={"help": "ARPA n-gram over words; without word_list its words are the ones recognised."}
    )
    beam_size: int = field(default=50, metadata={"help": "Hypotheses kept at every frame."})
    lm_weight: float = field(default=2.0, metadata={"help": "Weight of the n-gram's log10 probabilities."})
    word_score: float = field(default=0.0, metadata={"help": "Added for every word; above 0 favours more words."})


class BeamDecoder:
    """
    Beam search over the words of a lexicon, with an optional n-gram, by flashlight-text.

    Words that the vocabulary cannot spell are left out; a warning says how many of how many.

    Args:
        tokenizer: CTC tokenizer; its pad token is the blank, its word delimiter ends a word.
        word_list: Text file with one word a line. Default: the words of `ngram`.
        ngram: ARPA file over words.
        beam_size: Hypotheses kept at every frame.
        lm_weight: Weight of the n-gram's log10 probabilities.
        word_score: Added for every word.

    Raises:
        ValueError: Neither file is given, one is missing or wrong (the message names the line), no word can be
            spelled, or `beam_size` is below 1.

    Source: Collobert et al., "Wav2Letter" (arXiv 1609.03193), section 2.3; Heafield, "KenLM" (2011).
    """

    def __init__(
        self,
        tokenizer,
        *,
        word_list: str | Path | None = None,
        ngram: str | Path | None = None,
        beam_size: int = 50,
        lm_weight: float = 2.0,
        word_score: float = 0.0,
    ):
        if word_list is None and ngram is None:
            raise ValueError("`word_list` or `ngram` must be given for a beam search, got neither. Name a file.")
        if beam_size < 1:
            raise ValueError(f"`beam_size` must be at least 1, got {beam_size}. More is slower and finds more.")
        arpa_words = read_arpa_words(ngram) if ngram else []
        words = read_word_list(word_list, find_normalizer(tokenizer)) if word_list else arpa_words
        self.blank, self.delimiter = tokenizer.pad_token_id, tokenizer.word_delimiter_token_id
        spellings = spell_words(words, tokenizer, name=str(word_list or ngram))
        search = import_flashlight()
        lm = _load_ngram(ngram, list(spellings)) if ngram else search.ZeroLM()
        trie = search.Trie(len(tokenizer), self.delimiter)
        start = lm.start(False)
        for index, spelling in enumerate(spellings.values()):
            trie.insert([*spelling, self.delimiter], index, lm.score(start, index)[1])
        trie.smear(search.SmearingMode.MAX)
        options = search.LexiconDecoderOptions(
            beam_size=beam_size,
            beam_size_token=min(BEAM_TOKENS, len(tokenizer)),
            beam_threshold=BEAM_THRESHOLD,
            lm_weight=lm_weight if ngram else 0.0,
            word_score=word_score,
            unk_score=-np.inf,
            sil_score=0.0,
            log_add=False,
            criterion_type=search.CriterionType.CTC,
        )
        self.tokenizer, self._lm = tokenizer, lm  # the search does not keep its language model alive
        self._search = search.LexiconDecoder(options, trie, lm, self.delimiter, self.blank, -1, [], False)

    def align(self, log_probs: np.ndarray, *, is_followed: bool = False) -> np.ndarray:
        """
        Returns the class of every frame on the best path: `(frames, classes)` to `(frames,)`.

        Collapsed, the path spells whole words of the lexicon and nothing else.

        Args:
            log_probs: `(frames, classes)`.
            is_followed: Whether another block comes behind: the last frame is the delimiter between their words.
        """
        # A word ends with a delimiter, but an utterance does not: one certain delimiter is put behind it.
        end = np.full((1, log_probs.shape[1]), NEVER, dtype=np.float32)
        end[0, self.delimiter] = 0.0
        kept = log_probs[: len(log_probs) - is_followed]
        frames = np.ascontiguousarray(np.concatenate([kept, end]), dtype=np.float32)
        best = self._search.decode(frames.ctypes.data, *frames.shape)[0]
        path, words = (
            np.asarray(best.tokens[1:-1]),
            np.asarray(best.words[1:-1]),
        )  # the search adds a frame at each end
        # Where the audio fits no word, the best path may stop inside one: what follows the last whole word is dropped.
        tail = path[np.flatnonzero(words >= 0).max(initial=-1) + 1 :]
        tail[tail != self.delimiter] = self.blank
        return path[: len(log_probs)]

    def decode(self, log_probs: np.ndarray) -> str:
        """Returns the text of `log_probs` `(frames, classes)`."""
        return clean_text(self.tokenizer.decode(self.align(log_probs).tolist()))


def import_flashlight() -> ModuleType:
    """
    Returns flashlight-text's decoder, which has no wheel for Python 3.13 and above (0.0.7).

    Raises:
        ValueError: It is not installed.
    """
    try:
        return importlib.import_module("flashlight.lib.text.decoder")
    except ImportError as error:
        raise ValueError(
            f"`word_list` and `ngram` must go with the package flashlight-text, got none ({error}). Run "
            "`pip install flashlight-text` on Python 3.12 or below, or leave both out for the greedy search."
        ) from error


def build_decoder(arguments: DecodingArguments, tokenizer) -> BeamDecoder | None:
    """Returns the beam search that `arguments` ask for, or None for the greedy one."""
    if arguments.word_list is None and arguments.ngram is None:
        return None
    return BeamDecoder(tokenizer, **vars(arguments))


def read_word_list(path: str | Path, normalize: Callable[[str], str] = normalize_text) -> list[str]:
    """
    Returns the words of a text file, one a line, normalised as transcripts are, each once and in order.

    Raises:
        ValueError: The file is missing, not UTF-8 or empty, or a line is not one word.
    """
    words = {}
    for number, line in enumerate(_read_lines(path, "word_list"), start=1):
        word = normalize(line)
        if line.strip() and len(word.split()) != 1:
            raise ValueError(f"`word_list` must hold one word a line, got {line!r} in line {number} of {path}.")
        words[word] = None
    words.pop("", None)
    if not words:
        raise ValueError(f"`word_list` must hold a word, got the empty file {path}. Write one word a line.")
    return list(words)


def read_arpa_words(path: str | Path) -> list[str]:
    """
    Returns the words among the 1-grams of an ARPA file, without the marks `<s>`, `</s>` and `<unk>`.

    Raises:
        ValueError: The file is missing, not UTF-8 or no ARPA file, or a 1-gram is not `log10 word [backoff]`.

    Source: the ARPA format as SRILM documents it (ngram-format(5)).
    """
    section, words = None, {}
    lines = _read_lines(path, "ngram")
    if not any(line.strip() == "\\data\\" for line in lines):
        raise ValueError(
            f"`ngram` must be an ARPA file, got {path} without a line \\data\\. Export the n-gram as ARPA."
        )
    for number, line in enumerate(lines, start=1):
        if found := ARPA_SECTION.fullmatch(line.strip()):
            section = int(found[1])
        elif section == 1 and line.strip() and not line.startswith("\\"):
            try:
                _, word, *backoff = line.split()
                [float(figure) for figure in (line.split()[0], *backoff)]
            except ValueError as error:
                raise ValueError(
                    f"`ngram` must have 1-grams `log10 word [backoff]`, got {line!r} in line {number} of {path}."
                ) from error
            words[word] = None
    words = [word for word in words if word not in ARPA_MARKS]
    if not words:
        raise ValueError(f"`ngram` must have a section \\1-grams: with words, got none in {path}. Export it again.")
    return words


def spell_words(words: Sequence[str], tokenizer, *, name: str) -> dict[str, list[int]]:
    """
    Returns each word's classes; words with characters outside the vocabulary are left out and counted in a warning.

    Args:
        words: Words without white space.
        tokenizer: CTC tokenizer.
        name: What messages call the source of `words`.

    Raises:
        ValueError: No word is left.
    """
    spellings = dict(zip(words, tokenizer(list(words)).input_ids, strict=True))
    unspelled = {tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.word_delimiter_token_id}
    kept = {word: spelling for word, spelling in spellings.items() if spelling and not unspelled & set(spelling)}
    if not kept:
        raise ValueError(f"{name} must have a word in the model's characters, got none of {len(spellings)}.")
    if len(kept) < len(spellings):
        left_out = next(word for word in spellings if word not in kept)
        logger.warning(
            "%d of %d words in %s have characters outside the model's vocabulary and are left out, %r first.",
            len(spellings) - len(kept),
            len(spellings),
            name,
            left_out,
        )
    return kept


def _read_lines(path: str | Path, flag: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"`{flag}` must be a readable file, got {path} ({error.strerror}). Correct the path."
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"`{flag}` must be UTF-8 text, got line {line} of {path}. Convert the file.") from error


def _load_ngram(path: str | Path, words: Sequence[str]):
    """Loads an ARPA file whose words get the indices of `words`."""
    indices = importlib.import_module("flashlight.lib.text.dictionary").Dictionary()
    for word in words:
        indices.add_entry(word)
    try:
        return importlib.import_module("flashlight.lib.text.decoder.kenlm").KenLM(str(path), indices)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        found = re.search(r"[Bb]yte:? (\d+)", reason)
        line = Path(path).read_bytes()[: int(found[1])].count(b"\n") + 1 if found else None
        where = f"line {line} of {path}" if line else path
        raise ValueError(f"`ngram` must be a whole ARPA file, got {where} ({reason}). Export it again.") from error


def clean_text(text: str) -> str:
    """Returns `text` with one space between words; a path may hold two delimiters in a row."""
    return " ".join(text.split())
