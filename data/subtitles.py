"""What is said when, from files beside a long recording: SubRip, WebVTT and Praat's TextGrid."""

import re
from collections.abc import Iterator
from pathlib import Path

from data.tables import open_text

SUBTITLE_SUFFIXES = (".srt", ".vtt", ".textgrid")
CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
CUE = re.compile(rf"{CLOCK}[ \t]+-->[ \t]+{CLOCK}")
MARKUP = re.compile(r"<[^<>]*>|\{\\[^}]*\}")  # <i>, <v Ann>, {\an8}
# Praat reads nothing of a TextGrid but quoted text, flags and numbers that stand alone.
TOKEN = re.compile(r'"(?:[^"]|"")*"|<\w+>|(?<!\S)-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?!\S)')


def read_subtitles(path: Path, *, tier: str | None = None) -> Iterator[tuple[float, float, str]]:
    """
    Yields start and end in seconds and the text of each passage that has one.

    Args:
        path: `.srt`, `.vtt` or `.TextGrid`, in UTF-8 or with a byte order mark.
        tier: Name of the TextGrid's tier; default: its only one.

    Raises:
        ValueError: The file is another, or has several tiers and none is named.
    """
    try:
        with open_text(path) as file:
            content = file.read()
        yield from _read_textgrid(content, path, tier) if path.suffix.lower() == ".textgrid" else _read_cues(content)
    except (UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"`{path}` must be whole and in UTF-8, got ({error}). Export it again.") from error


def _read_cues(content: str) -> Iterator[tuple[float, float, str]]:
    for block in re.split(r"(?:\r?\n[ \t]*){2,}", content):
        lines = block.strip().splitlines()
        for number, line in enumerate(lines):
            if match := CUE.match(line):
                text = " ".join(MARKUP.sub("", " ".join(lines[number + 1 :])).split())
                if text:
                    yield _to_seconds(*match.groups()[:4]), _to_seconds(*match.groups()[4:]), text
                break


def _to_seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds) + int(fraction) / 10 ** len(fraction)


def _read_textgrid(content: str, path: Path, tier: str | None) -> Iterator[tuple[float, float, str]]:
    tokens = TOKEN.findall(content)
    tiers: dict[str, list[tuple[float, float, str]]] = {}
    position = tokens.index("<exists>") + 2 if "<exists>" in tokens else len(tokens)
    while position < len(tokens):
        kind, name, count = tokens[position], _unquote(tokens[position + 1]), int(tokens[position + 4])
        width = 3 if kind == '"IntervalTier"' else 2
        cells = [tokens[position + 5 + width * row : position + 5 + width * (row + 1)] for row in range(count)]
        if width == 3:
            tiers[name] = [(float(cell[0]), float(cell[1]), _unquote(cell[2])) for cell in cells]
        position += 5 + width * count
    if tier not in tiers and (tier is not None or len(tiers) != 1):
        raise ValueError(
            f"`text_column` must name one of the tiers of {path} ({', '.join(tiers) or 'none with intervals'}), got "
            f"{tier}. Choose the one that holds the words that are said."
        )
    for start, end, text in tiers[tier] if tier in tiers else next(iter(tiers.values())):
        if text.strip():
            yield start, end, " ".join(text.split())


def _unquote(token: str) -> str:
    return token[1:-1].replace('""', '"')
