"""Detect tissue: a mask made from a thumbnail by fixed thresholds on stain colour and optical density.

Stains absorb more light in one channel than in another; glass, dust, slide edges and unscanned borders absorb all
channels equally. So tissue is where the optical densities of the channels differ (chroma), whatever the brightness.
Nothing is fitted to the image except the tint of its glass (see glass.py if that is strong, or only on part of it): an
image full of tissue is all tissue, an empty slide has none.
Inks are distinguished from stains by hue and density, in the hue-saturation-density plane of van der Laak et al. (2000,
Cytometry 39:275-284): `u` is how much more red light is absorbed than on average, `v` how much more green than blue.
Inks of a stain's hue are recognized by their shape (strokes.py).
Made for H&E and for brown or blue immunohistochemistry; a green counterstain (trichrome) would be taken for ink.
"""

import math
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import SlideError
from utils.core.files import digest
from utils.slides.colour import chroma, hue, least_density, mean_density, most_frequent_colour, optical_density
from utils.slides.glass import find_smear, tint_of_border
from utils.slides.slide import Slide
from utils.slides.strokes import find_strokes


@dataclass(frozen=True)
class TissueSettings:
    """The detector's settings; part of the features' recipe. Those for strokes, and for glass that the first pass takes
    for tissue, are constants of their modules: they have no effect on slides without either.
    """

    mpp: float = 8.0  # um/px of the thumbnail
    assumed_mpp: float = 0.5  # um/px of a slide whose mpp is unknown: the usual 20x
    max_pixels: int = 16_000_000  # of the thumbnail; a slide that would need more gets a coarser one
    min_side: int = 64  # px of the thumbnail's longer side; a small image gets a finer one
    min_chroma: float = 0.03  # largest minus smallest channel density; glass, even tinted, stays below 0.02
    min_saturation: float = 0.12  # chroma over mean density; grey and black lines stay below 0.1
    black_density: float = 0.55  # every channel denser than this (below 72 of 255): black ink, an edge, a fold
    ink_density: float = 0.12  # mean density from which a hue that no stain has is ink
    min_glass_chroma: float = 0.02  # of glass that is yellowed, or lit by a warm lamp: less needs no correction,
    max_glass_chroma: float = 0.06  # and more is not a tint of glass
    blue_ink_density: float = 0.3  # higher: bluish haematoxylin has the hue of blue ink, but is paler here
    red_ink_density: float = 0.45  # higher: blood has nearly the hue of red ink, but is paler at this resolution
    tint_density: float = 0.03  # mean density from which pixels of an ink's tint that touch it are its rim,
    ink_reach_um: float = 200.0  # up to this distance from the ink itself
    halo_um: float = 24.0  # removed around ink and its rim whatever the hue
    closing_um: float = 24.0  # gaps up to twice this are bridged: fat cells' walls, pale mucin, loose stroma
    max_hole_um2: float = 5_000.0  # smaller holes are filled; larger ones stay holes
    min_ink_um2: float = 2_500.0  # smaller spots of an ink's hue are nuclei, blood or pigment
    min_area_um2: float = 10_000.0  # smaller pieces are debris (a patch of 100 x 100 um)
    max_area_share: float = 0.005  # in a small image no hole, ink or piece above this share of it counts as small,
    max_radius_share: float = 0.05  # and no radius exceeds this share of its longer side

    def as_dict(self) -> dict[str, float]:
        """Return the settings for JSON."""
        return asdict(self)


TISSUE_SETTINGS = TissueSettings()

