"""Pictures show any name: as it is written, in a font that has its script, or with a note that none has."""

import warnings

import matplotlib.image
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, rcParams

from publishing.domain_report import draw_maps
from publishing.pictures import MAX_LABEL, find_fonts, shorten_name
from publishing.report import draw_before_after

NAMES = [
    "a$\\b$", "$$", "$x", "_^{", "\\", "a|b`c`<i>", "two\nlines", "tab\t", "\ud800", "x" * 128, "नीता", "안나", "",
]  # fmt: skip


def draw(path, names):
    draw_before_after(path, names=names, before=[0.5] * len(names), after=[0.2] * len(names))
    return matplotlib.image.imread(path)


@pytest.fixture
def hangul_font(tmp_path, monkeypatch):
    """Installs a font in which 안 and 나 are filled squares."""
    pen = TTGlyphPen(None)
    for point in ((0, 0), (0, 700), (700, 700), (700, 0)):
        (pen.lineTo if pen.points else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord("안"): "square", ord("나"): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({name: (800, 0) for name in (".notdef", "square")})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Two Syllables", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "two.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(tmp_path / "two.ttf")
    yield "Two Syllables"
    font_manager.fontManager._findfont_cached.cache_clear()


def test_any_name_is_drawn(tmp_path):
    assert draw(tmp_path / "results.png", NAMES).shape[0] > 100
    draw_maps(
        tmp_path / "maps.png", spectrogram=np.ones((4, 8)), attention=np.ones((4, 4)), gates=None, name="a$\\b$\n안나"
    )
    assert (tmp_path / "maps.png").stat().st_size > 0


def test_a_name_is_no_formula(tmp_path):
    # As a formula the first name would be one letter, as wide as the second.
    pictures = [draw(tmp_path / f"{number}.png", [name]) for number, name in enumerate(["$\\alpha$", "\u03b1"])]
    widths = [(picture[-40:, :, :3].max(-1) < 0.5).any(0).sum() for picture in pictures]
    assert widths[0] > 2 * widths[1]


def test_a_font_that_has_the_script_is_found_and_used(hangul_font, tmp_path, caplog):
    assert find_fonts("ann") == rcParams["font.family"]
    assert find_fonts("안나 ann") == [*rcParams["font.family"], hangul_font]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw(tmp_path / "results.png", ["안나"])
    assert caplog.text == ""
    # Below the axis two squares are black all over, which no letter of any other font is.
    label = picture[-60:, :, :3].max(-1) < 0.2
    assert max(np.convolve(label[row], np.ones(12), "valid").max() for row in range(len(label))) == 12


def test_a_script_without_a_font_is_noted_once_for_all_its_characters(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(
        font_manager.fontManager,
        "ttflist",
        [font for font in font_manager.fontManager.ttflist if "DejaVu" in font.name],
    )
    draw(tmp_path / "results.png", ["안나", "अ", "नी"])
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("No installed font has 'अ' (U+0905), 'न' (U+0928), 'ी' (U+0940) ...: boxes are drawn")


def test_long_names_and_control_characters_are_shortened():
    assert shorten_name("ann") == "ann"
    assert len(shorten_name("ab" * 64)) == MAX_LABEL
    assert shorten_name("a\u2028b\0") == "a\\u2028b\\x00"
