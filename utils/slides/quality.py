"""Find patches not worth a feature, by fixed thresholds: out of focus, hardly any tissue, or ink.

Blur removes fine detail and leaves coarse detail, whatever the stain. So the curvature of the green channel (which both
stains absorb) on px of 1 um is compared with that on px of 4 um: the mean square of the fine one is at least 0.08 of
the coarse one's in focus, and 0.01 to 0.03 after a Gaussian blur of 2 um sigma. A stronger blur removes the coarse
detail too, so 4 um are also compared with 16 um: 0.4 or more in focus, 0.01 to 0.05 after 7 to 15 um. Smooth areas such
as mucus have little detail of any size, and pass.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from utils.slides.colour import optical_density
from utils.slides.tissue import TISSUE_SETTINGS, find_ink, is_stained


@dataclass(frozen=True)
class QualitySettings:
    """Every number `patch_quality` uses; part of the features' recipe if it is used."""

    assumed_mpp: float = TISSUE_SETTINGS.assumed_mpp  # um/px of patches whose mpp is unknown
    colour_um: float = TISSUE_SETTINGS.mpp  # side of the squares whose colour is averaged, as in the tissue detector
    max_ink: float = 0.25  # share of the patch; sharp skin, dark with keratin, reaches 0.09 in patches of 128 um
    min_stained: float = 0.1  # share of the patch; real patches of half tissue: 0.35 and more
    focus_um: float = 1.0  # px whose curvature is compared with that of px four times as wide
    min_focus: float = 0.05  # fine over coarse mean squared curvature, between 0.08 (sharp) and 0.03 (blurred)
    min_structure: float = 5.0  # grey levels, rms of the coarse curvature; with less there is nothing to focus on
    min_far_structure: float = 15.0  # the same for px of 16 um, where mucus may vary by a few grey levels
    min_extent_um: float = 32.0  # narrower patches have too few coarse px to tell focus, narrower than twice this, ink
    max_focus_mpp: float = 1.5  # um/px; in coarser patches a blur of 2 um is hardly visible

    def as_dict(self) -> dict[str, float]:
        """Return the settings for JSON."""
        return asdict(self)


QUALITY_SETTINGS = QualitySettings()

PEN, WHITE, BLURRED = "pen", "white", "blurred"
REASONS = (PEN, WHITE, BLURRED)
DAMAGED = "damaged"  # why a patch that cannot be read is dropped

_COARSE = 4  # px of the focus scale
_AT_ONCE = 16  # patches whose intermediate results fit in the processor's cache


def no_reasons(count: int) -> NDArray[np.str_]:
    """Return (count,) "" for each patch, to be filled with the reason why it is dropped."""
    return np.full(count, "", dtype=f"<U{max(map(len, (*REASONS, DAMAGED)))}")


def patch_quality(
    patches: NDArray[np.uint8], mpp: float | None, settings: QualitySettings = QUALITY_SETTINGS
) -> NDArray[np.str_]:
    """Return for each patch why it should be dropped.

    Args:
        patches: (B, P, P, 3) uint8 RGB.
        mpp: um per px of the patches; None means `settings.assumed_mpp`.

    Returns:
        (B,) the first of `REASONS` that applies, "" for a patch of good quality.
    """
    mpp = mpp or settings.assumed_mpp
    reasons = no_reasons(len(patches))
    for start in range(0, len(patches), _AT_ONCE):
        batch = patches[start : start + _AT_ONCE]
        inked, stained = _colour_shares(batch, mpp, settings)
        batch_reasons = reasons[start : start + _AT_ONCE]
        batch_reasons[is_blurred(batch, mpp, settings)] = BLURRED
        batch_reasons[stained < settings.min_stained] = WHITE
        if batch.shape[1] * mpp >= 2 * settings.min_extent_um:
            batch_reasons[inked > settings.max_ink] = PEN
    return reasons


def is_blurred(
    patches: NDArray[np.uint8], mpp: float, settings: QualitySettings = QUALITY_SETTINGS
) -> NDArray[np.bool_]:
    """Return (B,) bool: which patches (B, P, P, 3) of `mpp` um/px show structure, but no fine detail."""
    blurred, extent = np.zeros(len(patches), dtype=bool), patches.shape[1] * mpp
    if mpp > settings.max_focus_mpp or extent < settings.min_extent_um:
        return blurred
    images = _binned(patches[..., 1], max(1, round(settings.focus_um / mpp)))
    fine = _curvature(images)
    for structure in (settings.min_structure, settings.min_far_structure)[: 1 + (extent >= 2 * settings.min_extent_um)]:
        images = _binned(images, _COARSE)
        coarse = _curvature(images)
        blurred |= (fine < settings.min_focus * coarse) & (coarse > structure**2)
        fine = coarse
    return blurred


def _colour_shares(
    patches: NDArray[np.uint8], mpp: float, settings: QualitySettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (B,) the shares of each patch that are ink, and that are stained but not ink."""
    size = patches.shape[1]
    width = min(max(1, round(settings.colour_um / mpp)), size)
    number = size // width
    inside = patches[:, : number * width, : number * width]
    rows = inside.reshape(len(patches), number, width, -1).sum(axis=2, dtype=np.uint32)
    sums = rows.reshape(len(patches), number, number, width, 3).sum(axis=3)
    density = optical_density(((sums + width**2 // 2) // width**2).astype(np.uint8))
    ink = find_ink(density)
    return ink.mean(axis=(1, 2)), (is_stained(density) & ~ink).mean(axis=(1, 2))


def _binned(images: NDArray, width: int) -> NDArray[np.float32]:
    """Return (B, n, n): means over squares of `width` px of images (B, P, P); the rest at the far edges is dropped."""
    number = images.shape[1] // width
    images = images[:, : number * width, : number * width]
    total = np.zeros((len(images), number, number), dtype=np.float32)
    for row in range(width):
        for column in range(width):
            total += images[:, row::width, column::width]
    return total / np.float32(width**2)


def _curvature(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (B,): the mean squared Laplacian of images (B, n, n)."""
    middle = images[:, 1:-1, 1:-1]
    bend = 4 * middle - images[:, :-2, 1:-1] - images[:, 2:, 1:-1] - images[:, 1:-1, :-2] - images[:, 1:-1, 2:]
    return np.einsum("bij,bij->b", bend, bend) / np.float32(middle[0].size)
