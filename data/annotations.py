"""What stands in transcripts beside the words that are said: marks of a corpus's convention, and damage."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice

import regex
from datasets import Dataset, IterableDataset

from .scripts import Rule
from .text import name_characters, unescape_entities

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 3  # transcripts that are shown as they are read
NUM_NAMED = 5  # rows that a message lists
NUM_SEEN = 100  # rows of a stream that are looked at before it is used

_SQUARE, _IMAGE = r"\[[^\[\]]*\]", r"(?i)^\s*\S+\.(?:jpe?g|png|gif|bmp|tiff?)\s*$"
# A bracket with what stands in it, other brackets too; "<" only as in a tag, because it is also less than.
_BRACKETS = (
    r"(?P<any>\[(?:[^\[\](){}<>]|(?&any)|[<>])*\]|\((?:[^\[\](){}<>]|(?&any)|[<>])*\)"
    r"|\{(?:[^\[\](){}<>]|(?&any)|[<>])*\}|<(?=[/\p{L}])[^<>]*>"
    r"|[\u3010\u3014\uff08\uff3b][^\u3010\u3011\u3014\u3015\uff08\uff09\uff3b\uff3d]*[\u3011\u3015\uff09\uff3d])"
    r"|\*\p{L}[^*]*\*"
)
_KSPON_PAIR = r"\(([^()]*)\)\s*/\s*\(([^()]*)\)"
_KSPON_NOISE = r"(?<![\p{L}\p{N}])[blonu]/"


def _compile(*rules: tuple[str, str]) -> list[Rule]:
    return [(regex.compile(pattern), replacement) for pattern, replacement in rules]


# What is replaced by what, until nothing changes.
STYLES: Mapping[str, list[Rule]] = {
    "plain": [],
    "brackets": _compile((_BRACKETS, " ")),
    # KsponSpeech: (spelling)/(as it was said), noises b/ l/ o/ n/ u/, "/" behind a filler, "+" and "*" behind a word.
    "kspon": _compile((_KSPON_PAIR, r" \2 "), (_KSPON_NOISE, " "), (r"(?<=\p{Hangul})[/+*]+", "")),
    "kspon_spelling": _compile((_KSPON_PAIR, r" \1 "), (_KSPON_NOISE, " "), (r"(?<=\p{Hangul})[/+*]+", "")),
    # TORGO: what the speaker was told to do, or was shown.
    "torgo": _compile((_SQUARE, " "), (_IMAGE, ""), (r"(?i)^\s*xxx\s*$", "")),
    # Switchboard: [laughter-word], [said/meant], cut wor[ds]-, {coinage}, variants the_1, [noise], <b_aside>.
    "switchboard": _compile(
        (r"\[laughter-([^\[\]]*)\]", r"\1"),
        (r"(\p{L})\[[^\[\]]*\]-", r"\1"),
        (r"-\[[^\[\]]*\](\p{L})", r"\1"),
        (r"\[([^\[\]/]+)/[^\[\]/]+\]", r"\1"),
        (r"\{([^{}]*)\}", r"\1"),
        (rf"{_SQUARE}|<[^<>]*>", " "),
        (r"(?<=\p{L})_\d+\b", ""),
    ),
    # Corpus of Spontaneous Japanese: (W said;meant), (A read;written), (F filler), (D fragment), (? unsure), <noise>.
    "csj": _compile(
        (r"\([WBA] ([^();]*);[^()]*\)", r"\1"),
        (r"\((?:[FDXORML?]|D2|\u7b11|\u6ce3|\u54b3) ([^();]*)\)", r"\1"),
        (r"<[^<>]*>", ""),
    ),
}
# What a convention is known by where it has not been taken out; brackets last, for others have them too.
SIGNS = {
    "kspon": regex.compile(rf"{_KSPON_NOISE}(?=\s|$|[(\p{{Hangul}}])|{_KSPON_PAIR}"),
    "switchboard": regex.compile(r"\[laughter-\p{L}|\p{L}\[\p{L}+\]-"),
    "csj": regex.compile(r"\((?:[FDWA?]|D2) [^()]*\)"),
    "torgo": regex.compile(_IMAGE),
    "brackets": regex.compile(_BRACKETS),
}
# The replacement character, control characters but white space, halves of surrogate pairs, and what is no character.
DAMAGE = regex.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x9f\ufffd\p{Cs}\p{Noncharacter_Code_Point}]")

ESCAPE = regex.compile(r"\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[nrt])")


def strip_annotations(text: str, style: str) -> str:
    """
    Returns what is said of a transcript in `style`, one of `STYLES`, with HTML's entities read.

    Raises:
        ValueError: `style` is none of them.

    Example:
        >>> strip_annotations("[noise] turn (laughter) on", "brackets")
        'turn on'
        >>> strip_annotations("o/ \uadf8 (70%)/(\uce60\uc2ed \ud37c\uc13c\ud2b8) \ud655\ub960", "kspon")
        '\uadf8 \uce60\uc2ed \ud37c\uc13c\ud2b8 \ud655\ub960'
    """
    if style not in STYLES:
        raise ValueError(f"`transcript_style` must be one of {', '.join(STYLES)}, got {style!r}. Choose one of them.")
    text, before = unescape_entities(text), None
    while text != before:
        before = text
        for pattern, replacement in STYLES[style]:
            text = pattern.sub(replacement, text)
    return " ".join(text.split())


def read_transcripts(corpus: Dataset | IterableDataset, style: str, *, name: str) -> Dataset | IterableDataset:
    """
    Returns a corpus whose column `text` holds what is said; rows that hold annotations alone are left out.

    Says how transcripts are read, with three examples, and warns where they look like another convention's.

    Args:
        corpus: From [`load_corpus`]; without a column `text` it stays as it is.
        style: One of `STYLES`.
        name: What messages call the corpus.

    Raises:
        ValueError: `style` is unknown, a transcript has been decoded wrongly (of a stream: while iterating), or
            nothing but annotations is there.
    """
    if isinstance(corpus, IterableDataset):
        rows = list(islice(corpus, NUM_SEEN))
        if not rows or "text" not in rows[0]:
            return corpus
        _report([row["text"] or "" for row in rows], style, name)
        return corpus.map(partial(_read_row, style=style, name=name)).filter(_has_text)
    if "text" not in corpus.column_names:
        return corpus
    texts = [text or "" for text in corpus["text"][:]]
    check_damage(texts, name=name)
    said = [strip_annotations(text, style) for text in texts]
    _report(texts, style, name)
    if said == texts:
        return corpus
    kept = [row for row in range(len(texts)) if said[row] or not texts[row].strip()]
    if len(kept) < len(texts):
        empty = [text for text, rest in zip(texts, said, strict=True) if text.strip() and not rest]
        logger.warning(
            "%d of %d transcripts in %s hold no words by `transcript_style` %s and are left out: %s.",
            *(len(empty), len(texts), name, style, _quote(empty)),
        )
    if not kept:
        raise ValueError(f"`transcript_style` must leave words in {name}, got {style!r}, which leaves none.")
    return corpus.remove_columns("text").add_column("text", said).select(kept)


def check_damage(texts: Sequence[str], *, name: str) -> None:
    """
    Makes sure that transcripts have been decoded as they were encoded.

    Raises:
        ValueError: One has the replacement character, control characters, or halves of characters.
    """
    damaged = {row: set(DAMAGE.findall(unescape_entities(text))) for row, text in enumerate(texts, start=1)}
    damaged = {row: found for row, found in damaged.items() if found}
    if damaged:
        rows = ", ".join(map(str, list(damaged)[:NUM_NAMED])) + (" ..." if len(damaged) > NUM_NAMED else "")
        raise ValueError(
            f"`text` of {name} is decoded wrongly: {name_characters(set().union(*damaged.values()))} in "
            f"{len(damaged)} row(s): {rows}. Read the file in the encoding that it was written in, and save it as "
            "UTF-8; what is lost must be written anew."
        )


def find_styles(texts: Sequence[str], style: str) -> dict[str, list[str]]:
    """
    Returns the conventions that transcripts look like, once read in `style`, each with the transcripts that do.

    Example:
        >>> find_styles(["[noise] on", "off"], "plain"), find_styles(["[noise] on"], "brackets")
        ({'brackets': ['[noise] on']}, {})
    """
    found: dict[str, list[str]] = {}
    for text, said in [(text, strip_annotations(text, style)) for text in texts]:
        if like := next((other for other, sign in SIGNS.items() if sign.search(said)), None):
            found.setdefault(like, []).append(text)
    return found


def _read_row(row: dict, *, style: str, name: str) -> dict:
    check_damage([row["text"] or ""], name=name)
    return {"text": strip_annotations(row["text"] or "", style)}


def _has_text(row: dict) -> bool:
    return bool(row["text"])


def _report(texts: Sequence[str], style: str, name: str) -> None:
    if os.environ.get("RANK", "0") != "0":  # of the processes of one training, one says it
        return
    pairs = {text: strip_annotations(text, style) for text in texts}
    shown = sorted(pairs, key=lambda text: pairs[text] == text)[:NUM_EXAMPLES]  # what is changed comes first
    lines = [f"  {text!r}" + (f" -> {pairs[text]!r}" if pairs[text] != text else "") for text in shown]
    if logger.isEnabledFor(logging.WARNING):
        print(f"Transcripts of {name} are read as `{style}`:", *lines, sep="\n", file=sys.stderr)
    for like, examples in find_styles(texts, style).items():
        logger.warning(
            "%d of %d transcripts in %s look like `%s` and are read as `%s`, so that their marks become words: %s. "
            "Give `--transcript_style %s` if they are marks.",
            *(len(examples), len(texts), name, like, style, _quote(examples), like),
        )
    if escaped := [text for text in texts if ESCAPE.search(text)]:
        logger.warning(
            "%d of %d transcripts in %s have escapes that nobody has read, whose letters become words: %s. Read them "
            "before, as JSON or as Python.",
            *(len(escaped), len(texts), name, _quote(escaped)),
        )
    if garbled := [text for text in texts if _looks_garbled(text)]:
        logger.warning(
            "%d of %d transcripts in %s look decoded wrongly, UTF-8 read as Windows-1252: %s, perhaps %r.",
            *(len(garbled), len(texts), name, _quote(garbled), garbled[0].encode("cp1252").decode("utf-8")),
        )


def _looks_garbled(text: str) -> bool:
    """Whether the text is UTF-8 again when it is written as Windows-1252, which hardly happens by chance."""
    try:
        return not text.isascii() and text.encode("cp1252").decode("utf-8") != text
    except UnicodeError:
        return False


def _quote(texts: Sequence[str]) -> str:
    return ", ".join(map(repr, texts[:NUM_EXAMPLES])) + (" ..." if len(texts) > NUM_EXAMPLES else "")
