"""Check that patches belong to a slide, and find their size on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.bags.store import Bag, StoredBag
from utils.core.differences import differences, first_differences
from utils.core.errors import ConfigError, FeatureFileError
from utils.core.geometry import level0_size
from utils.pictures.blank_slide import BlankSlide
from utils.slides.open_slides import opened
from utils.slides.slide import Slide


def check_drawable(
    wsi: Path | Slide | None,
    source: Path,
    bag: Bag | StoredBag,
    patch_size: int | None = None,
    level: int | None = None,
    *,
    allow_renamed: bool = False,
) -> int:
    """Check that the patches of `bag`, read from `source`, belong to a slide, if there is one, and return their edge in
    level-0 px.

    The slide is compared with the bag's record of it; without a record, the slide and the file must have the same name,
    unless `allow_renamed`. `patch_size` and `level` are for a bag that does not record the edge. Raises
    FeatureFileError for a bag without coordinates or of another slide, ConfigError if the edge is unknown, SlideError.
    """
    if bag.coords is None:
        reason = f" ({bag.coords_withheld})" if bag.coords_withheld else ""
        raise FeatureFileError(
            f"{source}: has no coordinates, so nothing can be drawn{reason}; extract the slide again"
        )
    if wsi is None:
        return patch_edge(None, source, bag, patch_size, level)
    with opened(wsi) as slide:
        _check_same_slide(slide, source, bag.passport.slide if bag.passport else {}, allow_renamed)
        size = patch_edge(slide, source, bag, patch_size, level)
        _check_on_slide(slide, bag.coords, size)
    return size


def _check_same_slide(slide: Slide, source: Path, record: Mapping[str, Any], allow_renamed: bool) -> None:
    """Raise FeatureFileError unless the slide agrees with a feature file's record, or has the file's name."""
    actual = {
        "width": slide.width,
        "height": slide.height,
        "bounds": list(slide.bounds) if slide.bounds else None,
        "quick_hash": slide.quick_hash(),
    }
    mismatches = differences(record, actual, actual)
    if mismatches:
        raise FeatureFileError(
            f"{slide.path}: not the slide that {source} was made from ({first_differences(mismatches)}); "
            f"give slide {record.get('name')} with --wsi"
        )
    if record.get("quick_hash") is None and slide.name != source.stem and not allow_renamed:
        raise FeatureFileError(
            f"{slide.path}: has another name than {source}, which does not record its slide; "
            f"give slide {source.stem} with --wsi, or --allow_mismatch if it is that slide renamed"
        )


def patch_edge(
    slide: Slide | None, source: Path, bag: Bag | StoredBag, patch_size: int | None, level: int | None
) -> int:
    """Return the edge of a bag's patches in level-0 px, as recorded, or by `patch_size` and `level`.

    Without the slide, only patches of level 0 have a known edge. Raises ConfigError.
    """
    if bag.patch_size_level0 is not None:
        return bag.patch_size_level0
    if patch_size is None:
        raise ConfigError(f"{source}: does not record the patch size; give --patch_size, and --level if not 0")
    if not level:
        return patch_size
    if slide is None:
        raise ConfigError(f"{source}: does not record the patch size; --level {level} needs the slide: give --wsi")
    slide.check_level(level)
    return level0_size(patch_size, slide.level_downsamples[level])


def check_patches_fit(
    slide: Slide | BlankSlide, coords: NDArray[np.int64], attention: NDArray, patch_size_level0: int
) -> None:
    """Raise FeatureFileError unless each patch has its attention and lies on the slide."""
    if attention.shape != (len(coords),):
        raise FeatureFileError(f"{_file_of(slide)}: {len(coords)} patches but attention of shape {attention.shape}")
    _check_on_slide(slide, coords, patch_size_level0)


def _check_on_slide(slide: Slide | BlankSlide, coords: NDArray[np.int64], patch_size_level0: int) -> None:
    low, high = coords.min(axis=0), coords.max(axis=0) + patch_size_level0
    # A patch size rounded to level-0 pixels may extend one px beyond the edge.
    if low.min() < 0 or high[0] > slide.width + 1 or high[1] > slide.height + 1:
        raise FeatureFileError(
            f"{_file_of(slide)}: is {slide.width} x {slide.height} px, but the patches reach from "
            f"{low.tolist()} to {high.tolist()}; give the slide that the features were made from with --wsi"
        )


def _file_of(slide: Slide | BlankSlide) -> str:
    """Return the slide's path, or its name if it is not at hand."""
    return slide.name if isinstance(slide, BlankSlide) else str(slide.path)
