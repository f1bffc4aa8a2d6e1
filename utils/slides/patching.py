"""Which patches of a slide to read: a level-0 grid, thinned to those with enough tissue; and reading them."""

import math
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from utils.core.errors import ConfigError, SlideError
from utils.core.geometry import covered_fraction, level0_size, patch_grid, usable_extent
from utils.slides.slide import WHITE, Slide
from utils.slides.tissue import TissueMask, detect_tissue

# Float rounding in the covered fraction must not cost a patch that is covered exactly as asked.
_ROUNDING = 1e-6
# A slide this much coarser than asked is enlarged unasked: scanners of one nominal resolution differ by as much.
MOST_UPSAMPLING = 0.05
# Pillow widens its filters when it makes an image smaller, so that nothing is aliased; this one reaches 2 px each way.
_FILTER, _FILTER_REACH = Image.Resampling.BICUBIC, 2
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Sampling:
    """How a slide's pixels become those of a patch.

    Attributes:
        level: pyramid level that is read.
        downsample: level-0 px per patch px, exact.
        scale: px of that level per patch px: 1 where they are taken as they are, above 1 where they are averaged.
    """

    level: int
    downsample: float
    scale: float


@dataclass(frozen=True, eq=False)
class PatchPlan:
    """The patches of one slide.

    Attributes:
        coords: (N, 2) int64, top-left corners (x, y) in level-0 px, row by row.
        grid: (M, 2) int64, those of all patches before the tissue was looked at; regular but for a last column and row
            at the edge, where those were asked for.
        patch_size: side in px of the patch.
        patch_size_level0: side in level-0 px, rounded.
        stride_level0: distance between neighbours of the grid in level-0 px, rounded.
        sampling: what is read.
        mpp: um per px of the patches, or None where the slide's mpp is unknown.
        tissue: the mask that chose among them, or None at threshold 0.
        outlines_digest: of that mask, where it is of given outlines, and not the detector's.
        shortage: why there is no patch, "" where there are.
    """

    coords: NDArray[np.int64]
    grid: NDArray[np.int64]
    patch_size: int
    patch_size_level0: int
    stride_level0: int
    sampling: Sampling
    mpp: float | None
    tissue: TissueMask | None = None
    outlines_digest: str | None = None
    shortage: str = ""

    def __len__(self) -> int:
        return len(self.coords)


def plan_patches(
    slide: Slide,
    *,
    patch_size: int,
    stride: int | None = None,
    level: int | None = None,
    mpp: float | None = None,
    allow_upsample: bool = False,
    tissue_threshold: float = 0.5,
    outlined: TissueMask | None = None,
    keep_edge: bool = False,
) -> PatchPlan:
    """Lay a grid over a slide and keep the patches with enough tissue.

    Args:
        patch_size, stride: px of the patch; no stride means patches side by side.
        level, mpp: at most one of them, the pyramid level that is read as it is, or the um/px of the patches; level 0
            where neither is given.
        allow_upsample: take slides that are coarser than `mpp` too.
        tissue_threshold: least fraction of a patch's footprint that is tissue, 0 to 1; 0 keeps every patch of the grid
            and does not run the detector.
        outlined: where the tissue is, instead of what the detector finds.
        keep_edge: where the grid leaves a px or more of the level that is read at the right or bottom edge, add one
            column or row that ends at the edge and overlaps the one before.

    Raises:
        ConfigError: a size, stride or threshold that makes no sense.
        SlideError: the level does not exist, the slide's um/px is needed and unknown, or coarser than asked, the patch
            is larger than the slide, the slide cannot be read.

    A plan without a patch is no error here: its `shortage` says why.
    """
    stride = patch_size if stride is None else stride
    _check_settings(patch_size, stride, tissue_threshold)
    sampling = choose_sampling(slide, patch_size, level, mpp, allow_upsample)
    size_level0, stride_level0 = (level0_size(pixels, sampling.downsample) for pixels in (patch_size, stride))
    grid = _grid(slide, sampling, patch_size, stride_level0, keep_edge)

    coords, shortage, tissue = grid, "", None
    if tissue_threshold > 0:
        tissue = outlined or detect_tissue(slide)
        fraction = covered_fraction(tissue.mask, grid, size_level0, slide.width, slide.height)
        coords = grid[fraction >= tissue_threshold - _ROUNDING]
        if not len(coords):
            shortage = _shortage(slide, tissue, fraction, tissue_threshold)
    return PatchPlan(
        coords=coords,
        grid=grid,
        patch_size=patch_size,
        patch_size_level0=size_level0,
        stride_level0=stride_level0,
        sampling=sampling,
        mpp=delivered_mpp(slide, sampling, mpp),
        tissue=tissue,
        outlines_digest=None if outlined is None else outlined.digest,
        shortage=shortage,
    )


