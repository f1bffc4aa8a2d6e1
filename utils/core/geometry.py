"""Coordinate arithmetic on slides: exact level-0 grids, and how much of each patch a tissue mask covers. NumPy only."""

import numpy as np
from numpy.typing import NDArray


def level0_size(pixels: int, downsample: float) -> int:
    """Return how many level-0 pixels `pixels` pixels of a level span, rounded; at least 1."""
    return max(1, round(pixels * downsample))


def usable_extent(extent_level0: int, extent_level: int, downsample: float) -> int:
    """Return the level-0 pixels along one axis that a level really shows.

    A pyramid level is cut to whole pixels, so the last level-0 column can lie outside it; a grid that stays within
    `usable_extent` never reads beyond the level's edge.
    """
    # The margin keeps a product such as 550 * 2.001818... = 1100.9999999999998 from losing a column.
    return min(extent_level0, int(extent_level * downsample + 1e-6))


def patch_grid(
    width: int, height: int, size_level0: int, stride_level0: int, least_remainder: float | None = None
) -> NDArray[np.int64]:
    """Return the top-left corners (x, y) of all patches of a regular grid that lie inside the slide.

    Args:
        width, height: the slide in level-0 px.
        size_level0, stride_level0: side of a patch and distance between neighbours, in level-0 px, both >= 1.
        least_remainder: if the grid leaves at least so many level-0 px (above 0) at the right or bottom edge, one more
            column or row ends at that edge and overlaps the one before; None leaves the remainder out.

    Returns:
        (M, 2) int64 in level-0 px, row by row; M = 0 if the slide is smaller than one patch.

    Raises:
        ValueError: a size or a stride below 1.
    """
    if size_level0 < 1 or stride_level0 < 1:
        raise ValueError(f"patch_grid: {size_level0=} and {stride_level0=} must be at least 1 level-0 px")
    xs, ys = (_starts(extent - size_level0, stride_level0, least_remainder) for extent in (width, height))
    grid = np.empty((len(ys), len(xs), 2), dtype=np.int64)
    grid[..., 0] = xs[None, :]
    grid[..., 1] = ys[:, None]
    return grid.reshape(-1, 2)


def _starts(last: int, stride: int, least_remainder: float | None) -> NDArray[np.int64]:
    """Return the starts of patches along one axis, up to `last`; none if that is below 0."""
    starts = np.arange(0, last + 1, stride, dtype=np.int64)
    if least_remainder is None or not len(starts) or last - starts[-1] < least_remainder:
        return starts
    return np.append(starts, last)


def covered_fraction(
    mask: NDArray[np.bool_], coords: NDArray[np.integer], size_level0: int, slide_width: int, slide_height: int
) -> NDArray[np.float64]:
    """Return the fraction of each patch's footprint that a mask marks, exact to float rounding.

    Each mask pixel is a rectangle of `slide_width / w` by `slide_height / h` level-0 px; a patch that cuts through it
    counts the fraction it covers. Anything of a footprint outside the slide counts as unmarked.

    Args:
        mask: (h, w) bool over the whole slide; its scale may differ between x and y.
        coords: (M, 2) top-left corners (x, y) in level-0 px.
        size_level0: side of a patch in level-0 px.
        slide_width, slide_height: the slide in level-0 px.

    Returns:
        (M,) float64 in [0, 1].
    """
    rows, columns = mask.shape
    integral = np.zeros((rows + 1, columns + 1), dtype=np.int64)
    integral[1:, 1:] = mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)

    to_mask = np.array([columns / slide_width, rows / slide_height])
    edge = np.array([columns, rows], dtype=np.float64)
    corners = coords.astype(np.float64)
    low: NDArray[np.float64] = np.clip(corners * to_mask, 0.0, edge)
    high: NDArray[np.float64] = np.clip((corners + size_level0) * to_mask, 0.0, edge)
    marked = (
        _integral_at(integral, high[:, 0], high[:, 1])
        - _integral_at(integral, low[:, 0], high[:, 1])
        - _integral_at(integral, high[:, 0], low[:, 1])
        + _integral_at(integral, low[:, 0], low[:, 1])
    )
    footprint = size_level0**2 * to_mask[0] * to_mask[1]
    return np.clip(marked / footprint, 0.0, 1.0)


def _integral_at(integral: NDArray[np.int64], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the integral image at fractional positions: bilinear, which is exact as the mask is constant in a cell."""
    left = np.minimum(x.astype(np.int64), integral.shape[1] - 2)
    top = np.minimum(y.astype(np.int64), integral.shape[0] - 2)
    right_share, bottom_share = x - left, y - top
    upper = integral[top, left] * (1 - right_share) + integral[top, left + 1] * right_share
    lower = integral[top + 1, left] * (1 - right_share) + integral[top + 1, left + 1] * right_share
    return upper * (1 - bottom_share) + lower * bottom_share
