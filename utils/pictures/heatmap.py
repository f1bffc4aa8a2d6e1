"""Figures of attention over a slide."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from utils.core.fonts import wrapped
from utils.core.plots import SMALL, picture_dpi, save_figure
from utils.core.text import NOTICE, escape_mathtext, percent_text
from utils.pictures.attention_map import AttentionMap
from utils.pictures.evidence_map import EvidenceOverlay
from utils.pictures.overlay import Overlay, Picture

# Scale bars are one of these long, in um, whichever is nearest to a fifth of the picture.
_BAR_LENGTHS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_TOP_COLOUR, _LEAST_COLOUR = "#d62728", "#1f77b4"
_NUMBER_ROOM = 24  # points of a patch's side from which its number covers little of it
_LONGER_SIDE = 9  # inches of a map's longer side
_COLUMNS, _CELL = 5, 2.2  # of a grid of patches, and inches of each
_THUMBNAIL = 240  # px of the longer side
_LEAST_ASPECT = 4 / 9  # width by height of a map with its margins, so that a title has room above a narrow slide
_BAR_ROOM = 1.5  # inches beside a map for its colour bar
_LINE = 1.35 / 72  # inches of a line of text for each point of its size
_DETAILED = 14  # inches of the detailed figure's width
_FACTS_SIZE, _FACTS_WIDTH = 7.5, 4.0  # points, inches
_PLOT_WIDTH = 2.7  # inches for the texts of the plots of attention
_CLASS_WIDTH = 1.4  # inches for the name of a class beside its bar
_LOG_FROM = 200  # patches from which the histogram is logarithmic, so that bins of few patches show
_BLANK = "Drawn without the slide: patches are where their coordinates place them."


def map_thumbnail(overlay: Overlay) -> Image.Image:
    """Return a small heatmap over the slide, for the index page."""
    small = Image.fromarray(overlay.picture.thumbnail)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    reduced = replace(overlay, picture=replace(overlay.picture, thumbnail=np.asarray(small)))
    colours = reduced.colours
    weight = overlay.style.alpha * colours[..., 3:]
    mixed = reduced.picture.thumbnail * (1 - weight) + 255 * colours[..., :3] * weight
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def heatmap_figure(overlay: Overlay, *, title: str, top_k: int) -> Figure:
    """Draw the heatmap over the overview, the `top_k` most attended patches outlined and numbered."""
    attention = overlay.attention
    count = len(attention.top(top_k))
    outlined = [f"Outlined in red and numbered: the {count} {attention.most_text}."] if count else []
    notes = [*outlined, *attention.notes, *([_BLANK] if overlay.picture.is_blank else [])]
    figure, axes = _map_figure(overlay.picture, "\n".join([title, *notes]), 10)
    _draw_slide(axes, overlay.picture)
    _draw_heat(axes, overlay, top_k, _map_size(overlay.picture)[1])
    return with_notice(figure)


def evidence_figure(overlay: EvidenceOverlay, *, title: str, text: str, top_k: int, alpha: float) -> Figure:
    """Draw the evidence for a class over the overview. The `top_k` patches that argue most for it are outlined and
    numbered, those that argue most against it outlined in dashes. `text` is what they add up to.
    """
    outlined = "; numbered patches argue most for it, dashed ones most against it" if top_k else ""
    figure, axes = _map_figure(overlay.picture, f"{title}\nEvidence: {text}{outlined}", 9)
    _draw_slide(axes, overlay.picture)
    _draw_evidence(axes, overlay, top_k, alpha, _map_size(overlay.picture)[1])
    return with_notice(figure)


def detailed_figure(
    overlay: Overlay,
    *,
    title: str,
    top_k: int,
    probabilities: Mapping[str, float],
    facts: Sequence[tuple[str, str]],
    evidence: EvidenceOverlay | None = None,
    probability_title: str = "probability",
    marked: Sequence[str] = (),
) -> Figure:
    """Draw the slide beside the heatmap, and beside the `evidence` for a class if there is any; below them the
    distribution and the concentration of attention, the probabilities of the classes under their title, those that are
    `marked` darker, and `facts`, pairs of a name and a text.
    """
    picture, attention = overlay.picture, overlay.attention
    h, w = picture.shape
    maps = _count_maps(picture, evidence)
    height = min(max((_DETAILED / maps - 0.8) * h / w, 3.0), 8.0)
    fact_text = "\n".join(wrapped(f"{name}: {value}", _FACTS_WIDTH, _FACTS_SIZE, "    ") for name, value in facts)
    names = [wrapped(name, _CLASS_WIDTH, SMALL) for name in probabilities]
    below_height = max(
        3.2, _lines_height(fact_text, _FACTS_SIZE) * 1.15 + 0.4, _lines_height("\n".join(names), SMALL) + 0.9
    )
    title = wrapped(title, _DETAILED - 0.4, 12)
    map_titles = _map_titles(overlay, evidence, top_k, _DETAILED / maps - 1)
    above_height = height + max(_lines_height(text, 10) for text in map_titles) - _lines_height("", 10)
    total_height = above_height + below_height + 0.2 + _lines_height(title, 12)
    figure = Figure(figsize=(_DETAILED, total_height), layout="constrained")
    above, below = _rows(figure, [above_height, below_height])
    _draw_maps(above, overlay, evidence, top_k, height, map_titles)
    bars = _draw_statistics(below, attention, fact_text)
    is_marked = [name in marked for name in probabilities]
    _draw_probabilities(bars, names, list(probabilities.values()), is_marked, probability_title)
    figure.suptitle(escape_mathtext(title), fontsize=12)
    return with_notice(figure)


def _count_maps(picture: Picture, evidence: EvidenceOverlay | None) -> int:
    """Return how many panels stand side by side: the slide, if it is at hand, the heatmap, and the evidence, if any."""
    return 1 + (not picture.is_blank) + (evidence is not None)


def _map_titles(overlay: Overlay, evidence: EvidenceOverlay | None, top_k: int, width: float) -> list[str]:
    """Return the titles of the panels, in lines of `width` inches; those of maps say what their outlines are."""
    count = len(overlay.attention.top(top_k))
    outlined = f", the {count} highest outlined in red and numbered" if count else ""
    titles = [] if overlay.picture.is_blank else ["slide"]
    titles.append(f"{overlay.attention.name}{outlined}")
    if evidence is not None:
        titles.append(f"evidence for {evidence.name}" + ("; red: most for it, dashed: against" if top_k else ""))
    return [wrapped(title, width, 10) for title in titles]


def _draw_maps(
    figure: SubFigure,
    overlay: Overlay,
    evidence: EvidenceOverlay | None,
    top_k: int,
    height: float,
    titles: Sequence[str],
) -> None:
    """Draw the slide, if it is at hand, the heatmap and the evidence side by side, `height` inches high, with their
    `titles`.
    """
    picture = overlay.picture
    panels = list(figure.subplots(1, len(titles), squeeze=False).flat)
    for panel, title in zip(panels, titles, strict=True):
        _draw_slide(panel, picture)
        panel.set_title(escape_mathtext(title), fontsize=10)
    _draw_heat(panels[0 if picture.is_blank else 1], overlay, top_k, height)
    if evidence is not None:
        _draw_evidence(panels[-1], evidence, top_k, overlay.style.alpha, height)


def _draw_statistics(figure: SubFigure, attention: AttentionMap, fact_text: str) -> Axes:
    """Draw how attention is spread and concentrated, and the facts; return the axes between them."""
    distribution, concentration, between, text = figure.subplots(1, 4, width_ratios=[1, 1, 0.9, 1.4])
    _draw_distribution(distribution, attention)
    _draw_concentration(concentration, attention)
    text.set_axis_off()
    text.text(
        0, 1, escape_mathtext(fact_text), va="top", fontsize=_FACTS_SIZE, linespacing=1.4, transform=text.transAxes
    )
    return between


def reduced(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return an image whose longer side is at most `side` px."""
    if max(pixels.shape) <= side:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def patch_grid_figure(
    groups: Sequence[tuple[str, str, Sequence[NDArray[np.uint8]], Sequence[str]]], title: str
) -> Figure:
    """Draw groups of patches in rows of five, each group with its title, its kind ("top" or "least"), its patches and
    their captions.
    """
    groups = [group for group in groups if len(group[2])]
    if not groups:
        return _notice_only(f"{title}\nNo patch is the most or the least attended: all weigh the same.")
    rows = [-(-len(patches) // _COLUMNS) for _, _, patches, _ in groups]
    columns = min(_COLUMNS, max(len(patches) for _, _, patches, _ in groups))
    width = max(_CELL * columns, 5)
    title, names = (wrapped(title, width - 0.3, 10), [wrapped(name, width - 0.3, 10) for name, *_ in groups])
    heights = [2.55 * count + 0.3 + _lines_height(name, 10) for count, name in zip(rows, names, strict=True)]
    figure = Figure(figsize=(width, sum(heights) + 0.3 + _lines_height(title, 10)), layout="constrained")
    side = round(_CELL * picture_dpi(*figure.get_size_inches()))
    subfigures = _rows(figure, heights)
    for subfigure, count, name, (_, kind, patches, captions) in zip(subfigures, rows, names, groups, strict=True):
        subfigure.suptitle(escape_mathtext(name), fontsize=10, color=_TOP_COLOUR if kind == "top" else _LEAST_COLOUR)
        cells = subfigure.subplots(count, columns, squeeze=False).ravel()
        for cell in cells:
            cell.set_axis_off()
        for cell, patch, caption in zip(cells, patches, captions, strict=False):
            cell.imshow(reduced(patch, side))
            cell.set_title(caption, fontsize=8)
    figure.suptitle(escape_mathtext(title), fontsize=10)
    return with_notice(figure)


def _notice_only(text: str) -> Figure:
    text = wrapped(text, 7.7, 10)
    figure = Figure(figsize=(8, 0.6 + _lines_height(text, 10)), layout="constrained")
    figure.suptitle(escape_mathtext(text), fontsize=10)
    return with_notice(figure)


def with_notice(figure: Figure) -> Figure:
    """Add the notice "For research, not a diagnosis." below a figure, and return it."""
    figure.supxlabel(NOTICE, x=0.99, ha="right", fontsize=7, color="#555555")
    return figure


def _rows(figure: Figure, heights: Sequence[float]) -> list[SubFigure]:
    subfigures = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    return list(np.asarray(subfigures, dtype=object).ravel())


def _map_size(picture: Picture) -> tuple[float, float]:
    """Return width and height of a map in inches: 9 for the longer side, and the least that texts need."""
    h, w = picture.shape
    return max(4.0, _LONGER_SIDE * w / max(h, w)), max(3.0, _LONGER_SIDE * h / max(h, w))


def _map_figure(picture: Picture, title: str, size: float) -> tuple[Figure, Axes]:
    """Return a figure of one map with room for its colour bar, as high as its title needs at a font size."""
    width, height = _map_size(picture)
    title = wrapped(title, width - 0.4, size)
    figure = Figure(figsize=(width + _BAR_ROOM, height + 0.6 + _lines_height(title, size)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(escape_mathtext(title), fontsize=size)
    return figure, axes


def _lines_height(text: str, size: float) -> float:
    """Return the height of the lines of a text in inches."""
    return (text.count("\n") + 1) * size * _LINE


def _draw_slide(axes: Axes, picture: Picture) -> None:
    h, w = picture.shape
    axes.imshow(picture.thumbnail)
    axes.set_axis_off()
    margin = max(0.0, _LEAST_ASPECT * h - w) / 2
    axes.set_xlim(-0.5 - margin, w - 0.5 + margin)
    if picture.mpp is not None:
        _scale_bar(axes, picture.mpp / picture.scale[0], w, h)


def _draw_heat(axes: Axes, overlay: Overlay, top_k: int, height: float) -> None:
    """Draw the heatmap, and its colour bar for a map `height` inches high; equal weights have no colours to explain."""
    picture, attention, style = overlay.picture, overlay.attention, overlay.style
    colours = overlay.colours
    colours[..., 3] *= style.alpha
    _lay_over(axes, colours)
    _outline(axes, picture, attention.coords[attention.top(top_k)], attention.size_level0, height)
    if attention.is_uniform:  # all patches are grey
        return
    bar = _colour_bar(axes, _over_white(style.mappable(attention), style.alpha), style.label(attention), height)
    if style.tick_text(0) is not None:
        bar.locator = MaxNLocator(integer=True)
        bar.formatter = FuncFormatter(lambda value, _: style.tick_text(value) or "")


def _lay_over(axes: Axes, colours: NDArray[np.float64]) -> None:
    limits = axes.get_xlim()
    axes.imshow(colours, interpolation="nearest")
    axes.set_xlim(limits)


def _draw_evidence(axes: Axes, overlay: EvidenceOverlay, top_k: int, alpha: float, height: float) -> None:
    """Draw the evidence for a class, and its colour bar for a map `height` inches high."""
    picture, evidence, name = overlay.picture, overlay.evidence, overlay.name
    colours = overlay.colours()
    colours[..., 3] *= alpha
    _lay_over(axes, colours)
    supporters, opponents = evidence.strongest(name, top_k)
    size = overlay.attention.size_level0
    _outline(axes, picture, overlay.attention.coords[supporters], size, height)
    _outline(axes, picture, overlay.attention.coords[opponents], size, height, against=True)
    _colour_bar(axes, _over_white(evidence.mappable(name), alpha), evidence.label(name), height, extend="both")


def _over_white(mappable: ScalarMappable, alpha: float) -> ScalarMappable:
    """Return a mapping to the colours that a map of this opacity has over white, as a colour bar shows them."""
    colours = mappable.cmap(np.linspace(0, 1, 256))[:, :3] * alpha + 1 - alpha
    return ScalarMappable(mappable.norm, ListedColormap(colours))


def _colour_bar(
    axes: Axes, mappable: ScalarMappable, label: str, height: float, *, extend: str = "neither"
) -> Colorbar:
    """Add a colour bar whose label has lines as long as the map is high, in inches."""
    bar = axes.figure.colorbar(mappable, ax=axes, shrink=0.8, extend=extend)
    bar.set_label(escape_mathtext(wrapped(label, height, SMALL)), fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return bar


def _outline(
    axes: Axes,
    picture: Picture,
    corners: NDArray[np.int64],
    size_level0: int,
    height: float,
    *,
    against: bool = False,
) -> None:
    """Outline patches on a map `height` inches high, and number those that are not `against`; a number that would cover
    its patch stands beside it.
    """
    side, line = size_level0 * picture.scale, "--" if against else "-"
    h, w = picture.shape
    points = float(side.min()) * 72 * min(height / h, _LONGER_SIDE / w)
    for rank, (x, y) in enumerate((corners - picture.corner) * picture.scale - 0.5, start=1):
        colour = _LEAST_COLOUR if against else _TOP_COLOUR
        outline = Rectangle((x, y), side[0], side[1], fill=False, edgecolor=colour, lw=1, ls=line)
        if against:  # dark dashes would be lost on what is dark
            outline.set_path_effects([withStroke(linewidth=2, foreground="white")])
        axes.add_patch(outline)
        if against:
            continue
        if points >= _NUMBER_ROOM:
            box = {"facecolor": _TOP_COLOUR, "edgecolor": "none", "pad": 1}
            axes.text(x, y, str(rank), color="white", fontsize=6, ha="left", va="top", bbox=box, clip_on=True)
        else:
            number = axes.annotate(
                str(rank), (x + side[0], y), (1.5, 1), textcoords="offset points", fontsize=6, color=_TOP_COLOUR
            )
            number.set_path_effects([withStroke(linewidth=1.5, foreground="white")])


def _scale_bar(axes: Axes, um_per_pixel: float, width: int, height: int) -> None:
    length = min(_BAR_LENGTHS, key=lambda um: abs(um - width * um_per_pixel / 5))
    pixels = length / um_per_pixel
    thickness = max(width, height) * 0.006
    x, y = width * 0.03, height * 0.97 - thickness
    axes.add_patch(Rectangle((x, y), pixels, thickness, facecolor="black", edgecolor="white", lw=0.5))
    name = f"{length} µm" if length < 1000 else f"{length // 1000} mm"
    axes.text(x + pixels + thickness, y + thickness, name, ha="left", va="bottom", fontsize=8,
              bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})  # fmt: skip


def _draw_distribution(axes: Axes, attention: AttentionMap) -> None:
    bins = min(50, max(10, len(attention) // 4))
    axes.hist(attention.multiples, bins=bins, range=(0, 1.05 * attention.peak), color="#555555")
    axes.axvline(1, color=_TOP_COLOUR, lw=1, ls="--")
    if len(attention) >= _LOG_FROM:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=wrapped(f"{attention.name}, multiple of uniform (dashed)", _PLOT_WIDTH, 10), ylabel="patches")
    axes.set_title(wrapped(f"how the {attention.name} is spread", _PLOT_WIDTH, 10), fontsize=10)


def _draw_concentration(axes: Axes, attention: AttentionMap) -> None:
    patches, half = np.arange(1, len(attention) + 1) / len(attention), attention.half_count
    share = attention.cumulative / attention.cumulative[-1]
    axes.plot(np.r_[0, patches], np.r_[0, share], color="#555555")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", lw=1, ls="--")
    axes.plot(half / len(attention), share[half - 1], "o", color=_TOP_COLOUR)
    first = wrapped(f"{attention.most_text} first", _PLOT_WIDTH, 10)
    axes.set(xlabel=first, ylabel=f"{attention.name} held", xlim=(0, 1), ylim=(0, 1))
    text = f"half is held by {half:,} of {len(attention):,} ({percent_text(half / len(attention))})"
    axes.set_title(wrapped(text, _PLOT_WIDTH, 10), fontsize=10)


def _draw_probabilities(
    axes: Axes, names: Sequence[str], values: Sequence[float], is_marked: Sequence[bool], title: str
) -> None:
    """Draw a bar of each value, dark if it is marked; nothing without values."""
    if not names:
        axes.set_axis_off()
        return
    axes.set_title(wrapped(title, _PLOT_WIDTH, 10), fontsize=10)
    lines = np.array([name.count("\n") + 1 for name in names])
    middles = np.cumsum(lines) - lines / 2  # a bar has as much room as its name
    colours = ["#222222" if is_dark else "#aaaaaa" for is_dark in is_marked]
    bars = axes.barh(middles, values, height=0.7, color=colours)
    axes.set_yticks(middles, [escape_mathtext(name) for name in names], fontsize=SMALL)
    axes.bar_label(bars, [percent_text(value) for value in values], padding=3, fontsize=SMALL)
    axes.set(xlim=(0, 1.4), xticks=[0, 0.5, 1])
    axes.invert_yaxis()


def save_picture(figure: Figure, path: str | Path | None) -> None:
    """Write the figure in the format of the path's ending (.png, .pdf or .svg), if a path is given."""
    if path is not None:
        save_figure(figure, path, tight=False)
