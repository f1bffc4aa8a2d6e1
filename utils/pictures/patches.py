"""The most and the least attended patches: read from the slide, shown in a figure, written as files with a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.core.files import whole_file, write_records
from utils.pictures.attention_map import AttentionMap
from utils.pictures.heatmap import Figure, patch_grid_figure
from utils.slides.slide import Slide

# More than this is no figure any more; files have no limit.
GRID_PATCHES = 50
_TABLE = "patches.csv"


@dataclass(frozen=True)
class ShownPatch:
    """A patch at full resolution, `pixels (P, P, 3)`, and its index in the map."""

    index: int
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class PatchRecord:
    """A line of the table beside the patches; `x` and `y` level-0 px of its top-left corner."""

    file: str
    rank: int
    attention: float
    percentile: float
    x: int
    y: int
    seen_in_training: bool | None


def read_patches(slide: Slide, attention: AttentionMap, indices: NDArray[np.int64]) -> list[ShownPatch]:
    """Read patches of a map, in the order of `indices`."""
    size = attention.size_level0
    corners = attention.coords[indices].tolist()
    return [
        ShownPatch(index, slide.read_region(x, y, 0, size, size))
        for index, (x, y) in zip(indices.tolist(), corners, strict=True)
    ]


def read_extremes(slide: Slide, attention: AttentionMap, count: int) -> tuple[list[ShownPatch], list[ShownPatch]]:
    """Read the `count` most attended patches, and as many of the least attended."""
    top, least = attention.top(count), attention.lowest(count)
    return read_patches(slide, attention, top), read_patches(slide, attention, least)


def grid_figure(attention: AttentionMap, top: Sequence[ShownPatch], least: Sequence[ShownPatch], title: str) -> Figure:
    """Draw the most and the least attended patches, at most 50 each, with rank, attention and place."""

    def captions(patches: Sequence[ShownPatch]) -> list[str]:
        return [
            f"{attention.ranks[patch.index]}: {attention.attention[patch.index]:.3g}\nat ({x}, {y})"
            for patch in patches
            for x, y in [attention.coords[patch.index].tolist()]
        ]

    top, least = top[:GRID_PATCHES], least[:GRID_PATCHES]
    top_pixels, least_pixels = ([patch.pixels for patch in patches] for patches in (top, least))
    return patch_grid_figure(top_pixels, captions(top), least_pixels, captions(least), title)


def patch_records(attention: AttentionMap, count: int, seen_in_training: bool | None) -> list[PatchRecord]:
    """Return the lines of the table: the `count` most attended patches, then as many of the least attended."""
    digits = len(str(len(attention)))
    records = []
    for kind, indices in (("top", attention.top(count)), ("least", attention.lowest(count))):
        for index in indices.tolist():
            rank, (x, y) = int(attention.ranks[index]), attention.coords[index].tolist()
            weight, percentile = float(attention.attention[index]), float(attention.percentiles[index])
            name = f"{kind}_{rank:0{digits}d}_x{x}_y{y}.png"
            records.append(PatchRecord(name, rank, weight, round(percentile, 3), x, y, seen_in_training))
    return records


def patch_files(folder: Path, records: Sequence[PatchRecord]) -> list[Path]:
    """Return the files that `write_patches` writes."""
    return [folder / name for name in (*(record.file for record in records), _TABLE)]


def write_patches(folder: Path, records: Sequence[PatchRecord], patches: Sequence[ShownPatch]) -> None:
    """Write patches and their table in place of those of an earlier call."""
    for kind in ("top", "least"):
        for earlier in folder.glob(f"{kind}_*_x*_y*.png"):
            earlier.unlink()
    for record, patch in zip(records, patches, strict=True):
        with whole_file(folder / record.file) as unfinished:
            Image.fromarray(patch.pixels).save(unfinished, format="png")
    write_records(folder / _TABLE, records)
