"""Choose the patches of a slide, those of a level-0 grid with enough tissue, and read them."""

import math
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from utils.core.cli import is_flag
from utils.core.errors import ConfigError, SlideError
from utils.core.geometry import covered_fraction, level0_size, patch_grid, usable_extent
from utils.slides.slide import WHITE, Slide
from utils.slides.tissue import TissueMask, detect_tissue

# Rounding errors must not drop a patch whose tissue fraction equals the threshold.
_ROUNDING = 1e-6
# Slides coarser than asked by at most this share are enlarged anyway: scanners of one nominal mpp differ that much.
MOST_UPSAMPLING = 0.05
# Pillow widens its filters when it shrinks an image, which prevents aliasing; this one reaches 2 px each way.
_FILTER, _FILTER_REACH = Image.Resampling.BICUBIC, 2
_BATCHES_AHEAD = 2

OnDamage = Callable[[int, SlideError], None] | None  # takes a patch's number and why it cannot be read


@dataclass(frozen=True)
class Sampling:
    """How the pixels of a slide become those of a patch.

    Attributes:
        level: pyramid level that is read.
        downsample: level-0 px per patch px, exact.
        scale: px of that level per patch px: 1 if they are read as they are, above 1 if they are averaged.
    """

    level: int
    downsample: float
    scale: float


@dataclass(frozen=True)
class PatchGrid:
    """The settings of a grid of patches.

    Attributes:
        patch_size, stride: px of the patch; no stride means patches side by side.
        level, mpp: at most one of them, the pyramid level that is read as it is, or the um/px of the patches; level 0
            if neither is given.
        allow_upsample: also accept slides that are coarser than `mpp`.
        tissue_threshold: least fraction of a patch's footprint that is tissue, 0 to 1; 0 keeps every patch of the grid
            and does not run the detector.
        keep_edge: if the grid leaves a px or more of the level that is read at the right or bottom edge, add one column
            or row that ends at the edge and overlaps the previous one.
    """

    patch_size: int
    stride: int | None = None
    level: int | None = None
    mpp: float | None = None
    allow_upsample: bool = False
    tissue_threshold: float = 0.5
    keep_edge: bool = False


@dataclass(frozen=True, eq=False)
class PatchPlan:
    """The patches of one slide.

    Attributes:
        coords: (N, 2) int64, top-left corners (x, y) in level-0 px, row by row.
        grid: (M, 2) int64, those of all patches of the grid, whatever their tissue; regular except for a last column
            and row at the edge, if these were asked for.
        patch_size: side in px of the patch.
        patch_size_level0: side in level-0 px, rounded.
        stride_level0: distance between neighbours of the grid in level-0 px, rounded.
        sampling: how they are read.
        mpp: um per px of the patches, or None if the slide's mpp is unknown.
        tissue: the tissue mask, or None at threshold 0.
        outlines_digest: digest of that mask if it is from given outlines, not from the detector.
        shortage: why there is no patch, "" if there are any.
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


def plan_patches(slide: Slide, settings: PatchGrid, outlined: TissueMask | None = None) -> PatchPlan:
    """Lay a grid over a slide and keep the patches with enough tissue.

    `outlined` is the tissue by given outlines, which replaces the detector's. A plan without patches is not an error:
    its `shortage` says why.

    Raises:
        ConfigError: the patch size, stride or threshold is invalid.
        SlideError: the level does not exist, the slide's um/px is needed and unknown, or coarser than asked, the patch
            is larger than the slide, the slide cannot be read.
    """
    patch_size, threshold = settings.patch_size, settings.tissue_threshold
    stride = patch_size if settings.stride is None else settings.stride
    _check_settings(patch_size, stride, threshold)
    sampling = choose_sampling(slide, patch_size, settings.level, settings.mpp, settings.allow_upsample)
    size_level0, stride_level0 = (level0_size(pixels, sampling.downsample) for pixels in (patch_size, stride))
    grid = _grid(slide, sampling, patch_size, stride_level0, settings.keep_edge)

    coords, shortage, tissue = grid, "", None
    if threshold > 0:
        tissue = outlined or detect_tissue(slide)
        fraction = covered_fraction(tissue.mask, grid, size_level0, slide.width, slide.height)
        coords = grid[fraction >= threshold - _ROUNDING]
        if not len(coords):
            shortage = _shortage(slide, tissue, fraction, threshold)
    return PatchPlan(
        coords, grid, patch_size, size_level0, stride_level0, sampling, delivered_mpp(slide, sampling, settings.mpp),
        tissue, None if outlined is None else outlined.digest, shortage,
    )  # fmt: skip


def _shortage(slide: Slide, tissue: TissueMask, fraction: NDArray[np.float64], threshold: float) -> str:
    """Say why no patch of a grid is kept, and what to do."""
    draw = f"draw it and {'give' if is_flag('tissue') else 'extract it with extractFeatures.py'} --tissue"
    if tissue.is_grey:
        return (
            f"{slide.path}: it is greyscale, and the detector finds tissue by its colour; {draw}, "
            "keep every patch with --tissue_threshold 0, or leave the slide out"
        )
    remedy = "lower --tissue_threshold, or " if fraction.max() > 0 else f"{draw}, or "
    return (
        f"{slide.path}: none of {len(fraction)} patches holds {threshold:g} tissue (the most is {fraction.max():.2f}, "
        f"{tissue.fraction:.1%} of the slide is tissue); {remedy}leave the slide out"
    )


def delivered_mpp(slide: Slide, sampling: Sampling, mpp: float | None) -> float | None:
    """Return the um per px of patches read in this way, of the `mpp` requested; None if the slide's is unknown."""
    if sampling.scale != 1:
        return mpp
    return slide.mpp * sampling.downsample if slide.mpp else None


