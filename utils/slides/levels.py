"""Check that the levels of a pyramid show the same as level 0, and find by which factor.

Writers pad lower levels to whole tiles, crop them, or change their aspect ratio, and no tag says so: a factor computed
from the sizes would then shift everything. So the regions of a level with the most contrast are compared with a finer
level that fits: always if no whole factor explains both its sides, and on request also if one does, since that may be a
coincidence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.core.errors import SlideError, first_few
from utils.core.runtime import log

Size = tuple[int, int]
# Reads (height, width, 3) uint8 of a level: level, x, y, width, height, in its own px.
ReadLevel = Callable[[int, int, int, int, int], NDArray[np.uint8]]

# px of the level: the side of the regions compared, unless that exceeds so many px of level 0.
_SIDE, _MOST_LEVEL0 = 64, 2048
_GRID, _COMPARED = 6, 8  # regions sampled along a side, and the most that are compared
# Grey levels, standard deviation: with less there is nothing to recognise.
_LEAST_CONTRAST = 3.0
_LEAST_SIDE = 16  # px; smaller regions are not conclusive
# Correlation with level 0. Regions resampled by other filters correlate by 0.95 or more; shifted by a few px, by 0.5.
_AGREES = 0.8
_CLEARLY = 0.02
# A whole factor is accepted once so many regions agree and none disagrees. Otherwise it needs only this correlation, of
# px averaged over `_BLUR`, since pyramids made by dropping px, or sharpened, are still correct.
_ENOUGH, _NOT_CONTRADICTED, _BLUR = 3, 0.6, 4
_NOISE_LEFT = 0.5  # of the contrast; averaging squares of 4 px leaves a quarter of that of noise
_QUICK_GRID, _QUICK_SIDE = 5, 512  # regions along a side, and the side of one in px of the finer level
_PADDED_BY = (2, 4, 8, 16)  # times the factor by the sizes: padding up to whole tiles hides these


class LevelFit(NamedTuple):
    """The part `size` of a level that shows level 0, and level-0 px per px of it: inf if it does not show it."""

    size: Size
    downsample: float


def whole_downsample(size: Size, level_size: Size) -> float | None:
    """Return the whole number that takes both sides of level 0 to within a px of the level's; None if there is none."""
    ratio = (size[0] / level_size[0] + size[1] / level_size[1]) / 2
    whole = float(max(1, round(ratio)))
    explains = all(abs(side / whole - level_side) < 1 for side, level_side in zip(size, level_size, strict=True))
    return whole if explains else None


def fit_levels(
    sizes: Sequence[Size], downsamples: Sequence[float], read: ReadLevel, *, look: bool = False
) -> list[LevelFit]:
    """Return how each level fits level 0, the first of them.

    `downsamples` are the reader's own, which are tried if no whole number explains the sizes. With `look`, pixels are
    compared even if one does, as far as they can be read. Raises what `read` raises.
    """
    fits = [LevelFit(sizes[0], 1.0)]
    finer = 0  # the last level that fits
    for level in range(1, len(sizes)):
        whole = whole_downsample(sizes[0], sizes[level])
        if whole is None:
            fit = _fit_by_pixels(level, sizes, downsamples[level], read)
        else:
            fit = LevelFit(sizes[level], whole)
            if look:
                fit = _checked(_Comparison(level, finer, fits[finer], read), fit, sizes[0])
        fits.append(fit)
        finer = level if math.isfinite(fit.downsample) else finer
    return fits


def _fit_by_pixels(level: int, sizes: Sequence[Size], downsample: float, read: ReadLevel) -> LevelFit:
    """Return the fit of a level whose size no whole number explains: the reader's factor, padded, or none."""
    comparison = _Comparison(level, 0, LevelFit(sizes[0], 1.0), read)
    plain, padded = LevelFit(sizes[level], downsample), _padded(sizes[0], sizes[level])
    scores = {fit: comparison.agreement(fit) for fit in (plain, padded)}
    best = padded if scores[padded] > scores[plain] + _CLEARLY else plain
    return best if scores[best] >= _AGREES else LevelFit(sizes[level], math.inf)


def _checked(comparison: "_Comparison", fit: LevelFit, size: Size) -> LevelFit:
    """Return the fit by a whole number unless pixels contradict it; else a padded fit that they support, or none."""
    comparison = comparison.past_damage()
    if comparison.agrees_at_once(fit) or comparison.agreement(fit, _BLUR) >= _NOT_CONTRADICTED:
        return fit
    for step in _PADDED_BY:
        factor = fit.downsample * step
        padded = LevelFit((math.ceil(size[0] / factor), math.ceil(size[1] / factor)), factor)
        is_large_enough = min(padded.size) >= _LEAST_SIDE
        if is_large_enough and comparison.is_plain_beyond(fit, padded) and comparison.agreement(padded) >= _AGREES:
            return padded
    return LevelFit(fit.size, math.inf)


def log_fits(path: Path, sizes: Sequence[Size], fits: Sequence[LevelFit]) -> None:
    """Log the levels of a file that are padded, which does no harm, and warn of those that are not used."""
    unlike = [str(level) for level, fit in enumerate(fits) if math.isinf(fit.downsample)]
    padded = [str(level) for level, fit in enumerate(fits) if fit.size != sizes[level]]
    if padded:
        log.info("%s: level %s padded beyond the slide's edge; the padding is left out", path, first_few(padded))
    if unlike:
        log.warning("%s: level %s does not show what level 0 shows, and is not used", path, first_few(unlike))


