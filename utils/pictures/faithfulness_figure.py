"""The figure of a faithfulness test: deletion and insertion curves, and the map beside that of random weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from utils.core.fonts import wrapped
from utils.core.text import escape_mathtext
from utils.pictures.attention_map import ATTENTION, UNIFORM, AttentionMap
from utils.pictures.faithfulness_text import doubts, gap_words, verdict
from utils.pictures.heatmap import with_notice
from utils.pictures.overlay import GREY

_MOST, _LEAST, _RANDOM = "#d62728", "#1f77b4", "#7f7f7f"
_FOR = {"color": "#111111", "lw": 1.3, "ls": "-.", "label": "by evidence: most for the class first"}
_MAP_SIDE = 400  # px of the longer side of a map
_VERBS = {"deletion": "taken away", "insertion": "added"}


def faithfulness_figure(
    record: Mapping[str, Any],
    maps: Sequence[AttentionMap],
    cmap: str,
    title: str,
    class_name: str,
    weights: str = ATTENTION,
) -> Figure:
    """Draw the curves of `record`, a prediction's `faithfulness`, those of evidence too if there are any; and, if the
    patches have coordinates, the two `maps` of the model and of the same model with random weights, by percentile.
    `weights` is what the weights are. Equal weights have no order, so of them neither curves nor maps are drawn.
    """
    evidence, is_ordered = record.get("evidence") or {}, weights != UNIFORM and record["deletion"]["gap"] is not None
    maps = maps if is_ordered else []
    width = 10 if maps else 6.4
    text = "\n".join(filter(None, [title, verdict(record, weights), *doubts(class_name, record, weights)]))
    title, label = wrapped(text, width - 0.3, 10), wrapped(f"Probability of {class_name}", 2.4, 8)
    height = 3.4 + 0.17 * (title.count("\n") + 1)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, 4 if maps else 2, width_ratios=[1.25, 1.25, 1, 1] if maps else None)
    for curve_axes, (name, verb) in zip(axes, _VERBS.items(), strict=False):
        _draw_curves(curve_axes, record[name], record["random_orders"], weights if is_ordered else None)
        if evidence and evidence[name]["gap"] is not None:
            curve_axes.plot(evidence[name]["fractions"], evidence[name]["most_for_first"], **_FOR)
        gaps = gap_words(name, record, weights)
        curve_axes.set_title(wrapped("\n".join(gaps or [name.capitalize()]), 2.4, 8), fontsize=8)
        curve_axes.set_xlabel(f"Share of patches {verb}", fontsize=8)
    axes[0].set_ylabel(escape_mathtext(label), fontsize=8)
    look = {"loc": "outside lower left", "ncols": 2, "frameon": False, "fontsize": 7}
    figure.legend(*axes[1].get_legend_handles_labels(), **look)
    if maps:
        defined = [value for value in record["rank_correlation_with_random_weights"] if value is not None]
        correlation = f"{np.mean(defined):.2f}, mean of {len(defined)}" if defined else "none: all patches are equal"
        titles = wrapped(weights.capitalize(), 1.8, 9), f"With random weights\n(rank correlation\n{correlation})"
        for map_axes, attention_map, map_title in zip(axes[2:], maps, titles, strict=True):
            _draw_map(map_axes, attention_map, cmap)
            ties = "\n(grey: equal, no rank)" if attention_map.is_unranked.any() else ""
            map_axes.set_title(f"{map_title}{ties}", fontsize=9)
    figure.suptitle(escape_mathtext(title), fontsize=10)
    return with_notice(figure)


def _draw_curves(axes: Axes, curves: Mapping[str, Any], orders: int, weights: str | None) -> None:
    """Draw the curves of random orders, and those of the weights' order, which are called `weights`, if it has one."""
    most, least = "most attended", "least attended"
    if weights != ATTENTION:
        most, least = "highest", "lowest"
    x, mean, spread = (np.array(curves[name]) for name in ("fractions", "random_mean", "random_std"))
    low, high = (np.clip(mean + sign * spread, 0, 1) for sign in (-1, 1))
    axes.fill_between(x, low, high, color=_RANDOM, alpha=0.25, lw=0)
    axes.plot(x, mean, color=_RANDOM, ls=":", lw=1.5, label=f"random ({orders} orders, ± sd)")
    if weights is not None:
        axes.plot(x, curves["most_attended_first"], color=_MOST, lw=1.6, label=f"by {weights}: {most} first")
        axes.plot(
            x, curves["least_attended_first"], color=_LEAST, lw=1.6, ls="--", label=f"by {weights}: {least} first"
        )
    axes.set(xlim=(0, 1), ylim=(-0.03, 1.03))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_map(axes: Axes, attention_map: AttentionMap, cmap: str) -> None:
    """Draw the patches without the slide, cropped to them; grey where they have no rank."""
    extent = attention_map.coords.max(axis=0) + attention_map.size_level0
    scale = _MAP_SIDE / extent.max()
    width, height = (max(1, round(float(side) * scale)) for side in extent)
    size, shape = (int(extent[0]), int(extent[1])), (height, width)
    heat = attention_map.raster(attention_map.percentiles, size, shape)
    axes.imshow(heat, cmap=cmap, vmin=0, vmax=100, interpolation="nearest")
    if attention_map.is_unranked.any():
        is_grey = np.nan_to_num(attention_map.raster(attention_map.is_unranked, size, shape)) > 0.5
        axes.imshow(np.where(is_grey[..., None], (*GREY, 1.0), 0.0), interpolation="nearest")
    axes.set_axis_off()


def cropped_map(coords: NDArray[np.int64], attention: NDArray, size_level0: int) -> AttentionMap:
    """Return a map in coordinates from the top-left corner of its patches."""
    return AttentionMap(coords - coords.min(axis=0), attention, size_level0)
