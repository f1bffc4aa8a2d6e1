"""Find the colour of tinted glass: along a slide's whole border, or in a yellowish smear (adhesive, mounting medium).

Both are searched only if the first pass took glass for tissue; other slides are unaffected. Glass differs from pale
tissue in that it has one colour over a large part of the border, with something denser beside it.
"""

import numpy as np
from numpy.typing import NDArray

from utils.slides.colour import binned_density, density_of, mean_density, most_frequent_colour, optical_density

_BORDER_SHARE = 0.02  # width of the border, of the image's shorter side
_PALE = 185  # of 255, the least of the three channels of glass
_SPREAD = 8  # grey levels around the colour of glass: noise of 3, and illumination that falls off by 2%
_MIN_OF_BORDER = 0.5  # share of the border that is glass; the rest may be tissue cut off there, or ink
_MIN_OF_IMAGE = 0.1  # share of the image
_MIN_TAKEN = 0.1  # share of the border's glass that the first pass took for tissue
_MIN_TINT, _MAX_TINT = 0.02, 0.1  # largest minus smallest channel density; deeper is no glass
_DENSER, _MIN_DENSER = 0.06, 0.002  # mean density above the glass's, and share of the image, of objects on it
_FLAT_UM, _FLAT_SHARE = 3_000.0, 0.99  # no tissue of this extent is so much of one colour: an empty slide

_SQUARE_UM = 16.0  # side of the squares on which a smear is searched
_FILM = 0.022  # least density in blue over that in green
_FILM_PINK = 0.5  # most density in green over that in red, of that in blue over green; pale DAB has 0.6 to 0.9
_FILM_DENSITY = 0.12  # mean; more is no film
_FILM_FLAT = 0.012  # most spread of the density in blue over 3 x 3 squares
_FILM_UM2 = 150_000.0  # least area
_FILM_SLOPE_UM = 150.0  # standard deviation of the Gaussian that extends its thickness under tissue,
_FILM_REACH_UM = 500.0  # up to this distance,
_FILM_LEFT = 0.8  # and only where the density in blue exceeds this share of its own
_LEAST_WEIGHT = 1e-4  # of that Gaussian, against division by zero


def tint_of_border(rgb: NDArray[np.uint8], mask: NDArray[np.bool_], mpp: float) -> NDArray[np.float32] | None:
    """Find the tint of glass that the first pass took for tissue.

    Args:
        rgb: (h, w, 3) uint8.
        mask: (h, w) bool, the tissue of the first pass.
        mpp: um per px.

    Returns:
        (3,) density of the glass above that in its clearest channel; None if no glass was taken for tissue.
    """
    border = _border(mask.shape)
    colour = _most_frequent(rgb[border])
    if colour is None:
        return None
    tint = density_of(colour)
    is_near = _near(rgb[border], colour)
    if is_near.mean() < _MIN_OF_BORDER or mask[border][is_near].mean() < _MIN_TAKEN:
        return None
    if not _MIN_TINT < tint.max() - tint.min() <= _MAX_TINT or not _is_ground(rgb, colour, float(tint.mean()), mpp):
        return None
    return tint - tint.min()


def _border(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return (h, w) bool: the border of an image."""
    width = max(1, round(_BORDER_SHARE * min(shape)))
    border = np.ones(shape, dtype=bool)
    border[width:-width, width:-width] = False
    return border


def _most_frequent(pixels: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Return (3,): the most frequent pale colour of pixels (n, 3); None if none is pale."""
    pale = pixels[pixels.min(axis=-1) >= _PALE]
    if not len(pale):
        return None
    return pale[_near(pale, most_frequent_colour(pale))].mean(axis=0)


def _near(pixels: NDArray[np.uint8], colour: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.all(np.abs(pixels - colour) <= _SPREAD, axis=-1)


def _is_ground(rgb: NDArray[np.uint8], colour: NDArray[np.float64], density: float, mpp: float) -> bool:
    """Return whether much of an image has this colour, with something denser on it, or more than flat tissue covers."""
    share = float(_near(rgb, colour).mean())
    if share > _FLAT_SHARE and min(rgb.shape[:2]) * mpp >= _FLAT_UM:
        return True
    denser = float((mean_density(optical_density(rgb)) > density + _DENSER).mean())
    return share >= _MIN_OF_IMAGE and denser >= _MIN_DENSER


def find_smear(density: NDArray[np.float32], mask: NDArray[np.bool_], mpp: float) -> NDArray[np.float32] | None:
    """Find the optical density of a yellowish smear on part of the glass, there and under the tissue it covers.

    Args:
        density: (h, w, 3) optical density, less the tint of the glass.
        mask: (h, w) bool, the tissue of the first pass.
        mpp: um per px.

    Returns:
        (h, w, 3) optical density, 0 outside the smear; None if no smear was taken for tissue.
    """
    width = max(1, round(_SQUARE_UM / mpp))
    if not mask.any() or min(mask.shape) < 3 * width:
        return None
    squares = binned_density(density, width)
    film = _film(squares, mask[width // 2 :: width, width // 2 :: width], (width * mpp) ** 2)
    if not film.any():
        return None
    covered = _extended(squares, film, width * mpp).repeat(width, axis=0).repeat(width, axis=1)
    missing = [(0, mask.shape[0] - covered.shape[0]), (0, mask.shape[1] - covered.shape[1]), (0, 0)]
    return np.pad(covered, missing, mode="edge")


def _film(squares: NDArray[np.float32], mask: NDArray[np.bool_], area_um2: float) -> NDArray[np.bool_]:
    """Return (n, m) bool: large flat pieces of yellow glass among squares (n, m, 3) that were taken for tissue."""
    from scipy import ndimage  # slow to import, and needed where a slide is read alone

    red, green, blue = np.moveaxis(squares, -1, 0)
    film = mask[: red.shape[0], : red.shape[1]] & (blue - green > _FILM) & (mean_density(squares) < _FILM_DENSITY)
    film &= np.abs(green - red) < _FILM_PINK * (blue - green)
    if film.sum() * area_um2 < _FILM_UM2:
        return film & False
    mean = ndimage.uniform_filter(blue, 3)
    film &= ndimage.uniform_filter(blue * blue, 3) - mean * mean < _FILM_FLAT**2
    labels = np.empty(film.shape, dtype=np.int32)
    ndimage.label(film, output=labels)
    large = np.bincount(labels.ravel()) * area_um2 >= _FILM_UM2
    large[0] = False
    return large[labels]


def _extended(squares: NDArray[np.float32], film: NDArray[np.bool_], um: float) -> NDArray[np.float32]:
    """Return (n, m, 3): the film's density, extended under adjacent tissue that absorbs at least as much blue."""
    from scipy import ndimage

    slope = _FILM_SLOPE_UM / um
    weight = ndimage.gaussian_filter(film.astype(np.float32), slope)
    sums = ndimage.gaussian_filter(squares * film[..., None], (slope, slope, 0))
    thickness = np.asarray(sums / np.maximum(weight, _LEAST_WEIGHT)[..., None], dtype=np.float32)
    is_under = film | (ndimage.uniform_filter(squares[..., 2], 3) > _FILM_LEFT * thickness[..., 2])
    covered = ndimage.binary_dilation(film, iterations=round(_FILM_REACH_UM / um), mask=is_under)
    return thickness * np.asarray(ndimage.binary_fill_holes(covered))[..., None]
