"""Pictures that show any name as it is written: no formulas, no control characters, and a font that has the script."""

import logging
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import regex
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure

from modeling.files import write_whole

logger = logging.getLogger(__name__)

DPI = 150
MAX_LABEL = 16  # characters of a name that stand below a bar
CONTROL = regex.compile(r"[\p{Cc}\p{Cs}\p{Zl}\p{Zp}]")
UNDRAWN = regex.compile(r"[\p{DI}\p{Zs}]")
# Has a box for every character of Unicode, which is what a missing glyph looks like.
PLACEHOLDER = "Last Resort"
NORMAL_WEIGHT = 400


def escape_control(text: str) -> str:
    """Returns `text` on one line, control characters and halves of surrogate pairs as Python writes them."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shorten_name(name: str) -> str:
    r"""
    Returns a name that fits below a bar: on one line, its middle left out where it is long.

    Example:

    ```python
    >>> from publishing.pictures import shorten_name

    >>> shorten_name("ann\n"), shorten_name("0123456789" * 12)
    ('ann\\n', '0123456…23456789')

    ```
    """
    name = escape_control(name)
    half = MAX_LABEL // 2
    return name if len(name) <= MAX_LABEL else f"{name[: half - 1]}\u2026{name[-half:]}"


def as_written(names: Iterable[str]) -> dict[str, object]:
    """Returns what a text of a picture needs to show `names` as they are, by keyword."""
    return {"parse_math": False, "fontfamily": find_fonts("".join(names))}


def find_fonts(text: str) -> list[str]:
    """
    Returns the default font's family and those of as few others as have the characters that it lacks.

    Characters that no installed font has are named in a warning.
    """
    families = list(rcParams["font.family"])
    shown = set(map(ord, CONTROL.sub("", UNDRAWN.sub("", text))))
    missing = _missing(font_manager.findfont(font_manager.FontProperties()), shown)
    while missing:
        left = {family: _missing(path, missing) for family, path in _list_fonts()}
        best = min(left, key=lambda family: (len(left[family]), family), default=None)
        if best is None or left[best] == missing:
            named = ", ".join(f"{chr(code)!r} (U+{code:04X})" for code in sorted(missing)[:3])
            logger.warning(
                "No installed font has %s%s: boxes are drawn for them. Install one that does, such as Noto Sans CJK "
                "for Chinese, Japanese and Korean.",
                *(named, " ..." if len(missing) > 3 else ""),
            )
            break
        families.append(best)
        missing = left[best]
    return families


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a picture, whole; [`find_fonts`] has said which characters are missing."""
    path = Path(path)
    with write_whole(path.parent) as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(scratch / path.name, dpi=DPI)


def _list_fonts() -> Sequence[tuple[str, str]]:
    """Family and file of every installed font, of each family one that stands upright."""
    fonts = {}
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: abs(_weigh(entry) - NORMAL_WEIGHT)):
        if entry.style == "normal" and PLACEHOLDER not in entry.name:
            fonts.setdefault(entry.name, entry.fname)
    return sorted(fonts.items())


def _weigh(entry: font_manager.FontEntry) -> int:
    return font_manager.weight_dict.get(entry.weight, entry.weight) if isinstance(entry.weight, str) else entry.weight


def _missing(path: str, codes: set[int]) -> set[int]:
    return codes - _read_charmap(path)


@cache
def _read_charmap(path: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(path).get_charmap())
