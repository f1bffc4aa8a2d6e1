"""Whether the levels of a pyramid show what level 0 shows, and by which factor.

Writers pad lower levels to whole tiles, cut them, or give them another aspect, and no tag says so: a factor that is
read off the sizes then puts everything in another place. So a level counts where one whole factor explains both its
sides, or where some of its places, those with most to see, look as level 0 does there.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.core.errors import named
from utils.core.runtime import log

Size = tuple[int, int]
# Reads (height, width, 3) uint8 of a level: level, x, y, width, height, in its own px.
ReadLevel = Callable[[int, int, int, int, int], NDArray[np.uint8]]

# px of the level: the side of the places that are compared, unless that is more than so many px of level 0.
_PLACE, _MOST_LEVEL0 = 64, 2048
_GRID, _COMPARED = 6, 8  # places looked at along a side, and the most that are compared
# Grey levels, standard deviation: with less there is nothing to recognise.
_LEAST_CONTRAST = 3.0
# Correlation with level 0. Resampled by other filters, places agree to 0.95 and more; moved by a few px, to 0.5.
_AGREES = 0.8
_CLEARLY = 0.02


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


def fit_levels(sizes: Sequence[Size], downsamples: Sequence[float], read: ReadLevel) -> list[LevelFit]:
    """Return how each level fits level 0, the first of them.

    `downsamples` are those that its reader takes the levels to have, which are tried where no whole number explains the
    sizes. Whatever `read` raises goes through.
    """
    fits = [LevelFit(sizes[0], 1.0)]
    for level in range(1, len(sizes)):
        whole = whole_downsample(sizes[0], sizes[level])
        if whole is not None:
            fits.append(LevelFit(sizes[level], whole))
            continue
        plain, padded = LevelFit(sizes[level], downsamples[level]), _padded(sizes[0], sizes[level])
        scores = {fit: _agreement(level, fit, sizes[0], read) for fit in (plain, padded)}
        best = padded if scores[padded] > scores[plain] + _CLEARLY else plain
        fits.append(best if scores[best] >= _AGREES else LevelFit(sizes[level], math.inf))
    return fits


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


def _agreement(level: int, fit: LevelFit, size: Size, read: ReadLevel) -> float:
    """The median correlation of the level's places with level 0; 1 where there is nothing to see on the level."""
    side = max(8, min(_PLACE, int(_MOST_LEVEL0 / fit.downsample), *fit.size))
    seen = [(corner, _grey(read(level, *corner, side, side))) for corner in _corners(fit.size, side)]
    seen = [(corner, grey) for corner, grey in seen if grey.std() >= _LEAST_CONTRAST]
    seen.sort(key=lambda place: -place[1].std())
    scores = []
    for (x, y), grey in seen[:_COMPARED]:
        left, top = (round(start * fit.downsample) for start in (x, y))
        width = min(round(side * fit.downsample), size[0] - left)
        height = min(round(side * fit.downsample), size[1] - top)
        if width < fit.downsample or height < fit.downsample:  # beyond level 0
            scores.append(0.0)
            continue
        shown = (max(1, round(width / fit.downsample)), max(1, round(height / fit.downsample)))
        level0 = Image.fromarray(read(0, left, top, width, height)).resize(shown, Image.Resampling.BOX)
        scores.append(_correlation(_grey(np.asarray(level0)), grey[: shown[1], : shown[0]]))
    return float(np.median(scores)) if scores else 1.0


def _corners(size: Size, side: int) -> list[tuple[int, int]]:
    """Corners of places spread over a level, its edges among them."""
    across, down = (np.unique(np.linspace(0, extent - side, _GRID).astype(int).clip(0)).tolist() for extent in size)
    return [(x, y) for y in down for x in across]


def _grey(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    return rgb.mean(axis=-1)


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    one, other = one - one.mean(), other - other.mean()
    spread = math.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / spread) if spread else 0.0
