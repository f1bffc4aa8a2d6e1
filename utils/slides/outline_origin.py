"""Find the origin of outlines: the corner of the scanned area, as in QuPath, or the slide's own corner."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import SlideError
from utils.core.runtime import log
from utils.slides.qupath import Area
from utils.slides.slide import Slide

# A polygon supports an origin if at least this share of it lies in the scanned area when counted from there,
_WITHIN = 0.95
# and at most this share when counted from the other origin.
_BEYOND = 0.8
# With less than this share in the scanned area it lies outside.
_LEAST = 0.02


def qupath_offset(bounds: tuple[int, int, int, int] | None) -> NDArray[np.float64]:
    """Return QuPath's origin (x, y) in level-0 px: the corner of the scanned area, if a slide's file has its `bounds`
    (x, y, width, height).
    """
    return np.array(bounds[:2] if bounds else (0, 0), dtype=float)


def find_offset(slide: Slide, tissue: Sequence[Area], cut_out: Sequence[Area], path: Path) -> NDArray[np.float64]:
    """Return the origin (x, y) in level-0 px of all polygons of a file, by where they would lie.

    Raises SlideError if a polygon of tissue lies in the scanned area from neither origin, or polygons contradict each
    other.
    """
    offset, own = qupath_offset(slide.bounds), np.zeros(2)
    if not offset.any():
        return offset
    of_tissue = _boxes(tissue)
    boxes = np.concatenate([of_tissue, _boxes(cut_out)])
    relative, absolute = (_shares(boxes + corner, slide.scanned) for corner in (offset, own))
    is_inside = np.maximum(relative, absolute) >= _LEAST
    for box in of_tissue[~is_inside[: len(of_tissue)]]:
        raise SlideError(
            f"{path}: a polygon at {_xy(box)} lies outside the scanned area of {slide.path} ({_area_words(slide)}), "
            "counted from that area's corner and from the slide's own; give the file of this slide"
        )
    _check_agreement(boxes, relative, absolute, path)
    fits_relative, fits_absolute = (bool((shares[is_inside] >= _LEAST).all()) for shares in (relative, absolute))
    if fits_relative and (not fits_absolute or relative.mean() >= absolute.mean()):
        return offset
    log.info("%s: lies beyond the scanned area when counted from its corner; taken as px of the whole slide", path)
    return own


def check_position(slide: Slide, tissue: Sequence[Area], cut_out: Sequence[Area], offset: NDArray, path: Path) -> None:
    """Raise SlideError if a polygon of tissue lies outside the scanned area, and warn if one to cut out does.

    `offset` is the origin of the polygons, (x, y) in level-0 px.
    """
    beside = f"beside {slide.path} of {slide.width} x {slide.height} px"
    unscanned = f"outside the scanned area of {slide.path} ({_area_words(slide)})"
    whole = (0, 0, slide.width, slide.height)
    for areas, is_tissue in ((tissue, True), (cut_out, False)):
        boxes = _boxes(areas)
        for where, area, least in ((beside, whole, 1e-9), (unscanned, slide.scanned, _LEAST)):
            for box in boxes[_shares(boxes + offset, area) < least][:1]:
                if is_tissue:
                    raise SlideError(f"{path}: a polygon at {_xy(box)} lies {where}; give the file of this slide")
                log.warning("%s: an area to cut out, at %s, lies %s", path, _xy(box), where)
                boxes = boxes[:0]


def _check_agreement(boxes: NDArray, relative: NDArray, absolute: NDArray, path: Path) -> None:
    """Raise SlideError if some polygons lie in the scanned area only from one origin, others only from the other."""
    for_relative = ((relative >= _WITHIN) & (absolute <= _BEYOND)) | ((relative >= _LEAST) & (absolute < _LEAST))
    for_absolute = ((absolute >= _WITHIN) & (relative <= _BEYOND)) | ((absolute >= _LEAST) & (relative < _LEAST))
    if for_relative.any() and for_absolute.any():
        by_area, by_slide = boxes[for_relative][0], boxes[for_absolute][0]
        raise SlideError(
            f"{path}: its polygons contradict each other: counted from the corner of the scanned area the one at "
            f"{_xy(by_area)} lies in it, the one at {_xy(by_slide)} only when counted from the slide's own corner; "
            "count all from one of them, as one export from QuPath does"
        )


def _boxes(areas: Sequence[Area]) -> NDArray[np.float64]:
    """Return (n, 2, 2): the least and the greatest x and y of each polygon."""
    rings = [np.concatenate(list(polygon)) for area in areas for polygon in area.polygons]
    return np.array([(ring.min(axis=0), ring.max(axis=0)) for ring in rings]).reshape(-1, 2, 2)


def _shares(boxes: NDArray[np.float64], area: tuple[int, int, int, int]) -> NDArray[np.float64]:
    """Return (n,): the share of each box in an area (x, y, width, height); for a box larger than it, of the area."""
    first, size = np.array(area[:2]), np.array(area[2:])
    low, high = boxes[:, 0], np.maximum(boxes[:, 1], boxes[:, 0] + 1e-6)
    overlap = np.maximum(np.minimum(high, first + size) - np.maximum(low, first), 0)
    return np.prod(overlap, axis=1) / np.minimum(np.prod(high - low, axis=1), np.prod(size))


def _xy(box: NDArray[np.float64]) -> str:
    return f"({box[0, 0]:.0f}, {box[0, 1]:.0f})"


def _area_words(slide: Slide) -> str:
    x, y, width, height = slide.scanned
    return f"{width} x {height} px from ({x}, {y}) of {slide.width} x {slide.height}"