_PALE = 205  # of 255, the least of the three channels of glass
_GLASS_SPREAD = 4  # grey levels by which the glass's colour may vary
_GLASS_SHARE = 0.1  # of the image, the least that is glass
# Greyscale: at most so many grey levels between the channels of any px, and at least so many between px, unlike glass.
_NO_COLOUR, _SOMETHING = 2, 60
_EOSIN = (225, 150, 190)
_YELLOW_DENSITY, _ORANGE_DENSITY = 0.12, 0.25  # mean density from which they are ink,
_YELLOW_RIM = -0.5, -0.4  # and highest u and v of its rim
# Fluorescence: a slide that is darker than this or lacks a channel over half its area, and is not bright elsewhere.
_DARK, _BRIGHT = 40.0, 130.0  # mean of the three channels, of 255
_DIM = 120.0  # the brightest twentieth of a brightfield image, even if dense tissue fills it, is over 160
_ABSENT = 20  # of 255, the least of the three channels; in stained tissue it is higher but for the densest spots


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Tissue over a whole slide.

    Attributes:
        mask: (h, w) bool, True = tissue, spanning the whole slide.
        mpp: um per mask px, or None where the slide's mpp is unknown.
        settings: the detector's settings.
        is_grey: whether the slide has no colour, without which the detector cannot find tissue.
    """

    mask: NDArray[np.bool_]
    mpp: float | None
    settings: TissueSettings = field(default=TISSUE_SETTINGS)
    is_grey: bool = False

    @property
    def fraction(self) -> float:
        """The share of the slide that is tissue."""
        return float(self.mask.mean())

    def within(self, area: tuple[int, int, int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
        """Return the mask in an area (x, y, width, height) of a slide of `size` (width, height), all in level-0 px."""
        (rows, columns), (x, y, width, height) = self.mask.shape, area
        left, right = math.floor(x / size[0] * columns), math.ceil((x + width) / size[0] * columns)
        top, bottom = math.floor(y / size[1] * rows), math.ceil((y + height) / size[1] * rows)
        return self.mask[top:bottom, left:right]

    @property
    def digest(self) -> str:
        """A digest of the mask, the same for the detector's tissue and for outlines."""
        return digest(str(self.mask.shape), np.packbits(self.mask).tobytes())


def detect_tissue(slide: Slide, settings: TissueSettings = TISSUE_SETTINGS) -> TissueMask:
    """Find the tissue of a brightfield slide on a thumbnail of about `settings.mpp` um/px.

    Raises:
        SlideError: the slide cannot be read, or is dark as fluorescence is.
    """
    mpp = slide.mpp or settings.assumed_mpp
    downsample = mask_downsample(slide.width, slide.height, mpp, settings)
    # Unreadable pixels may be tissue, so their patches are tried, and counted.
    thumbnail = slide.thumbnail(downsample=downsample, where_damaged=_EOSIN)
    if _is_fluorescence(thumbnail):
        raise SlideError(
            f"{slide.path}: mostly black, or colours on black (mean {thumbnail.mean():.0f} of 255), as fluorescence "
            "is; the tissue detector needs a brightfield slide (H&E, IHC): leave it out, or keep every patch with "
            "--tissue_threshold 0"
        )
    delivered = math.sqrt(slide.width * slide.height / (thumbnail.shape[0] * thumbnail.shape[1]))
    mask = tissue_mask(thumbnail, mpp * delivered, settings)
    is_grey = bool(np.ptp(thumbnail, axis=-1).max() <= _NO_COLOUR and np.ptp(thumbnail) >= _SOMETHING)
    return TissueMask(mask, slide.mpp * delivered if slide.mpp else None, settings, is_grey)


def mask_shape(slide: Slide, settings: TissueSettings = TISSUE_SETTINGS) -> tuple[int, int]:
    """Return (h, w) of a slide's mask."""
    downsample = mask_downsample(slide.width, slide.height, slide.mpp or settings.assumed_mpp, settings)
    return max(1, round(slide.height / downsample)), max(1, round(slide.width / downsample))


def mask_downsample(width: int, height: int, mpp: float, settings: TissueSettings = TISSUE_SETTINGS) -> float:
    """Return the level-0 px per px of the mask, and of the thumbnail it is made from; at least 1."""
    for_max_pixels = math.sqrt(width * height / settings.max_pixels)
    for_min_side = max(width, height) / settings.min_side
    return max(1.0, for_max_pixels, min(settings.mpp / mpp, for_min_side))


