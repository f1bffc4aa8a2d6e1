"""What all figures share: colours, bare axes, and files whose bytes depend only on the figure.

Functions that draw import Matplotlib themselves, so that nothing else waits for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.core.errors import ConfigError
from utils.core.files import whole_file
from utils.core.fonts import MISSING_GLYPH, set_fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with the common kinds of colour blindness can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Dash patterns for nine classes, for prints without colour.
STYLES = (
    "-",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (6, 2, 1, 2)),
    (0, (10, 2)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
    (0, (10, 2, 3, 2)),
    (0, (3, 4)),
)
SMALL = 8  # points, the smallest that is legible in print
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": SMALL, "handlelength": 4}

# Text stays text that can be searched and edited; the ids in an SVG are the same each time.
_SETTINGS: Any = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "litemil"}
_UNDATED: dict[str, dict[str, None]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
FORMATS = tuple(_UNDATED)
DPI = 300
_MOST_PIXELS = 40_000_000  # of a picture: 160 MB while it is drawn


def save_figure(figure: Figure, path: str | Path, dpi: int = DPI, *, tight: bool = True) -> None:
    """Write a figure in the format of the path's ending, .png, .pdf or .svg; pictures have `dpi`, or fewer if they
    would have more than 40 million pixels.

    `tight` cuts the margins off. Equal figures give equal files. Raises ConfigError for another ending.
    """
    import matplotlib

    path = Path(path)
    kind = path.suffix[1:].lower()
    if kind not in FORMATS:
        raise ConfigError(f"{path}: figures are written as .png, .pdf or .svg; end the name in one of them")
    set_fonts(figure)
    width, height = figure.get_size_inches()
    dpi = picture_dpi(width, height, dpi)
    if figure.legends:  # a legend beside the plots is placed only when it is drawn a second time
        figure.draw_without_rendering()
    with whole_file(path) as temporary, matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", MISSING_GLYPH)  # told in one line by `set_fonts`
        figure.savefig(temporary, format=kind, dpi=dpi, bbox_inches="tight" if tight else None, metadata=_UNDATED[kind])


def picture_dpi(width: float, height: float, dpi: int = DPI) -> int:
    """Return the dpi of a picture of `width` by `height` inches: `dpi`, or fewer to stay below 40 million pixels."""
    return min(dpi, math.floor(math.sqrt(_MOST_PIXELS / (width * height))))


def write_figures(
    folder: Path, figures: Mapping[str, Figure], formats: Sequence[str], *, missing_only: bool = False
) -> list[Path]:
    """Write figures, given by name, in each of the formats, or only the missing files; return those written."""
    paths = []
    for name, figure in figures.items():
        for path in figure_paths(folder / name, formats):
            if not (missing_only and path.exists()):
                save_figure(figure, path)
                paths.append(path)
    return paths


def figure_paths(path: Path, formats: Sequence[str]) -> list[Path]:
    """Return the files of a figure in each of the formats; `path` has no ending."""
    return [path.with_name(f"{path.name}.{kind}") for kind in dict.fromkeys(formats)]


def bare_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of one plot, `width` by `height` inches, framed on two sides only."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    bare(axes)
    return figure, axes


def bare(axes: Axes, x_label: str = "", y_label: str = "") -> None:
    """Label the axes, and remove the frame at the top and on the right."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, **settings: Any) -> None:
    """Add a legend of all plots below them, and make the figure higher by its height."""
    legend = figure.legend(loc="outside lower center", **LEGEND | settings)
    texts = [legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]
    lines = sum(text.count("\n") + 1 for text in texts if text)
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)
