"""Figures of attention over a slide."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from utils.core.plots import save_figure
from utils.core.text import NOTICE, escape_mathtext
from utils.pictures.attention_map import AttentionMap
from utils.pictures.evidence_map import EvidenceOverlay
from utils.pictures.overlay import Overlay, Picture

# Scale bars are one of these long, in um, whichever is nearest to a fifth of the picture.
_BAR_LENGTHS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_TOP_COLOUR, _LEAST_COLOUR = "#d62728", "#1f77b4"
_COLUMNS = 5
_THUMBNAIL = 240  # px of the longer side
_FACT_WIDTH = 62  # characters of a line of the detailed figure's text
_LOG_FROM = 200  # patches from which the histogram is logarithmic, so that bins of few patches show


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
    h, w = overlay.picture.shape
    figure = Figure(figsize=_figure_size(w, h), layout="constrained")
    axes = figure.subplots()
    _draw_slide(axes, overlay.picture)
    _draw_heat(axes, overlay, top_k)
    axes.set_title(escape_mathtext(title), fontsize=10)
    return with_notice(figure)


def evidence_figure(overlay: EvidenceOverlay, *, title: str, text: str, top_k: int, alpha: float) -> Figure:
    """Draw the evidence for a class over the overview. The `top_k` patches that argue most for it are outlined and
    numbered, those that argue most against it outlined in dashes. `text` is what they add up to.
    """
    picture, evidence, name = overlay.picture, overlay.evidence, overlay.name
    h, w = picture.shape
    figure = Figure(figsize=_figure_size(w, h), layout="constrained")
    axes = figure.subplots()
    _draw_slide(axes, picture)
    colours = overlay.colours()
    colours[..., 3] *= alpha
    axes.imshow(colours, interpolation="nearest")
    supporters, opponents = evidence.strongest(name, top_k)
    _outline(axes, picture, overlay.attention.coords[supporters], overlay.attention.size_level0)
    _outline(axes, picture, overlay.attention.coords[opponents], overlay.attention.size_level0, against=True)
    figure.colorbar(evidence.mappable(name), ax=axes, shrink=0.8, label=escape_mathtext(evidence.label(name)),
                    extend="both")  # fmt: skip
    lines = [title, *textwrap.wrap(f"Evidence: {text}", max(40, int(12 * figure.get_figwidth())))]
    axes.set_title(escape_mathtext("\n".join(lines)), fontsize=9)
    return with_notice(figure)


def detailed_figure(
    overlay: Overlay,
    *,
    title: str,
    top_k: int,
    probabilities: Mapping[str, float],
    facts: Sequence[tuple[str, str]],
) -> Figure:
    """Draw the slide beside the heatmap; below them the distribution and the concentration of attention, the
    probabilities of the classes, and `facts`, pairs of a name and a text.
    """
    picture, attention = overlay.picture, overlay.attention
    h, w = picture.shape
    height, lines = min(max(6.2 * h / w, 3.0), 8.0), _fact_lines(facts)
    below_height = max(3.2, 0.15 * len(lines) + 0.4)
    figure = Figure(figsize=(14, height + below_height + 0.2), layout="constrained")
    above, below = _rows(figure, [height, below_height])
    slide, heat = above.subplots(1, 2)
    _draw_slide(slide, picture)
    slide.set_title("slide", fontsize=10)
    _draw_slide(heat, picture)
    _draw_heat(heat, overlay, top_k)
    numbered = f", the {min(top_k, len(attention))} highest numbered" if top_k else ""
    heat.set_title(f"attention{numbered}", fontsize=10)
    distribution, concentration, classes, text = below.subplots(1, 4, width_ratios=[1, 1, 0.9, 1.4])
    _draw_distribution(distribution, attention)
    _draw_concentration(concentration, attention)
    _draw_probabilities(classes, probabilities)
    text.set_axis_off()
    text.text(
        0, 1, escape_mathtext("\n".join(lines)), va="top", fontsize=7.5, linespacing=1.4, transform=text.transAxes
    )
    figure.suptitle(escape_mathtext(title), fontsize=12)
    return with_notice(figure)


def patch_grid_figure(
    groups: Sequence[tuple[str, str, Sequence[NDArray[np.uint8]], Sequence[str]]], title: str
) -> Figure:
    """Draw groups of patches in rows of five, each group with its title, its kind ("top" or "least"), its patches and
    their captions.
    """
    groups = [group for group in groups if len(group[2])]
    rows = [-(-len(patches) // _COLUMNS) for _, _, patches, _ in groups]
    columns = min(_COLUMNS, max(len(patches) for _, _, patches, _ in groups))
    figure = Figure(figsize=(max(2.2 * columns, 5), 2.55 * sum(rows) + 0.5 * len(groups) + 0.4), layout="constrained")
    subfigures = _rows(figure, [2.55 * count + 0.5 for count in rows])
    for subfigure, count, (name, kind, patches, captions) in zip(subfigures, rows, groups, strict=True):
        subfigure.suptitle(escape_mathtext(name), fontsize=10, color=_TOP_COLOUR if kind == "top" else _LEAST_COLOUR)
        cells = subfigure.subplots(count, columns, squeeze=False).ravel()
        for cell in cells:
            cell.set_axis_off()
        for cell, patch, caption in zip(cells, patches, captions, strict=False):
            cell.imshow(patch)
            cell.set_title(caption, fontsize=8)
    figure.suptitle(escape_mathtext(title), fontsize=10)
    return with_notice(figure)


def with_notice(figure: Figure) -> Figure:
    """Add the notice "For research, not a diagnosis." below a figure, and return it."""
    figure.supxlabel(NOTICE, x=0.99, ha="right", fontsize=7, color="#555555")
    return figure


def _rows(figure: Figure, heights: Sequence[float]) -> list[SubFigure]:
    subfigures = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    return list(np.asarray(subfigures, dtype=object).ravel())


def _figure_size(width: int, height: int) -> tuple[float, float]:
    """Return width and height in inches: 9 for the longer side, and room for the colour bar."""
    longer = max(width, height)
    return max(4.0, 9 * width / longer) + 1.2, max(3.0, 9 * height / longer) + 0.5


def _draw_slide(axes: Axes, picture: Picture) -> None:
    axes.imshow(picture.thumbnail)
    axes.set_axis_off()
    if picture.mpp is not None:
        h, w = picture.shape
        _scale_bar(axes, picture.mpp / picture.scale[0], w, h)


def _draw_heat(axes: Axes, overlay: Overlay, top_k: int) -> None:
    picture, attention, style = overlay.picture, overlay.attention, overlay.style
    colours = overlay.colours
    colours[..., 3] *= style.alpha
    axes.imshow(colours, interpolation="nearest")
    _outline(axes, picture, attention.coords[attention.top(top_k)], attention.size_level0)
    axes.figure.colorbar(style.mappable(attention), ax=axes, shrink=0.8, label=style.label(attention))


def _outline(
    axes: Axes, picture: Picture, corners: NDArray[np.int64], size_level0: int, *, against: bool = False
) -> None:
    side, line = size_level0 * picture.scale, "--" if against else "-"
    for rank, (x, y) in enumerate(corners * picture.scale - 0.5, start=1):
        colour = _LEAST_COLOUR if against else _TOP_COLOUR
        axes.add_patch(Rectangle((x, y), side[0], side[1], fill=False, edgecolor=colour, lw=1, ls=line))
        if against:
            continue
        box = {"facecolor": _TOP_COLOUR, "edgecolor": "none", "pad": 1}
        axes.text(x, y, str(rank), color="white", fontsize=6, ha="left", va="top", bbox=box, clip_on=True)


def _scale_bar(axes: Axes, um_per_pixel: float, width: int, height: int) -> None:
    length = min(_BAR_LENGTHS, key=lambda um: abs(um - width * um_per_pixel / 5))
    pixels = length / um_per_pixel
    x, y = width * 0.03, height * 0.97
    axes.add_patch(Rectangle((x, y), pixels, height * 0.008, facecolor="black", edgecolor="white", lw=0.5))
    name = f"{length} µm" if length < 1000 else f"{length // 1000} mm"
    axes.text(x + pixels / 2, y - height * 0.01, name, ha="center", va="bottom", fontsize=8,
              bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})  # fmt: skip


def _draw_distribution(axes: Axes, attention: AttentionMap) -> None:
    bins = min(50, max(10, len(attention) // 4))
    axes.hist(attention.attention * len(attention), bins=bins, range=(0, 1.05 * attention.peak), color="#555555")
    axes.axvline(1, color=_TOP_COLOUR, lw=1, ls="--")
    if len(attention) >= _LOG_FROM:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="attention, multiple of uniform (dashed)", ylabel="patches")
    axes.set_title("how attention is spread", fontsize=10)


def _draw_concentration(axes: Axes, attention: AttentionMap) -> None:
    patches, half = np.arange(1, len(attention) + 1) / len(attention), attention.half_count
    share = attention.cumulative / attention.cumulative[-1]
    axes.plot(np.r_[0, patches], np.r_[0, share], color="#555555")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", lw=1, ls="--")
    axes.plot(half / len(attention), share[half - 1], "o", color=_TOP_COLOUR)
    axes.set(xlabel="patches, the most attended first", ylabel="attention held", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"half is held by {half:,} of {len(attention):,} ({half / len(attention):.1%})", fontsize=10)


def _draw_probabilities(axes: Axes, probabilities: Mapping[str, float]) -> None:
    names, values = [escape_mathtext(name) for name in probabilities], list(probabilities.values())
    best = values.index(max(values))
    bars = axes.barh(names, values, color=["#222222" if index == best else "#aaaaaa" for index in range(len(values))])
    axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, fontsize=9)
    axes.set(xlim=(0, 1.25), xticks=[0, 0.5, 1])
    axes.invert_yaxis()
    axes.set_title("probability", fontsize=10)


def _fact_lines(facts: Sequence[tuple[str, str]]) -> list[str]:
    texts = (textwrap.wrap(f"{name}: {value}", _FACT_WIDTH, subsequent_indent="    ") for name, value in facts)
    return [line for lines in texts for line in lines]


def save_picture(figure: Figure, path: str | Path | None) -> None:
    """Write the figure in the format of the path's ending (.png, .pdf or .svg), if a path is given."""
    if path is not None:
        save_figure(figure, path, dpi=200, tight=False)