def tissue_mask(
    rgb: NDArray[np.uint8], mpp: float | None = None, settings: TissueSettings = TISSUE_SETTINGS
) -> NDArray[np.bool_]:
    """Mark the tissue in an image.

    Args:
        rgb: (h, w, 3) uint8, best at about `settings.mpp`.
        mpp: um per px of this image; None means `settings.mpp`.

    Returns:
        (h, w) bool.
    """
    mpp = mpp or settings.mpp
    density = np.maximum(optical_density(rgb) - _tint_of_glass(rgb, settings), 0)
    mask = _tissue_of(density, mpp, settings)
    # A second pass, if the glass itself was taken for tissue.
    tint = tint_of_border(rgb, mask, mpp)
    if tint is not None:
        density = np.maximum(optical_density(rgb) - tint, 0)
        mask = _tissue_of(density, mpp, settings)
    film = find_smear(density, mask, mpp)
    return mask if film is None else _tissue_of(np.maximum(density - film, 0), mpp, settings)


def _tissue_of(density: NDArray[np.float32], mpp: float, settings: TissueSettings) -> NDArray[np.bool_]:
    """Return (h, w) bool: the tissue, after the density has been corrected for the glass's tint."""
    ink = _whole_ink(density, mpp, settings)
    stained = is_stained(density, settings) & ~ink
    strokes = find_strokes(density, stained, mpp)
    if strokes.any():
        ink |= _dilate(strokes, _steps(settings.halo_um, mpp, ink, settings))

    tissue = stained & ~ink
    tissue = _close(tissue, _steps(settings.closing_um, mpp, tissue, settings))
    tissue |= _small_pieces(~tissue, _pixels(settings.max_hole_um2, mpp, tissue, settings))
    tissue &= ~ink
    return tissue & ~_small_pieces(tissue, _pixels(settings.min_area_um2, mpp, tissue, settings))


def _tint_of_glass(rgb: NDArray[np.uint8], settings: TissueSettings) -> NDArray[np.float32]:
    """Return (3,): the density of the glass above that in its clearest channel. Glass is the most frequent pale colour,
    if it makes up enough of the image; else the tint is 0.
    """
    none = np.zeros(3, dtype=np.float32)
    pale = rgb[rgb.min(axis=-1) >= _PALE]
    if not len(pale):
        return none
    near = pale[(np.abs(pale - most_frequent_colour(pale)) <= _GLASS_SPREAD).all(axis=-1)]
    tint = optical_density(np.rint(near.mean(axis=0)).astype(np.uint8))
    tint -= tint.min()
    # Eosin and haematoxylin absorb most in green; warm light and yellowed glass do not.
    is_glass = len(near) > _GLASS_SHARE * rgb[..., 0].size and tint.argmax() != 1
    return tint if is_glass and settings.min_glass_chroma < tint.max() <= settings.max_glass_chroma else none


def is_stained(density: NDArray[np.float32], settings: TissueSettings = TISSUE_SETTINGS) -> NDArray[np.bool_]:
    """Return (h, w) bool: pixels whose channels' densities differ as in stained tissue, or in ink."""
    strength = chroma(density)
    return (strength > settings.min_chroma) & (strength > settings.min_saturation * mean_density(density))


def find_ink(density: NDArray[np.float32], settings: TissueSettings = TISSUE_SETTINGS) -> NDArray[np.bool_]:
    """Return (h, w) bool: pixels that are surely red, green, blue, orange or yellow ink, or black in all channels."""
    u, v, mean = hue(density)
    # Stains measured: H&E u -0.8..0.1, v 0.1..1; haematoxylin with DAB u -0.5..0.25, v -0.35..0.3. Ink lies outside.
    green = ((u > 0.2) & (v < 0.1)) | ((u > 0.0) & (v < -0.2))
    blue = (u > 0.35) & (v >= 0.1)
    red = (u < -0.6) & (v > -0.1) & (v < 0.3)
    return (
        (green & (mean > settings.ink_density))
        | (blue & (mean > settings.blue_ink_density))
        | (red & (mean > settings.red_ink_density))
        | _is_yellow(u, v, mean)
        | (least_density(density) > settings.black_density)
    )


