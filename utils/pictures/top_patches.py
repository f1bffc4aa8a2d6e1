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

GRID_PATCHES = 50  # of each kind in the figure; files have no limit
_TABLE = "patches.csv"


@dataclass(frozen=True)
class MapPatch:
    """A patch of an attention map, by its index, with its `pixels (P, P, 3)` at full resolution."""

    index: int
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class PatchRecord:
    """A row of `patches.csv`; `x` and `y` are level-0 px of the patch's top-left corner."""

    file: str
    rank: int
    attention: float
    percentile: float
    x: int
    y: int
    seen_in_training: bool | None


def read_patches(slide: Slide, attention: AttentionMap, indices: NDArray[np.int64]) -> list[MapPatch]:
    """Read the patches with these indices."""
    size = attention.size_level0
    corners = attention.coords[indices].tolist()
    return [
        MapPatch(index, slide.read_region(x, y, 0, size, size))
        for index, (x, y) in zip(indices.tolist(), corners, strict=True)
    ]


def read_extremes(slide: Slide, attention: AttentionMap, count: int) -> tuple[list[MapPatch], list[MapPatch]]:
    """Read the `count` most attended patches, and as many of the least attended."""
    top, least = attention.top(count), attention.lowest(count)
    return read_patches(slide, attention, top), read_patches(slide, attention, least)


def grid_figure(attention: AttentionMap, top: Sequence[MapPatch], least: Sequence[MapPatch], title: str) -> Figure:
    """Draw the most and the least attended patches, at most 50 each, with rank, attention and position."""

    def captions(patches: Sequence[MapPatch]) -> list[str]:
        return [
            f"{attention.ranks[patch.index]}: {attention.attention[patch.index]:.3g}\nat ({x}, {y})"
            for patch in patches
            for x, y in [attention.coords[patch.index].tolist()]
        ]

    top, least = top[:GRID_PATCHES], least[:GRID_PATCHES]
    top_pixels, least_pixels = ([patch.pixels for patch in patches] for patches in (top, least))
    return patch_grid_figure(top_pixels, captions(top), least_pixels, captions(least), title)


def patch_records(attention: AttentionMap, count: int, seen_in_training: bool | None) -> list[PatchRecord]:
    """Return the rows of `patches.csv`: the `count` most attended patches, then as many of the least attended."""
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


def write_patches(folder: Path, records: Sequence[PatchRecord], patches: Sequence[MapPatch]) -> None:
    """Write the patches and their table, and remove the patches of an earlier call."""
    for kind in ("top", "least"):
        for path in folder.glob(f"{kind}_*_x*_y*.png"):
            path.unlink()
    for record, patch in zip(records, patches, strict=True):
        with whole_file(folder / record.file) as unfinished:
            Image.fromarray(patch.pixels).save(unfinished, format="png")
    write_records(folder / _TABLE, records)