def _shortage(slide: Slide, tissue: TissueMask, fraction: NDArray[np.float64], threshold: float) -> str:
    """Why none of a grid's patches is kept, and what to do."""
    if tissue.is_grey:
        return (
            f"{slide.path}: it is greyscale, and the detector knows tissue by its colour; draw it and give --tissue, "
            "keep every patch with --tissue_threshold 0, or leave the slide out"
        )
    remedy = "lower --tissue_threshold, or " if fraction.max() > 0 else "draw it and give --tissue, or "
    return (
        f"{slide.path}: none of {len(fraction)} patches holds {threshold:g} tissue (the most is {fraction.max():.2f}, "
        f"{tissue.fraction:.1%} of the slide is tissue); {remedy}leave the slide out"
    )


def delivered_mpp(slide: Slide, sampling: Sampling, mpp: float | None) -> float | None:
    """um per px of patches that are read so, `mpp` being what was asked for; None where the slide's own is unknown."""
    if sampling.scale != 1:
        return mpp
    return slide.mpp * sampling.downsample if slide.mpp else None


def choose_sampling(
    slide: Slide, patch_size: int, level: int | None = None, mpp: float | None = None, allow_upsample: bool = False
) -> Sampling:
    """The level to read, and how: as it is, or resampled from the nearest finer one to exactly `mpp` um/px.

    Where a level would be off by less than half a pixel over a whole patch, it is read as it is. Raises as
    `plan_patches` does.
    """
    if mpp is None:
        level = 0 if level is None else level
        slide.check_level(level)
        return Sampling(level, slide.level_downsamples[level], 1.0)
    if level is not None:
        raise ConfigError(f"level {level} and mpp {mpp:g}: give at most one of them")
    if slide.mpp is None:
        raise SlideError(
            f"{slide.path}: its um/px is needed and unknown ({slide.mpp_problem}); give it with --slide_mpp (of all "
            "slides) or in --slides_csv (a table wsi,mpp); an extraction may ask for a --level instead of --mpp"
        )
    wanted = mpp / slide.mpp
    same = 0.5 / patch_size
    if wanted < 1 / (1 + MOST_UPSAMPLING) and not allow_upsample:
        raise SlideError(
            f"{slide.path}: too coarse for {mpp:g} um/px: it has {slide.mpp:.4g} um/px at its finest, {1 / wanted:.3g} "
            "times that; leave it out, ask for a coarser --mpp, or enlarge it with extractFeatures.py --allow_upsample"
        )
    downsamples = slide.level_downsamples
    finer = [index for index, factor in enumerate(downsamples) if factor <= wanted * (1 + same)]
    nearest = max(finer, key=lambda index: downsamples[index], default=0)
    scale = wanted / downsamples[nearest]
    if abs(scale - 1) <= same:
        return Sampling(nearest, downsamples[nearest], 1.0)
    return Sampling(nearest, wanted, scale)


