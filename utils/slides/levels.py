"""Whether the levels of a pyramid show what level 0 shows, and by which factor.

Writers pad lower levels to whole tiles, crop them, or give them another aspect, and no tag says so: a factor taken
from the sizes then puts everything in another place. So places of a level, those with most to see, are compared with
a finer one that fits: always where no whole factor explains both its sides, and on request also where one does, for
that may be a coincidence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.core.errors import SlideError, named
from utils.core.runtime import log

Size = tuple[int, int]
# Reads (height, width, 3) uint8 of a level: level, x, y, width, height, in its own px.
ReadLevel = Callable[[int, int, int, int, int], NDArray[np.uint8]]

# px of the level: the side of the places that are compared, unless that is more than so many px of level 0.
_PLACE, _MOST_LEVEL0 = 64, 2048
_GRID, _COMPARED = 6, 8  # places looked at along a side, and the most that are compared
# Grey levels, standard deviation: with less there is nothing to recognise.
_LEAST_CONTRAST = 3.0
_LEAST_SIDE = 16  # px; smaller places say nothing
# Correlation with level 0. Resampled by other filters, places agree to 0.95 and more; moved by a few px, to 0.5.
_AGREES = 0.8
_CLEARLY = 0.02
# A whole factor is believed once so many places agree and none disagrees. Else it needs this correlation only, of px
# averaged over `_BLUR`, since pyramids made by dropping px, or sharpened, are still true.
_ENOUGH, _NOT_CONTRADICTED, _BLUR = 3, 0.6, 4
_NOISE_LEFT = 0.5  # of the contrast; averaging squares of 4 px leaves a quarter of that of noise
_QUICK_GRID, _QUICK_SIDE = 5, 512  # places along a side, and px of the finer level along a place's
_PADDED_BY = (2, 4, 8, 16)  # times the factor by the sizes: padding up to whole tiles hides these


class LevelFit(NamedTuple):
    """The part `size` of a level that shows level 0, and level-0 px per px of it: inf where it does not show it."""

    size: Size
    downsample: float


def whole_downsample(size: Size, level_size: Size) -> float | None:
    """Return the whole number by which both sides of level 0 come out to less than a px of the level's, if there is."""
    ratio = (size[0] / level_size[0] + size[1] / level_size[1]) / 2
    whole = float(max(1, round(ratio)))
    explains = all(abs(side / whole - level_side) < 1 for side, level_side in zip(size, level_size, strict=True))
    return whole if explains else None