def choose_sampling(
    slide: Slide, patch_size: int, level: int | None = None, mpp: float | None = None, allow_upsample: bool = False
) -> Sampling:
    """Choose the level to read as it is, or the nearest finer one to resample to exactly `mpp` um/px.

    A level that would be off by less than half a pixel over a whole patch is read as it is. Raises as `plan_patches`
    does.
    """
    if mpp is None:
        level = 0 if level is None else level
        slide.check_level(level)
        return Sampling(level, slide.level_downsamples[level], 1.0)
    if level is not None:
        raise ConfigError(f"level {level} and mpp {mpp:g}: give at most one of them")
    if slide.mpp is None:
        instead = "; an extraction may ask for a --level instead of --mpp" if is_flag("allow_upsample") else ""
        raise SlideError(
            f"{slide.path}: its um/px is needed and unknown ({slide.mpp_problem}); give it with --slide_mpp (of all "
            f"slides) or in --slides_csv (a table wsi,mpp){instead}"
        )
    downsample = mpp / slide.mpp
    tolerance = 0.5 / patch_size
    if downsample < 1 / (1 + MOST_UPSAMPLING) and not allow_upsample:
        instead = "ask for a coarser --mpp, " if is_flag("allow_upsample") else ""
        raise SlideError(
            f"{slide.path}: too coarse for {mpp:g} um/px: it has {slide.mpp:.4g} um/px at its finest, "
            f"{1 / downsample:.3g} times that; leave it out, {instead}or enlarge it with "
            "extractFeatures.py --allow_upsample"
        )
    nearest = slide.coarsest_level(downsample * (1 + tolerance))
    scale = downsample / slide.level_downsamples[nearest]
    if abs(scale - 1) <= tolerance:
        return Sampling(nearest, slide.level_downsamples[nearest], 1.0)
    return Sampling(nearest, downsample, scale)


def read_patch(slide: Slide, plan: PatchPlan, corner: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Read the patch (P, P, 3) uint8 RGB at a corner (x, y) in level-0 px. Raises SlideError if it cannot be read."""
    level, scale, size = plan.sampling.level, plan.sampling.scale, plan.patch_size
    if scale == 1:
        return slide.read_region(int(corner[0]), int(corner[1]), level, size, size)
    x, y = (corner / slide.level_downsamples[level]).tolist()
    # The filter's margin around the patch is read too, up to the level's edge, so that neighbours meet without a seam.
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
    """Return the grid of the patches that lie inside the level that is read, and so inside the slide."""
    downsample = slide.level_downsamples[sampling.level]
    level_width, level_height = slide.level_dimensions[sampling.level]
    # Rounded up: a patch of 100 px at downsample 4.016 reaches into the 402nd level-0 px.
    reach = math.ceil(patch_size * sampling.downsample - _ROUNDING)
    grid = patch_grid(
        usable_extent(slide.width, level_width, downsample),
        usable_extent(slide.height, level_height, downsample),
        reach,
        stride_level0,
        # Less than a px does not count: the patch would repeat the previous one.
        downsample if keep_edge else None,
    )
    if not len(grid):
        is_free = is_flag("allow_upsample")  # else the patch size is that of a model
        remedy = "choose a smaller --patch_size or a finer resolution" if is_free else "leave the slide out"
        raise SlideError(
            f"{slide.path}: a patch of {patch_size} px is {reach} level-0 px wide, larger than the slide "
            f"({slide.width} x {slide.height} px); {remedy}"
        )
    return grid


def read_batches(
    slide: Slide,
    plan: PatchPlan,
    batch_size: int,
    *,
    workers: int = 1,
    pin_memory: bool = False,
    on_damage: OnDamage = None,
) -> Generator[Tensor]:
    """Yield the plan's patches in their order, (B, P, P, 3) uint8, read ahead by `workers` threads.

    Memory is that of a few batches; `pin_memory` is for a CUDA device. A patch that cannot be read is a SlideError;
    with `on_damage`, that gets the patch's number and the error, and the patch is white.
    """
    fill = partial(_fill, slide, plan, on_damage)
    waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(workers) as readers:
        try:
            for start in range(0, len(plan), batch_size):
                numbers = np.arange(start, min(start + batch_size, len(plan)))
                shape = (len(numbers), plan.patch_size, plan.patch_size, 3)
                batch = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
                # Runs of neighbours: threads that read one patch each in turn would wait for each other's tiles.
                runs = zip(*(np.array_split(values, workers) for values in (batch.numpy(), numbers)), strict=True)
                waiting.append((batch, [readers.submit(fill, *run) for run in runs]))
                if len(waiting) > _BATCHES_AHEAD:
                    yield _filled(*waiting.popleft())
            while waiting:
                yield _filled(*waiting.popleft())
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def _fill(slide: Slide, plan: PatchPlan, on_damage: OnDamage, patches: NDArray, numbers: NDArray[np.integer]) -> None:
    """Read the patches of these numbers into `patches (n, P, P, 3)` uint8."""
    for patch, number in zip(patches, numbers.tolist(), strict=True):
        try:
            patch[...] = read_patch(slide, plan, plan.coords[number])
        except SlideError as error:
            if on_damage is None:
                raise
            patch[...] = WHITE
            on_damage(number, error)


def _filled(batch: Tensor, fillings: list[Future[None]]) -> Tensor:
    for filling in fillings:
        filling.result()
    return batch