def _is_yellow(u: NDArray[np.float32], v: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return (h, w) bool: surely yellow ink or, if it is dense, orange; thin saffron has nearly that hue."""
    # Golden brown diaminobenzidine: u -0.66 or more, v -0.63 or more.
    return ((u < -0.5) & (v < -0.9) & (mean > _YELLOW_DENSITY)) | ((u < -0.7) & (v < -0.65) & (mean > _ORANGE_DENSITY))


def _whole_ink(density: NDArray[np.float32], mpp: float, settings: TissueSettings) -> NDArray[np.bool_]:
    """Return (h, w) bool: ink of some size, with its thin and blurred rim, which by itself looks like a stain."""
    ink = find_ink(density, settings)
    ink &= ~_small_pieces(ink, _pixels(settings.min_ink_um2, mpp, ink, settings))
    if not ink.any():
        return ink
    u, v, mean = hue(density)
    tinted = ((u < 0) & (v > -0.1) & (v < 0.2)) | ((u > 0.1) & (v < 0.15)) | (u > 0.35)
    reach = max(1, round(settings.ink_reach_um / mpp))
    if (ink & _is_yellow(u, v, mean)).any():
        tinted |= (u < _YELLOW_RIM[0]) & (v < _YELLOW_RIM[1])
    rim = tinted & (mean > settings.tint_density)
    ink = _dilate(ink, reach, within=ink | rim)
    return _dilate(ink, _steps(settings.halo_um, mpp, ink, settings))


def _is_fluorescence(rgb: NDArray[np.uint8]) -> bool:
    """Return whether an image is mostly grey and nowhere bright; or mostly black or without a channel, and nowhere else
    bright, so that black around H&E is no reason to refuse it.
    """
    brightness = rgb.mean(axis=-1)
    if np.quantile(brightness, 0.95) < _DIM and is_stained(optical_density(rgb)).mean() < 0.5:
        return True
    lit = brightness[(brightness >= _DARK) & (rgb.min(axis=-1) >= _ABSENT)]
    return lit.size < 0.5 * brightness.size and (lit.size == 0 or float((lit > _BRIGHT).mean()) < 0.5)


def _steps(radius_um: float, mpp: float, mask: NDArray[np.bool_], settings: TissueSettings) -> int:
    """Return a radius in whole px of the mask, bounded so that it stays small compared with the image."""
    return round(min(radius_um / mpp, settings.max_radius_share * max(mask.shape)))


def _pixels(area_um2: float, mpp: float, mask: NDArray[np.bool_], settings: TissueSettings) -> float:
    """Return an area in px of the mask, bounded so that it stays small compared with the image."""
    return min(area_um2 / mpp**2, settings.max_area_share * mask.size)


def _dilate(mask: NDArray[np.bool_], steps: int, within: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    if steps == 0:
        return mask
    from scipy import ndimage  # slow to import, and needed where a slide is read alone

    return np.asarray(ndimage.binary_dilation(mask, iterations=steps, mask=within), dtype=bool)


def _close(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    """Close a mask without changing the image's border, which is taken to continue outside."""
    if steps == 0:
        return mask
    from scipy import ndimage

    padded = np.pad(mask, steps, mode="edge")
    closed = np.asarray(ndimage.binary_closing(padded, iterations=steps), dtype=bool)
    return closed[steps:-steps, steps:-steps]


def _small_pieces(mask: NDArray[np.bool_], below_px: float) -> NDArray[np.bool_]:
    """Return the 8-connected pieces of a mask with fewer pixels than `below_px`."""
    from scipy import ndimage

    labels = np.empty(mask.shape, dtype=np.int32)
    ndimage.label(mask, structure=np.ones((3, 3)), output=labels)
    sizes = np.bincount(labels.ravel())
    small = sizes < below_px
    small[0] = False
    return small[labels]