def fit_levels(
    sizes: Sequence[Size], downsamples: Sequence[float], read: ReadLevel, *, look: bool = False
) -> list[LevelFit]:
    """Return how each level fits level 0, the first of them.

    `downsamples` are the reader's own, which are tried where no whole number explains the sizes. With `look`, pixels
    are compared where one does, too, as far as they can be read. Raises what `read` raises.
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
    """Return how a level fits whose size no whole number explains: as the reader takes it, padded, or not at all."""
    comparison = _Comparison(level, 0, LevelFit(sizes[0], 1.0), read)
    plain, padded = LevelFit(sizes[level], downsample), _padded(sizes[0], sizes[level])
    scores = {fit: comparison.agreement(fit) for fit in (plain, padded)}
    best = padded if scores[padded] > scores[plain] + _CLEARLY else plain
    return best if scores[best] >= _AGREES else LevelFit(sizes[level], math.inf)


def _checked(comparison: "_Comparison", fit: LevelFit, size: Size) -> LevelFit:
    """Return the fit by a whole number unless pixels contradict it; else a padded one that they support, or none."""
    comparison = comparison.past_damage()
    if comparison.agrees_at_once(fit) or comparison.agreement(fit, _BLUR) >= _NOT_CONTRADICTED:
        return fit
    for step in _PADDED_BY:
        factor = fit.downsample * step
        padded = LevelFit((math.ceil(size[0] / factor), math.ceil(size[1] / factor)), factor)
        is_large_enough = min(padded.size) >= _LEAST_SIDE
        if is_large_enough and comparison.is_even_beyond(fit, padded) and comparison.agreement(padded) >= _AGREES:
            return padded
    return LevelFit(fit.size, math.inf)


def log_fits(path: Path, sizes: Sequence[Size], fits: Sequence[LevelFit]) -> None:
    """Log the levels of a file that are padded, which is no harm, and those that are not used."""
    unlike = [str(level) for level, fit in enumerate(fits) if math.isinf(fit.downsample)]
    padded = [str(level) for level, fit in enumerate(fits) if fit.size != sizes[level]]
    if padded:
        log.info("%s: level %s padded beyond the slide's edge; the padding is left out", path, named(padded))
    if unlike:
        log.warning("%s: level %s does not show what level 0 shows, and is not used", path, named(unlike))


def _padded(size: Size, level_size: Size) -> LevelFit:
    """The level as one that was padded at its far edges."""
    whole = max(1, *(math.ceil(side / level_side - 1e-9) for side, level_side in zip(size, level_size, strict=True)))
    return LevelFit((math.ceil(size[0] / whole), math.ceil(size[1] / whole)), float(whole))


@dataclass(frozen=True)
class _Comparison:
    """A level beside a finer one that fits."""

    level: int
    finer_level: int
    finer: LevelFit
    read: ReadLevel

    def past_damage(self) -> "_Comparison":
        """Return the same comparison with even grey, which is nothing to see, where the slide cannot be read."""

        def read(level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
            try:
                return self.read(level, x, y, width, height)
            except SlideError:
                return np.full((height, width, 3), 128, dtype=np.uint8)

        return replace(self, read=read)

    def agrees_at_once(self, fit: LevelFit) -> bool:
        """Whether the first few places with something to see agree, or there is nothing to see."""
        ratio = fit.downsample / self.finer.downsample
        side = max(_LEAST_SIDE, min(_PLACE, int(_QUICK_SIDE / ratio), *fit.size))
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
        """Return the median correlation of the level's places with the finer level; 1 where there is nothing to see.

        Correlations are those of the px averaged over squares of `blur`.
        """
        ratio = fit.downsample / self.finer.downsample
        side = max(8, min(_PLACE, int(_MOST_LEVEL0 / ratio), *fit.size))
        places = [(corner, _grey(self.read(self.level, *corner, side, side))) for corner in _corners(fit.size, side)]
        places = [(corner, grey) for corner, grey in places if _shows_something(grey, blur)]
        places.sort(key=lambda place: -place[1].std())
        scores = [self._correlation_at(corner, grey, ratio, blur) for corner, grey in places[:_COMPARED]]
        return float(np.median(scores)) if scores else 1.0

    def is_even_beyond(self, fit: LevelFit, padded: LevelFit) -> bool:
        """Whether there is nothing to see on the level beyond the padded size, but something within it."""
        side = max(_LEAST_SIDE, min(_PLACE, *padded.size))
        beyond, within = [], []
        for x, y in _corners(fit.size, side):
            part = beyond if x >= padded.size[0] or y >= padded.size[1] else within
            part.append(_grey(self.read(self.level, x, y, side, side)).std() >= _LEAST_CONTRAST)
        return any(within) and not any(beyond)

    def _correlation_at(self, corner: Size, grey: NDArray[np.float64], ratio: float, blur: int = 1) -> float:
        """Return the correlation of a place of the level with the finer one; 0 beyond that one's edge."""
        left, top = (round(start * ratio) for start in corner)
        width = min(round(grey.shape[1] * ratio), self.finer.size[0] - left)
        height = min(round(grey.shape[0] * ratio), self.finer.size[1] - top)
        if width < ratio or height < ratio:
            return 0.0
        shown = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        finer = Image.fromarray(self.read(self.finer_level, left, top, width, height))
        finer_grey = _grey(np.asarray(finer.resize(shown, Image.Resampling.BOX)))
        return _correlation(_averaged(finer_grey, blur), _averaged(grey[: shown[1], : shown[0]], blur))


def _corners(size: Size, side: int, count: int = _GRID) -> list[Size]:
    """Return corners of places spread over a level, its edges among them."""
    across, down = (np.unique(np.linspace(0, extent - side, count).astype(int).clip(0)).tolist() for extent in size)
    return [(x, y) for y in down for x in across]


def _from_centre(corners: list[Size], size: Size) -> list[Size]:
    """Return the corners ordered by their distance from the middle of the level, where tissue mostly is."""
    return sorted(corners, key=lambda corner: math.dist(corner, (size[0] / 2, size[1] / 2)))


def _averaged(grey: NDArray[np.float64], blur: int) -> NDArray[np.float64]:
    """Return the means of squares of `blur` px; the image itself where it has fewer than a few of them."""
    height, width = (side // blur for side in grey.shape)
    if blur == 1 or min(height, width) < 4:
        return grey
    return grey[: height * blur, : width * blur].reshape(height, blur, width, blur).mean(axis=(1, 3))


def _grey(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    return rgb.mean(axis=-1)


def _shows_something(grey: NDArray[np.float64], blur: int) -> bool:
    """Whether there is contrast, and not only noise, which is lost where squares of `blur` px are averaged."""
    contrast = _averaged(grey, blur).std()
    return contrast >= _LEAST_CONTRAST and contrast >= _NOISE_LEFT * grey.std()


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    one, other = one - one.mean(), other - other.mean()
    spread = math.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / spread) if spread else 0.0
