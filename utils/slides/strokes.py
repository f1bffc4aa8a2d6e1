"""Find strokes of a marker whose colour is also a stain's (pink, magenta, purple, brown), by their shape and texture.

A stroke is long, of even width, of nearly one hue, lies on glass, and has no nuclei: at 8 um/px the density of stained
tissue differs from its neighbourhood's by 0.12 to 0.37 of its mean (root mean square; a section of liver 0.13), that of
a stroke by 0.03 to 0.09. Candidates are searched on squares of 16 um and then tested at full resolution.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.slides.colour import binned_density, chroma, hue

_COARSEST_MPP = 10.0  # um/px; in coarser images nuclei are hardly visible
_SQUARE_UM = 16.0  # side of the squares on which strokes are searched
_MIN_DENSITY = 0.12  # mean density; the palest pink marker tried has 0.15
_SEED_HUE, _SEED_DENSITY = 0.07, 0.15  # spread over 3 x 3 squares: of the hue, and of the density as a share of it
_SAME_HUE = 0.25  # largest distance in the hue plane between a stroke and its rim
_RIM_SQUARES = 3  # width of the rim around the even inside of a stroke
_ROOM = 8  # squares around the inside, for its rim and the adjacent glass
_MIN_LENGTH_UM = 300.0  # of a piece: a thin or blotchy stroke falls apart,
_MIN_EXTENT_UM = 600.0  # and of all pieces close together: blood in a wide vessel is long too, but shorter
_RIDGE_PERCENTILE = 75  # of the distances from the rim along its middle: half a stroke's width, wherever it crosses
_MIN_ELONGATION = 2.2  # length over width, its rim included
_MIN_EVENNESS = 0.33  # twice the mean distance from the rim over the width: an endless band 0.5
_WIDER, _MOST_WIDER = 1.25, 0.12  # at most this share may be so much wider, as where lines of a cross or arrow meet
_GLASS_SQUARES = 2, 4  # distance from a stroke at which glass is expected,
_MIN_GLASS = 0.5  # over this share; tissue within tissue has none
_MAX_HUE_SPREAD = 0.1  # root mean square distance from the mean hue; markers 0.03 to 0.08
_NUCLEUS_SQUARES = 2  # gaps up to twice this wide in a stroke could be nuclei
_MIN_CHROMA = 0.19  # largest minus smallest channel density; collagen without nuclei 0.14, the palest marker 0.22
_MAX_TEXTURE = 0.11  # see above


@dataclass(frozen=True, eq=False)
class _Squares:
    """An image in squares of about 16 um."""

    u: NDArray[np.float32]  # (n, m)
    v: NDArray[np.float32]  # (n, m)
    stained: NDArray[np.bool_]  # (n, m)
    um: float


def find_strokes(density: NDArray[np.float32], stained: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """Find marker strokes of any colour, including their rims.

    Args:
        density: (h, w, 3) optical density.
        stained: (h, w) bool, where strokes are searched: coloured px that are not ink by their hue.
        mpp: um per px.

    Returns:
        (h, w) bool.
    """
    width = max(1, round(_SQUARE_UM / mpp))
    if mpp > _COARSEST_MPP or max(stained.shape) * mpp < _MIN_EXTENT_UM or min(stained.shape) < 3 * width:
        return np.zeros(stained.shape, dtype=bool)
    squares, seeds = _squares_and_seeds(density, stained, width, mpp)
    strokes = np.zeros(seeds.shape, dtype=bool)
    for area, seed in _pieces(seeds, squares):
        stroke = _whole_stroke(squares, area, seed)
        rows, columns = (slice(extent.start * width, extent.stop * width) for extent in area)
        if _is_long_on_glass(stroke, squares.stained[area], squares.um) and _is_plain(
            density[rows, columns], _enlarged(_inside(stroke, seed), width)
        ):
            strokes[area] |= stroke
    margins = [(0, whole - extent * width) for whole, extent in zip(stained.shape, strokes.shape, strict=True)]
    return np.pad(_enlarged(_long(strokes, squares.um), width), margins, mode="edge")


def _squares_and_seeds(
    density: NDArray[np.float32], stained: NDArray[np.bool_], width: int, mpp: float
) -> tuple[_Squares, NDArray[np.bool_]]:
    """Return the image in squares, and (n, m) bool: coloured squares of the same hue and density as those around."""
    binned = binned_density(density, width)
    u, v, mean = hue(binned)
    rows, columns = mean.shape
    inside = stained[width // 2 :: width, width // 2 :: width][:rows, :columns]
    even = inside & (mean > _MIN_DENSITY)
    even &= (_variance(u) + _variance(v) < _SEED_HUE**2) & (_variance(mean) < (_SEED_DENSITY * mean) ** 2)
    return _Squares(u, v, inside, width * mpp), even


def _variance(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (n, m): the variance over 3 x 3 squares."""
    from scipy import ndimage  # slow to import, and needed where a slide is read alone

    mean = ndimage.uniform_filter(values, 3)
    return ndimage.uniform_filter(values * values, 3) - mean * mean


