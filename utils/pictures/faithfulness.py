"""A small figure of whether attention matters: curves against random orders, and the map beside a random model's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from utils.core.text import escape_mathtext
from utils.pictures.attention_map import AttentionMap
from utils.pictures.heatmap import signed

_MOST, _LEAST, _RANDOM = "#d62728", "#1f77b4", "#7f7f7f"
_MAP_SIDE = 400  # px of the longer side of a map
_TITLES = {"deletion": "taken away", "insertion": "added"}


def faithfulness_figure(
    record: Mapping[str, Any], maps: Sequence[AttentionMap], cmap: str, title: str, class_name: str
) -> Figure:
    """The curves of `record`, a prediction's `faithfulness`; and, where the patches have places, the two `maps` of the
    model and of the same model with random weights, by percentile in the colour map `cmap`.
    """
    figure = Figure(figsize=(10 if maps else 6.4, 3.3), layout="constrained")
    axes = figure.subplots(1, 4 if maps else 2, width_ratios=[1.25, 1.25, 1, 1] if maps else None)
    for one, (name, done) in zip(axes, _TITLES.items(), strict=False):
        _draw_curves(one, record[name], record["random_orders"])
        one.set_title(f"{name.capitalize()}: gap {record[name]['gap']:+.3f}", fontsize=9)
        one.set_xlabel(f"Share of patches {done}", fontsize=8)
    axes[0].set_ylabel(f"Probability of {escape_mathtext(class_name)}", fontsize=8)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=7)
    if maps:
        told = [one for one in record["rank_correlation_with_random_weights"] if one is not None]
        correlation = f"{np.mean(told):.2f}, mean of {len(told)}" if told else "none: all patches are equal"
        for one, shown, name in zip(
            axes[2:], maps, ("Attention", f"With random weights\n(rank correlation\n{correlation})"), strict=True
        ):
            _draw_map(one, shown, cmap)
            one.set_title(name, fontsize=9)
    figure.suptitle(escape_mathtext(title), fontsize=10)
    return signed(figure)


def _draw_curves(axes: Axes, curves: Mapping[str, Any], orders: int) -> None:
    x, mean, spread = (np.array(curves[name]) for name in ("fractions", "random_mean", "random_std"))
    low, high = (np.clip(mean + sign * spread, 0, 1) for sign in (-1, 1))
    axes.fill_between(x, low, high, color=_RANDOM, alpha=0.25, lw=0)
    axes.plot(x, mean, color=_RANDOM, ls=":", lw=1.5, label=f"random ({orders} orders, ± sd)")
    axes.plot(x, curves["most_attended_first"], color=_MOST, lw=1.6, label="most attended first")
    axes.plot(x, curves["least_attended_first"], color=_LEAST, lw=1.6, ls="--", label="least attended first")
    axes.set(xlim=(0, 1), ylim=(-0.03, 1.03))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_map(axes: Axes, shown: AttentionMap, cmap: str) -> None:
    """The patches alone, in the frame they fill."""
    extent = shown.coords.max(axis=0) + shown.size_level0
    scale = _MAP_SIDE / extent.max()
    width, height = (max(1, round(float(side) * scale)) for side in extent)
    heat = shown.raster(shown.percentiles, (int(extent[0]), int(extent[1])), (height, width))
    axes.imshow(heat, cmap=cmap, vmin=0, vmax=100, interpolation="nearest")
    axes.set_axis_off()


def map_of(coords: NDArray[np.int64], attention: NDArray, size_level0: int) -> AttentionMap:
    """A map moved to where its own patches begin."""
    return AttentionMap(coords - coords.min(axis=0), attention, size_level0)
