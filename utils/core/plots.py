"""What all figures share: colours, bare axes, and files whose bytes depend on nothing but the figure.

Matplotlib is imported by what draws: who asks for the name of a figure alone does not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.core.errors import ConfigError
from utils.core.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart in the common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# As many dash patterns as nine classes need where no colour is printed.
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
SMALL = 8  # points, the least that is legible in print
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": SMALL, "handlelength": 4}

# A text stays a text that can be searched and edited; the ids of an SVG do not depend on the moment.
_SETTINGS: Any = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "litemil"}
_UNDATED: dict[str, dict[str, None]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
FORMATS = tuple(_UNDATED)


def save_figure(figure: Figure, path: str | Path, dpi: int = 300, *, tight: bool = True) -> None:
    """Write a figure in the format of the path's ending: .png, .pdf or .svg, whose pictures have `dpi`.

    `tight` cuts the margins off. Equal figures are equal files. Raises ConfigError for another ending.
    """
    import matplotlib

    path = Path(path)
    kind = path.suffix[1:].lower()
    if kind not in FORMATS:
        raise ConfigError(f"{path}: figures are written as .png, .pdf or .svg; end the name in one of them")
    if figure.legends:  # one beside the plots finds its place when it is drawn the second time
        figure.draw_without_rendering()
    with whole_file(path) as part, matplotlib.rc_context(_SETTINGS):
        figure.savefig(part, format=kind, dpi=dpi, bbox_inches="tight" if tight else None, metadata=_UNDATED[kind])


def write_figures(
    folder: Path, figures: Mapping[str, Figure], formats: Sequence[str], *, missing_only: bool = False
) -> list[Path]:
    """Write figures by their names in each of the formats, or those files alone that are not there; return the files
    written.
    """
    written = []
    for name, figure in figures.items():
        for path in figure_paths(folder / name, formats):
            if not (missing_only and path.exists()):
                save_figure(figure, path)
                written.append(path)
    return written


def figure_paths(path: Path, formats: Sequence[str]) -> list[Path]:
    """Return where a figure called `path`, given without an ending, is written in each of the formats."""
    return [path.with_name(f"{path.name}.{kind}") for kind in dict.fromkeys(formats)]


def bare_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of one plot, `width` by `height` inches, with a frame on two sides only."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    bare(axes)
    return figure, axes


def bare(axes: Axes, x_label: str = "", y_label: str = "") -> None:
    """Name the axes, and take away the frame above and on the right."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, **settings: Any) -> None:
    """Add a legend of all plots below them, and make the figure so much higher."""
    legend = figure.legend(loc="outside lower center", **LEGEND | settings)
    texts = [legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]
    lines = sum(text.count("\n") + 1 for text in texts if text)
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)