def _padded(size: Size, level_size: Size) -> LevelFit:
    """Return the fit of a level that was padded at its far edges."""
    whole = max(1, *(math.ceil(side / level_side - 1e-9) for side, level_side in zip(size, level_size, strict=True)))
    return LevelFit((math.ceil(size[0] / whole), math.ceil(size[1] / whole)), float(whole))


@dataclass(frozen=True)
class _Comparison:
    """Compares a level with a finer one that fits."""

    level: int
    finer_level: int
    finer: LevelFit
    read: ReadLevel

    def past_damage(self) -> "_Comparison":
        """Return the same comparison, which takes damaged regions as plain grey, and so as having no contrast."""

        def read(level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
            try:
                return self.read(level, x, y, width, height)
            except SlideError:
                return np.full((height, width, 3), 128, dtype=np.uint8)

        return replace(self, read=read)

    def agrees_at_once(self, fit: LevelFit) -> bool:
        """Return whether the first few regions with contrast agree, or none has any."""
        ratio = fit.downsample / self.finer.downsample
        side = max(_LEAST_SIDE, min(_SIDE, int(_QUICK_SIDE / ratio), *fit.size))
        if side > min(fit.size):
            return True
        agreeing = 0
        for corner in _from_centre(_corners(fit.size, side, _QUICK_GRID), fit.size):
            grey = _grey(self.read(self.level, *corner, side, side))
            if not _shows_something(grey, _BLUR):
                continue
            if self._correlation_at(corner, grey, ratio) < _AGREES:
                return False
            agreeing += 1
            if agreeing == _ENOUGH:
                return True
        return True

    def agreement(self, fit: LevelFit, blur: int = 1) -> float:
        """Return the median correlation of the level's regions with the finer level; 1 if none has contrast.

        Correlations are those of the px averaged over squares of `blur`.
        """
        ratio = fit.downsample / self.finer.downsample
        side = max(8, min(_SIDE, int(_MOST_LEVEL0 / ratio), *fit.size))
        regions = [(corner, _grey(self.read(self.level, *corner, side, side))) for corner in _corners(fit.size, side)]
        regions = [(corner, grey) for corner, grey in regions if _shows_something(grey, blur)]
        regions.sort(key=lambda region: -region[1].std())
        scores = [self._correlation_at(corner, grey, ratio, blur) for corner, grey in regions[:_COMPARED]]
        return float(np.median(scores)) if scores else 1.0

    def is_plain_beyond(self, fit: LevelFit, padded: LevelFit) -> bool:
        """Return whether the level has no contrast beyond the padded size, but some within it."""
        side = max(_LEAST_SIDE, min(_SIDE, *padded.size))
        beyond, within = [], []
        for x, y in _corners(fit.size, side):
            contrasts = beyond if x >= padded.size[0] or y >= padded.size[1] else within
            contrasts.append(_grey(self.read(self.level, x, y, side, side)).std() >= _LEAST_CONTRAST)
        return any(within) and not any(beyond)

    def _correlation_at(self, corner: Size, grey: NDArray[np.float64], ratio: float, blur: int = 1) -> float:
        """Return the correlation of a region of the level with the finer level; 0 beyond the finer one's edge."""
        left, top = (round(start * ratio) for start in corner)
        width = min(round(grey.shape[1] * ratio), self.finer.size[0] - left)
        height = min(round(grey.shape[0] * ratio), self.finer.size[1] - top)
        if width < ratio or height < ratio:
            return 0.0
        size = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        finer = Image.fromarray(self.read(self.finer_level, left, top, width, height))
        finer_grey = _grey(np.asarray(finer.resize(size, Image.Resampling.BOX)))
        return _correlation(_averaged(finer_grey, blur), _averaged(grey[: size[1], : size[0]], blur))


def _corners(size: Size, side: int, count: int = _GRID) -> list[Size]:
    """Return corners of regions spread over a level, including its edges."""
    across, down = (np.unique(np.linspace(0, extent - side, count).astype(int).clip(0)).tolist() for extent in size)
    return [(x, y) for y in down for x in across]


def _from_centre(corners: list[Size], size: Size) -> list[Size]:
    """Return the corners ordered by their distance from the centre of the level, where most tissue is."""
    return sorted(corners, key=lambda corner: math.dist(corner, (size[0] / 2, size[1] / 2)))


def _averaged(grey: NDArray[np.float64], blur: int) -> NDArray[np.float64]:
    """Return the means of squares of `blur` px; the image itself if it has only a few of them."""
    height, width = (side // blur for side in grey.shape)
    if blur == 1 or min(height, width) < 4:
        return grey
    return grey[: height * blur, : width * blur].reshape(height, blur, width, blur).mean(axis=(1, 3))


def _grey(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    return rgb.mean(axis=-1)


def _shows_something(grey: NDArray[np.float64], blur: int) -> bool:
    """Return whether there is contrast, and not only noise, which disappears if squares of `blur` px are averaged."""
    contrast = _averaged(grey, blur).std()
    return contrast >= _LEAST_CONTRAST and contrast >= _NOISE_LEFT * grey.std()


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    first, second = first - first.mean(), second - second.mean()
    spread = math.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / spread) if spread else 0.0
