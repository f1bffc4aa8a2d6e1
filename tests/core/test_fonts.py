"""Fonts are chosen by the characters of a text; what no font has is told in one line."""

import logging
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from utils.core import fonts
from utils.core.fonts import font_file, set_fonts, text_width, wrapped
from utils.core.plots import save_figure
from utils.slides.preview import draw_preview

NAME = "Small CJK"
TEXT = "患者 한국"


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    """No font that another test installed, and every warning anew."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    caches = [function for function in vars(fonts).values() if hasattr(function, "cache_clear")]
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def write_font(path, text, name=NAME):
    """Write a font in which each letter of a text is a full black square."""
    letters = {ord(letter): f"u{ord(letter):X}" for letter in text if letter != " "}
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *letters.values()])
    builder.setupCharacterMap(letters)
    glyphs = {}
    for glyph in (".notdef", *letters.values()):
        pen = TTGlyphPen(None)
        if glyph != ".notdef":
            pen.moveTo((0, 0))
            for corner in ((0, 1000), (1000, 1000), (1000, 0)):
                pen.lineTo(corner)
            pen.closePath()
        glyphs[glyph] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def titled(text):
    figure = Figure(figsize=(4, 1))
    figure.text(0.1, 0.3, text, fontsize=40)
    return figure


def ink(path):
    return (np.asarray(Image.open(path).convert("L")) < 100).mean()


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_a_font_installed_since_is_used(tmp_path, monkeypatch, caplog, kind):
    """Matplotlib lists fonts once and keeps the list, so a font installed as advised would not be found."""
    write_font(tmp_path / "cjk.ttf", TEXT)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_, **__: [str(tmp_path / "cjk.ttf")])
    figure = titled(f"S1 {TEXT}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / f"a.{kind}")
    assert not caplog.records
    assert figure.texts[0].get_fontfamily() == ["DejaVu Sans", NAME]
    assert font_file(TEXT) == tmp_path / "cjk.ttf"
    if kind == "png":
        plain = titled("S1")
        save_figure(plain, tmp_path / "b.png", tight=False)
        save_figure(figure, tmp_path / "a.png", tight=False)
        assert ink(tmp_path / "a.png") > 2 * ink(tmp_path / "b.png")  # squares of ink, not boxes


def test_missing_characters_are_told_once_in_one_line(tmp_path, monkeypatch, caplog):
    base = [font for font in font_manager.fontManager.ttflist if font.name == fonts.BASE_FAMILY]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", base)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        for name in ("a.png", "b.png"):
            save_figure(titled("患者 ぁ 한 \U00010400"), tmp_path / name)
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    assert "no installed font has" in message
    assert "Noto Sans CJK and Noto Sans Deseret (Debian, Ubuntu: apt install fonts-noto-cjk)" in message


def test_tick_labels_have_their_fonts_too(tmp_path, monkeypatch):
    write_font(tmp_path / "cjk.ttf", TEXT)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_, **__: [str(tmp_path / "cjk.ttf")])
    figure = Figure()
    axes = figure.subplots()
    axes.barh([TEXT, "benign"], [1, 2])
    set_fonts(figure)
    assert [label.get_fontfamily() for label in axes.get_yticklabels()] == [["DejaVu Sans", NAME], ["sans-serif"]]


def test_the_preview_of_an_extraction_has_the_letters_of_its_title(tmp_path, monkeypatch):
    write_font(tmp_path / "cjk.ttf", TEXT)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_, **__: [str(tmp_path / "cjk.ttf")])
    preview = draw_preview(
        np.full((50, 600, 3), 255, np.uint8), (600, 50), kept=np.zeros((0, 2), int), dropped={}, size_level0=10,
        title="患者",
    )  # fmt: skip
    strip = np.asarray(preview.convert("L"))[:24, 10:38]
    assert (strip < 100).mean() > 0.4


@pytest.mark.parametrize(
    ("text", "inches", "lines"),
    [
        ("one two three", 10, ["one two three"]),
        ("one two three", 0.5, ["one two", "three"]),
        ("one\ntwo", 10, ["one", "two"]),
        ("", 1, [""]),
    ],
)
def test_lines_break_between_words(text, inches, lines):
    assert wrapped(text, inches, 8).split("\n") == lines


def test_a_word_longer_than_a_line_is_broken_and_nothing_is_lost():
    for text in ("x" * 200, "ab " + "长" * 100, "a " * 50 + "b" * 90):
        lines = wrapped(text, 1.0, 10).split("\n")
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert all(text_width(line) <= 7.2 for line in lines)
        assert len(lines) > 3
    assert wrapped("checkpoint: " + "y" * 60, 1.0, 10, "    ").split("\n")[1].startswith("    y")
