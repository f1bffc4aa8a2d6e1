"""Which patches of a slide lie in areas annotated in QuPath, by their class."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import SlideError, first_few
from utils.core.runtime import log
from utils.slides.contours import ContourFile
from utils.slides.outlines import fill
from utils.slides.qupath import Area, read_areas
from utils.slides.slide import Slide

_POINTS = 8  # in each direction of a patch, where it is looked at
_MOST_PIXELS = 1 << 14  # of the raster, in each direction


def annotated_patches(
    path: Path, words: Mapping[str, str], corners: NDArray[np.int64], edge: int, slide: Slide | None
) -> tuple[dict[str, NDArray[np.bool_]], NDArray[np.bool_]]:
    """Return which patches are of each class, `(N,)` bool by class, and which lie in areas to ignore, `(N,)` bool.

    `corners (N, 2)` are the patches' top-left corners and `edge` their edge, in level-0 px. A patch is of a class if
    at least half of it lies in areas of that class; `words` maps names of areas' classes to classes. Without the
    slide, coordinates count from its own corner unless the file says otherwise. Raises SlideError for a file that is
    not GeoJSON, and if none of its areas is of a class in `words`.
    """
    file = ContourFile.read(path)
    areas = [area for area in read_areas(file.content, path) if not area.is_core]
    ignored = [area for area in areas if area.is_cut_out(words)]
    of_class: dict[str, list[Area]] = {}
    unknown = []
    for area in areas:
        classes = dict.fromkeys(words[name] for name in words if area.is_tissue([name]) or name == area.class_name)
        for name in classes:
            of_class.setdefault(name, []).append(area)
        if not classes and not area.is_cut_out(words):
            unknown.append(area.class_name)
    if unknown and not of_class:
        raise SlideError(
            f"{path}: none of its areas is of class {', '.join(words)}; there are {first_few(sorted(set(unknown)))}; "
            "say which class one of them stands for, such as --annotation_class Tumor=malignant"
        )
    if unknown:
        log.info("%s: areas of other classes are not used: %s", path, first_few(sorted(set(unknown))))
    used = [area for group in of_class.values() for area in group]
    origin = file.origin(slide, used, ignored)
    inside = {name: _shares(group, origin, corners, edge) >= 0.5 for name, group in of_class.items()}
    return inside, _shares(ignored, origin, corners, edge) >= 0.5


def _shares(
    areas: Sequence[Area], origin: NDArray[np.float64], corners: NDArray[np.int64], edge: int
) -> NDArray[np.float32]:
    """Return the share `(N,)` of each patch that lies in any of the areas, seen at some points of it."""
    shares = np.zeros(len(corners), dtype=np.float32)
    rings = [[ring + origin for ring in polygon] for area in areas for polygon in area.polygons]
    if not rings:
        return shares
    points = np.concatenate([ring for polygon in rings for ring in polygon])
    low = np.maximum(points.min(axis=0), corners.min(axis=0))
    high = np.minimum(points.max(axis=0), corners.max(axis=0) + edge)
    if (high <= low).any():
        return shares
    pixel = max(edge / _POINTS, float((high - low).max()) / _MOST_PIXELS)
    columns, rows = np.ceil((high - low) / pixel).astype(int)
    mask = np.zeros((rows, columns), dtype=bool)
    for polygon in rings:
        fill(mask, [(ring - low) / pixel for ring in polygon])
    steps = (np.arange(_POINTS) + 0.5) * edge / _POINTS
    for down in steps:
        row = np.floor((corners[:, 1] + down - low[1]) / pixel).astype(np.int64)
        for right in steps:
            column = np.floor((corners[:, 0] + right - low[0]) / pixel).astype(np.int64)
            is_on = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            shares[is_on] += mask[row[is_on], column[is_on]]
    return shares / np.float32(_POINTS**2)