def read_patch(slide: Slide, plan: PatchPlan, corner: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The patch (P, P, 3) uint8 RGB at a corner (x, y) in level-0 px.

    Raises:
        SlideError: it cannot be read; nothing is put in its place.
    """
    level, scale, size = plan.sampling.level, plan.sampling.scale, plan.patch_size
    if scale == 1:
        return slide.read_region(int(corner[0]), int(corner[1]), level, size, size)
    x, y = (corner / slide.level_downsamples[level]).tolist()
    # What the filter reaches beyond the patch is read too, as far as the level goes: neighbours meet without a seam.
    reach = math.ceil(_FILTER_REACH * max(scale, 1.0))
    width, height = slide.level_dimensions[level]
    left, top = max(0, math.floor(x) - reach), max(0, math.floor(y) - reach)
    right = min(width, math.ceil(x + size * scale) + reach)
    bottom = min(height, math.ceil(y + size * scale) + reach)
    pixels = Image.fromarray(slide.read_level(level, left, top, right - left, bottom - top))
    edges = (x - left, y - top, min(x - left + size * scale, right - left), min(y - top + size * scale, bottom - top))
    return np.asarray(pixels.resize((size, size), _FILTER, box=edges))


def _check_settings(patch_size: int, stride: int, tissue_threshold: float) -> None:
    if patch_size < 1 or stride < 1:
        raise ConfigError(f"patch_size {patch_size} and stride {stride}: both must be at least 1 px")
    if not 0 <= tissue_threshold <= 1:
        raise ConfigError(f"tissue_threshold {tissue_threshold:g}: a fraction from 0 to 1 is expected")


def _grid(slide: Slide, sampling: Sampling, patch_size: int, stride_level0: int, keep_edge: bool) -> NDArray[np.int64]:
    """The grid whose patches lie inside the level that is read, and so inside the slide."""
    downsample = slide.level_downsamples[sampling.level]
    level_width, level_height = slide.level_dimensions[sampling.level]
    # Rounded up: a patch of 100 px at downsample 4.016 reaches into the 402nd level-0 px.
    reach = math.ceil(patch_size * sampling.downsample - _ROUNDING)
    grid = patch_grid(
        usable_extent(slide.width, level_width, downsample),
        usable_extent(slide.height, level_height, downsample),
        reach,
        stride_level0,
        # A part of a px is none: the patch would be the one before once more.
        downsample if keep_edge else None,
    )
    if not len(grid):
        raise SlideError(
            f"{slide.path}: a patch of {patch_size} px is {reach} level-0 px wide, larger than the slide "
            f"({slide.width} x {slide.height} px); choose a smaller --patch_size or a finer resolution"
        )
    return grid


def read_batches(
    slide: Slide,
    plan: PatchPlan,
    batch_size: int,
    *,
    workers: int = 1,
    pin_memory: bool = False,
    on_damage: Callable[[int, SlideError], None] | None = None,
) -> Generator[Tensor]:
    """The plan's patches in their order, (B, P, P, 3) uint8, read ahead by `workers` threads; memory is that of a few
    batches. `pin_memory` is for a CUDA device.

    Of a patch that cannot be read `on_damage`, where it is given, gets the number and the error; its pixels are white.

    Raises:
        SlideError: a patch cannot be read; nothing is put in its place.
    """

    def fill(places: NDArray[np.uint8], numbers: NDArray[np.integer]) -> None:
        for place, number in zip(places, numbers.tolist(), strict=True):
            try:
                place[...] = read_patch(slide, plan, plan.coords[number])
            except SlideError as error:
                if on_damage is None:
                    raise
                place[...] = WHITE
                on_damage(number, error)

    waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(workers) as readers:
        try:
            for start in range(0, len(plan), batch_size):
                numbers = np.arange(start, min(start + batch_size, len(plan)))
                shape = (len(numbers), plan.patch_size, plan.patch_size, 3)
                batch = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
                # Runs of neighbours: threads that read one patch each in turn would wait for each other's tiles.
                runs = zip(*(np.array_split(part, workers) for part in (batch.numpy(), numbers)), strict=True)
                waiting.append((batch, [readers.submit(fill, *run) for run in runs]))
                if len(waiting) > _BATCHES_AHEAD:
                    yield _filled(*waiting.popleft())
            while waiting:
                yield _filled(*waiting.popleft())
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def _filled(batch: Tensor, fillings: list[Future[None]]) -> Tensor:
    for filling in fillings:
        filling.result()
    return batch
