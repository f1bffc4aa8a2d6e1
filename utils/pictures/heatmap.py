"""Attention laid over a slide: each patch painted at its exact footprint, overlaps averaged, nothing outside."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.stats import rankdata

from utils.core.errors import ConfigError

# Scale bars are one of these long, in um, whichever is nearest to a fifth of the picture.
_BAR_LENGTHS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


@dataclass(frozen=True)
class Picture:
    """A slide's overview and what is needed to draw on it: `thumbnail (h, w, 3)` uint8 over the whole slide of
    `width` x `height` level-0 px; `mpp` um per level-0 px, or None.
    """

    thumbnail: NDArray[np.uint8]
    width: int
    height: int
    mpp: float | None


def percentiles(attention: NDArray) -> NDArray[np.float64]:
    """`(N,)` rank of each patch from 0 to 100; equal attention gives equal rank (all equal: 50)."""
    if len(attention) == 1:
        return np.array([50.0])
    return (rankdata(attention) - 1) / (len(attention) - 1) * 100


def rasterise(
    coords: NDArray[np.int64], values: NDArray, size_level0: int, extent: tuple[int, int], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """`(h, w)` mean of the values of the patches that cover each pixel, NaN where none does.

    `coords (N, 2)` level-0 px of the top-left corners; `extent` (width, height) of the slide in level-0 px; `shape`
    (h, w) of the raster over it. Edges are rounded once in raster pixels, so that neighbouring patches share theirs:
    no seam, no overlap. Work is in proportion to N + h w: each patch adds its four corners, sums along both axes
    spread them.
    """
    height, width = shape
    scale = torch.tensor([width / extent[0], height / extent[1]], dtype=torch.float64)
    corners = torch.from_numpy(coords).double()
    limit = torch.tensor([width, height])
    low = torch.minimum((corners * scale).round().long(), limit - 1)
    # A patch smaller than a raster pixel still shows.
    high = torch.minimum(torch.maximum(((corners + size_level0) * scale).round().long(), low + 1), limit)
    weights = torch.stack([torch.from_numpy(np.asarray(values, dtype=np.float64)), torch.ones(len(coords)).double()])
    total, count = _spread(weights, low, high, height, width)
    covered = count.round() > 0
    return torch.where(covered, total / count.round().clamp(min=1), torch.nan).numpy()


def _spread(weights: torch.Tensor, low: torch.Tensor, high: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(2, h, w)` sums of `weights (2, N)` over the rectangles from `low` to `high` (N, 2)."""
    steps = torch.zeros(2, height + 1, width + 1, dtype=torch.float64)
    flat = steps.view(2, -1)
    for xs, ys, sign in ((low, low, 1), (high, low, -1), (low, high, -1), (high, high, 1)):
        flat.index_add_(1, ys[:, 1] * (width + 1) + xs[:, 0], sign * weights)
    return steps.cumsum(1).cumsum(2)[:, :height, :width]


def checked_colormap(name: str) -> str:
    if name not in colormaps:
        raise ConfigError(f"--cmap {name}: Matplotlib has no such colour map; try viridis, magma, jet or coolwarm")
    return name


def heatmap_figure(
    picture: Picture,
    coords: NDArray[np.int64],
    attention: NDArray,
    size_level0: int,
    *,
    title: str,
    cmap: str,
    alpha: float,
    top: NDArray[np.int64],
) -> Figure:
    """The overview with each patch coloured by its attention's percentile; the patches `top` outlined and numbered."""
    h, w = picture.thumbnail.shape[:2]
    heat = rasterise(coords, percentiles(attention), size_level0, (picture.width, picture.height), (h, w))
    figure = Figure(figsize=_figure_size(w, h), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture.thumbnail)
    scale = ScalarMappable(Normalize(0, 100), colormaps[checked_colormap(cmap)])
    colours = scale.to_rgba(np.nan_to_num(heat))
    colours[..., 3] = np.where(np.isnan(heat), 0, alpha)
    axes.imshow(colours, interpolation="nearest")
    _outline(axes, picture, coords[top], size_level0)
    if picture.mpp is not None:
        _scale_bar(axes, picture.mpp * picture.width / w, w, h)
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    peak = float(attention.max()) * len(attention)
    figure.colorbar(
        scale, ax=axes, shrink=0.8, label=f"attention percentile within the slide (highest: {peak:.2f} x uniform)"
    )
    return figure


def patch_grid_figure(patches: list[NDArray[np.uint8]], captions: list[str], title: str) -> Figure:
    """The patches in rows of five, each with its caption."""
    columns = min(5, len(patches))
    rows = -(-len(patches) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows + 0.4), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, patch, caption in zip(cells, patches, captions, strict=False):
        cell.imshow(patch)
        cell.set_title(caption, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _figure_size(width: int, height: int) -> tuple[float, float]:
    """Inches: the longer side 9, and room for the colour bar."""
    longer = max(width, height)
    return max(4.0, 9 * width / longer) + 1.2, max(3.0, 9 * height / longer) + 0.5


def _outline(axes: Axes, picture: Picture, corners: NDArray[np.int64], size_level0: int) -> None:
    h, w = picture.thumbnail.shape[:2]
    scale = np.array([w / picture.width, h / picture.height])
    for rank, (x, y) in enumerate(corners * scale - 0.5, start=1):
        side = size_level0 * scale
        axes.add_patch(Rectangle((x, y), side[0], side[1], fill=False, edgecolor="red", lw=1))
        box = {"facecolor": "red", "edgecolor": "none", "pad": 1}
        axes.text(x, y, str(rank), color="white", fontsize=6, va="bottom", bbox=box)


def _scale_bar(axes: Axes, um_per_pixel: float, width: int, height: int) -> None:
    length = min(_BAR_LENGTHS, key=lambda um: abs(um - width * um_per_pixel / 5))
    pixels = length / um_per_pixel
    x, y = width * 0.03, height * 0.97
    axes.add_patch(Rectangle((x, y), pixels, height * 0.008, facecolor="black", edgecolor="white", lw=0.5))
    name = f"{length} µm" if length < 1000 else f"{length // 1000} mm"
    axes.text(x + pixels / 2, y - height * 0.01, name, ha="center", va="bottom", fontsize=8,
              bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})  # fmt: skip
