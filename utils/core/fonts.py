"""Find installed fonts for the characters of a text, and break texts into lines of a given width.

Matplotlib's own font has no Chinese, Japanese or Korean characters, nor those of many other scripts.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from utils.core.runtime import log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE_FAMILY = "DejaVu Sans"
# Looked at first, in this order; then every other installed family.
_PREFERRED = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "Source Han Sans", "Microsoft YaHei", "PingFang SC", "PingFang HK", "Hiragino Sans GB",
    "Hiragino Sans", "Yu Gothic", "Meiryo", "Malgun Gothic", "Apple SD Gothic Neo", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "SimHei", "IPAexGothic", "IPAGothic", "NanumGothic", "Droid Sans Fallback", "Arial Unicode MS",
)  # fmt: skip
_NO_GLYPHS = ("last", "blank")  # in the names of fonts whose glyphs are boxes
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "FULLWIDTH", "HALFWIDTH", "IDEOGRAPHIC", "BOPOMOFO")
_SHOWN = 8  # characters that the warning lists
MISSING_GLYPH = r"Glyph \d+ .*missing from"  # Matplotlib's warning


def font_file(text: str) -> Path:
    """Return the font file that has most of a text's characters: Matplotlib's own if it has all.

    Characters that no installed font has are warned of, once.
    """
    characters, (families, missing) = _printed(text), _fallbacks(_beyond_base(text))
    _warn(missing)
    best = max([BASE_FAMILY, *families], key=lambda family: len(characters & _characters(family)))
    return Path(_file_of(best))


def set_fonts(figure: Figure) -> None:
    """Give each text of a figure the fonts that have its characters; warn, once, of those that no font has."""
    from matplotlib.text import Text

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels()  # writes the labels, which are empty until a figure is drawn
    for text in figure.findobj(Text):
        assert isinstance(text, Text)  # noqa: S101 - for the type checker
        families, missing = _fallbacks(_beyond_base(text.get_text()))
        _warn(missing)
        if families:
            text.set_fontfamily([BASE_FAMILY, *families])


def wrapped(text: str, inches: float, size: float, indent: str = "") -> str:
    """Break a text into lines of at most so many inches at a font size in points, also within words that are longer
    than a line. `indent` begins each line but the first of a paragraph.
    """
    most = inches * 72 / size
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"\s*\S+", paragraph):
            if text_width(line + word) > most and text_width(indent + word.lstrip()) <= most:
                lines.append(line)
                line, word = indent, word.lstrip()
            for character in word:
                if line.strip() and text_width(line + character) > most:
                    lines.append(line)
                    line = indent
                line += character
        lines.append(line)
    return "\n".join(lines)


def text_width(text: str) -> float:
    """Return the width of a text in em, the font's size."""
    return sum(map(_advance, text))


@cache
def _advance(character: str) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=[BASE_FAMILY, *_fallbacks(_beyond_base(character))[0]], size=100)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", MISSING_GLYPH)
        # A space alone has no ink, and a letter's ink is narrower than its step.
        pair, alone = (text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] for text in (
            f"|{character}|", "||",
        ))  # fmt: skip
    return (pair - alone) / 100


def _printed(text: str) -> frozenset[str]:
    return frozenset(character for character in text if not character.isspace() and character.isprintable())


def _beyond_base(text: str) -> frozenset[str]:
    return frozenset() if text.isascii() else _printed(text) - _characters(BASE_FAMILY)


@cache
def _fallbacks(characters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Return the families to use beside the base, and the characters that none of them has."""
    families = []
    if characters:
        for family in _installed():
            if characters & _characters(family):
                families.append(family)
                characters -= _characters(family)
            if not characters:
                break
    return families, characters


@cache
def _installed() -> list[str]:
    """Return the installed families, the preferred ones first; also those installed since Matplotlib listed fonts."""
    from matplotlib import font_manager

    listed = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - listed):
        try:
            font_manager.fontManager.addfont(path)
        except (OSError, RuntimeError, ValueError):  # a damaged font is none
            continue
    names = {font.name for font in font_manager.fontManager.ttflist}
    others = sorted(name for name in names if not any(word in name.lower() for word in _NO_GLYPHS))
    return [name for name in dict.fromkeys((*_PREFERRED, *others)) if name in names]


@cache
def _characters(family: str) -> frozenset[str]:
    from matplotlib import font_manager

    return frozenset(map(chr, font_manager.get_font(_file_of(family)).get_charmap()))


@cache
def _file_of(family: str) -> str:
    """Return the file of a family's upright font whose weight is nearest to normal."""
    from matplotlib import font_manager

    def distance(font: font_manager.FontEntry) -> tuple[bool, float, str]:
        weight = font.weight if isinstance(font.weight, int) else font_manager.weight_dict.get(font.weight, 400)
        return font.style != "normal", abs(weight - 400), font.fname

    return min((font for font in font_manager.fontManager.ttflist if font.name == family), key=distance).fname


@cache
def _warn(characters: frozenset[str]) -> None:
    if not characters:
        return
    scripts = {_script(character) for character in characters}
    shown = "".join(sorted(characters)[:_SHOWN])
    more = f" and {len(characters) - _SHOWN} more" if len(characters) > _SHOWN else ""
    packages = " (Debian, Ubuntu: apt install fonts-noto-cjk)" if "CJK" in scripts else ""
    log.warning(
        "no installed font has %s%s: figures show boxes instead; install %s%s",
        shown, more, " and ".join(f"Noto Sans {script}" for script in sorted(scripts)), packages,
    )  # fmt: skip


def _script(character: str) -> str:
    """Return the script of a character as Noto's fonts are called after it."""
    word = unicodedata.name(character, "SYMBOLS").split()[0].split("-")[0]
    return "CJK" if word in _CJK else word.capitalize()