def _pieces(seeds: NDArray[np.bool_], squares: _Squares) -> list[tuple[tuple[slice, slice], NDArray[np.bool_]]]:
    """Return the pieces near glass that may be the inside of a stroke: their areas, with room for a rim, and masks."""
    from scipy import ndimage

    labels = _labelled(seeds)
    sizes = np.bincount(labels.ravel())
    pieces = []
    for label, area in enumerate(ndimage.find_objects(labels), start=1):
        longest = _diagonal(area)
        if longest * squares.um < _MIN_LENGTH_UM / 2 or sizes[label] < longest / 2:
            continue
        rows, columns = (_widened(extent, end) for extent, end in zip(area, seeds.shape, strict=True))
        if (~squares.stained[rows, columns]).sum() > longest / 2:
            pieces.append(((rows, columns), labels[rows, columns] == label))
    return pieces


def _labelled(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return (n, m): the number of the 8-connected piece that each square belongs to; 0 for none."""
    from scipy import ndimage

    labels = np.empty(mask.shape, dtype=np.int32)
    ndimage.label(mask, structure=np.ones((3, 3)), output=labels)
    return labels


def _widened(extent: slice, end: int) -> slice:
    return slice(max(0, extent.start - _ROOM), min(end, extent.stop + _ROOM))


def _whole_stroke(squares: _Squares, area: tuple[slice, slice], seed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (n, m) bool: the inside of a stroke with the rim around it that has its hue."""
    from scipy import ndimage

    u, v = squares.u[area], squares.v[area]
    alike = np.hypot(u - np.median(u[seed]), v - np.median(v[seed])) < _SAME_HUE
    within = seed | (alike & squares.stained[area])
    return np.asarray(ndimage.binary_dilation(seed, iterations=_RIM_SQUARES, mask=within), dtype=bool)


def _is_long_on_glass(stroke: NDArray[np.bool_], stained: NDArray[np.bool_], um: float) -> bool:
    """Return whether a piece (n, m) of squares of `um` has the shape of a stroke, and glass around it."""
    from scipy import ndimage

    depth_of = _depth(stroke)
    depth, ridge = depth_of[stroke], depth_of[stroke & (depth_of == ndimage.maximum_filter(depth_of, 3))]
    width = 2 * float(np.percentile(ridge, _RIDGE_PERCENTILE))
    length = depth.size / width
    if length * um < _MIN_LENGTH_UM or length < _MIN_ELONGATION * width or 2 * depth.mean() < _MIN_EVENNESS * width:
        return False
    if (2 * depth > _WIDER * width).mean() > _MOST_WIDER:
        return False
    near, far = (np.asarray(ndimage.binary_dilation(stroke, iterations=steps)) for steps in _GLASS_SQUARES)
    around = far & (near == 0)
    return bool(around.any()) and float((~stained[around]).mean()) >= _MIN_GLASS


def _long(strokes: NDArray[np.bool_], um: float) -> NDArray[np.bool_]:
    """Return (n, m) bool: the strokes that are long, if pieces up to 64 um apart are joined."""
    if not strokes.any():
        return strokes
    from scipy import ndimage

    labels = _labelled(np.asarray(ndimage.binary_dilation(strokes, iterations=2), dtype=bool))
    extents = [_diagonal(area) - 4 for area in ndimage.find_objects(labels)]
    return strokes & np.array([False, *(extent * um >= _MIN_EXTENT_UM for extent in extents)])[labels]


def _diagonal(area: tuple[slice, slice]) -> float:
    return math.hypot(*(extent.stop - extent.start for extent in area))


def _enlarged(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    return mask.repeat(width, axis=0).repeat(width, axis=1)


def _depth(stroke: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (n, m): the distance of each square's centre from the stroke's rim."""
    from scipy import ndimage

    return np.asarray(ndimage.distance_transform_edt(np.pad(stroke, 1)))[1:-1, 1:-1] - 0.5


def _inside(stroke: NDArray[np.bool_], seed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (n, m) bool: a stroke without its rim, but with gaps, which may be nuclei; its seed if that is small."""
    from scipy import ndimage

    room = _NUCLEUS_SQUARES
    closed = np.asarray(ndimage.binary_closing(np.pad(stroke, room), iterations=room), dtype=bool)
    inside = _depth(closed[room:-room, room:-room]) >= 1.5
    return inside if inside.sum() >= seed.sum() / 2 else seed


def _is_plain(density: NDArray[np.float32], inside: NDArray[np.bool_]) -> bool:
    """Return whether the pixels `inside` (h, w) have a strong colour, a single hue, and no nuclei."""
    from scipy import ndimage

    u, v, mean = hue(density)
    strength = float(np.median(chroma(density[inside])))
    texture = (mean - ndimage.uniform_filter(mean, 5))[inside].std() / mean[inside].mean()
    return bool(
        strength > _MIN_CHROMA
        and texture < _MAX_TEXTURE
        and np.hypot(u[inside].std(), v[inside].std()) < _MAX_HUE_SPREAD
    )
