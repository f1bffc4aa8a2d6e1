"""Which patches of a slide to read: a level-0 grid, thinned to those with enough tissue; and reading them."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import ConfigError, NoTissueError, SlideError
from utils.core.geometry import covered_fraction, level0_size, patch_grid, usable_extent
from utils.slides.tissue import TissueMask, detect_tissue
from utils.slides.wsi import Slide

# Float rounding in the covered fraction must not cost a patch that is covered exactly as asked.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class PatchPlan:
    """The patches of one slide.

    Attributes:
        coords: (N, 2) int64, top-left corners (x, y) in level-0 px, row by row.
        patch_size: side in px of the level read.
        patch_size_level0: side in level-0 px, rounded.
        stride_level0: distance between neighbours of the grid in level-0 px, rounded.
        level: the level read.
        mpp: um per px of the patches as read, or None where the slide's mpp is unknown.
        grid_count: patches of the grid before the tissue was looked at.
        tissue: the mask that chose among them, or None at threshold 0.
    """

    coords: NDArray[np.int64]
    patch_size: int
    patch_size_level0: int
    stride_level0: int
    level: int
    mpp: float | None
    grid_count: int
    tissue: TissueMask | None = None

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def kept_count(self) -> int:
        """Patches of the grid with enough tissue."""
        return len(self.coords)


def plan_patches(
    slide: Slide, *, patch_size: int, stride: int | None = None, level: int = 0, tissue_threshold: float = 0.5
) -> PatchPlan:
    """Lay a grid over a slide and keep the patches with enough tissue.

    Args:
        patch_size, stride: px of `level`; no stride means patches side by side.
        level: pyramid level that is read.
        tissue_threshold: least fraction of a patch's footprint that is tissue, 0 to 1; 0 keeps every patch of the grid
            and does not run the detector.

    Raises:
        ConfigError: a size, stride or threshold that makes no sense.
        SlideError: the level does not exist, the patch is larger than the slide, the slide cannot be read.
        NoTissueError: no patch has enough tissue.
    """
    stride = patch_size if stride is None else stride
    _check_settings(patch_size, stride, tissue_threshold)
    slide.check_level(level)
    downsample = slide.level_downsamples[level]
    size_level0, stride_level0 = level0_size(patch_size, downsample), level0_size(stride, downsample)
    grid = _level_grid(slide, level, patch_size, stride_level0)

    tissue = None
    coords = grid
    if tissue_threshold > 0:
        tissue = detect_tissue(slide)
        fraction = covered_fraction(tissue.mask, grid, size_level0, slide.width, slide.height)
        coords = grid[fraction >= tissue_threshold - _ROUNDING]
        if not len(coords):
            raise NoTissueError(
                f"{slide.path}: none of {len(grid)} patches holds {tissue_threshold:g} tissue (the most is "
                f"{fraction.max():.2f}, {tissue.fraction:.1%} of the slide is tissue); lower tissue_threshold, or 0 to "
                "keep every patch"
            )
    return PatchPlan(
        coords=coords,
        patch_size=patch_size,
        patch_size_level0=size_level0,
        stride_level0=stride_level0,
        level=level,
        mpp=slide.mpp * downsample if slide.mpp else None,
        grid_count=len(grid),
        tissue=tissue,
    )


def read_patches(slide: Slide, plan: PatchPlan, indices: Iterable[int] | None = None) -> Iterator[NDArray[np.uint8]]:
    """The plan's patches one by one, (P, P, 3) uint8 RGB, in the plan's order or in that of `indices`.

    Raises:
        SlideError: a patch cannot be read; nothing is put in its place.
    """
    for index in range(len(plan)) if indices is None else indices:
        x, y = plan.coords[index].tolist()
        yield slide.read_region(x, y, plan.level, plan.patch_size, plan.patch_size)


def _check_settings(patch_size: int, stride: int, tissue_threshold: float) -> None:
    if patch_size < 1 or stride < 1:
        raise ConfigError(f"patch_size {patch_size} and stride {stride}: both must be at least 1 px")
    if not 0 <= tissue_threshold <= 1:
        raise ConfigError(f"tissue_threshold {tissue_threshold:g}: a fraction from 0 to 1 is expected")


def _level_grid(slide: Slide, level: int, patch_size: int, stride_level0: int) -> NDArray[np.int64]:
    """The grid whose patches lie inside the level that is read, and so inside the slide."""
    downsample = slide.level_downsamples[level]
    level_width, level_height = slide.level_dimensions[level]
    # Rounded up: a patch of 100 px at downsample 4.016 reaches into the 402nd level-0 px.
    reach = math.ceil(patch_size * downsample - _ROUNDING)
    grid = patch_grid(
        usable_extent(slide.width, level_width, downsample),
        usable_extent(slide.height, level_height, downsample),
        reach,
        stride_level0,
    )
    if not len(grid):
        raise SlideError(
            f"{slide.path}: a patch of {patch_size} px at level {level} is larger than the slide there "
            f"({level_width} x {level_height} px); choose a smaller patch_size or a finer level"
        )
    return grid
