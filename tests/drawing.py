"""Figures of few pixels, or of none, for tests that ask for more than how they look.

Import with `from tests.drawing import ...`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from PIL import Image

from utils.core import plots
from utils.core.fonts import set_fonts


@contextmanager
def drawn_coarsely(*, blank: Sequence[str] = ()) -> Iterator[None]:
    """Write figures with few pixels meanwhile, their parts where they are without a layout; in `blank` formats, files
    that show nothing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    save = getattr(Figure.savefig, "original", Figure.savefig)

    def save_coarsely(figure: Figure, path: Path, **settings) -> None:
        if settings["format"] in blank:
            Image.new("RGB", (8, 8)).save(path, "png")
            return
        set_fonts(figure)
        figure.set_layout_engine(None)  # with "none" figures of other formats would be drawn twice
        if settings["format"] != "png":
            save(figure, path, **settings | {"dpi": 25, "bbox_inches": None})
            return
        # Once: `savefig` draws a figure a first time without pixels.
        dpi, canvas = figure.dpi, figure.canvas
        figure.dpi = 25
        FigureCanvasAgg(figure).print_png(path, metadata=settings.get("metadata"))
        figure.dpi = dpi
        figure.set_canvas(canvas)

    save_coarsely.original = save
    with (
        patch.object(Figure, "savefig", save_coarsely),
        patch.object(Figure, "draw_without_rendering", lambda _: None),  # which only the layout needs
        patch.object(plots, "set_fonts", lambda _: None),  # it writes all labels; where they are drawn, see above
    ):
        yield
