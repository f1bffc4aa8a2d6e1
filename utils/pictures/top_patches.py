"""The most and the least attended patches: read from the slide, shown in a figure, written as files with a table."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.core.files import whole_file, write_records
from utils.pictures.attention_map import AttentionMap
from utils.pictures.evidence_map import EvidenceMap
from utils.pictures.heatmap import Figure, patch_grid_figure, reduced
from utils.slides.slide import Slide

GRID_PATCHES = 50  # of each kind in the figure; files have no limit
PAGE_PATCHES, PAGE_SIDE = 24, 1024  # of each kind on the page, and px of their longest side
GRID_SIDE = 660  # px of a patch in the figure: 2.2 inches at 300 dpi
_MOST_PAGE_PIXELS = 12 * PAGE_SIDE**2  # of each kind: more would not fit on the page as JPEGs at full size
_GRID_PIXELS = 10_000_000  # of each of four kinds: a picture has at most 40 million
_TABLE = "patches.csv"


@dataclass(frozen=True)
class MapPatch:
    """A patch of an attention map, by its index, with its `pixels (P, P, 3)` at full resolution."""

    index: int
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class PatchRecord:
    """A row of `patches.csv`; `x` and `y` are level-0 px of the patch's top-left corner. `rank` is the number in the
    file's name, `mean_rank` the rank that `equal_patches`, those of the same attention, share.
    """

    file: str
    rank: int
    attention: float
    percentile: float
    x: int
    y: int
    seen_in_training: bool | None
    mean_rank: float
    equal_patches: int


def read_patches(slide: Slide, attention: AttentionMap, indices: NDArray[np.int64]) -> Iterator[MapPatch]:
    """Read the patches with these indices, one at a time."""
    size = attention.size_level0
    for index in indices.tolist():
        x, y = attention.coords[index].tolist()
        yield MapPatch(index, slide.read_region(x, y, 0, size, size))


def read_shown(slide: Slide, attention: AttentionMap, indices: NDArray[np.int64]) -> list[MapPatch]:
    """Read the patches with these indices, at most 50, each made as small at once as the page and the figure show it:
    the more there are, the smaller.
    """
    shown = indices[:GRID_PATCHES]
    on_page = max(1, min(len(shown), PAGE_PATCHES))
    page_side = min(PAGE_SIDE, math.isqrt(_MOST_PAGE_PIXELS // on_page))
    grid_side = min(GRID_SIDE, math.isqrt(_GRID_PIXELS // max(1, len(shown))))
    return [
        MapPatch(patch.index, reduced(patch.pixels, page_side if number < PAGE_PATCHES else grid_side))
        for number, patch in enumerate(read_patches(slide, attention, shown))
    ]


def read_extremes(slide: Slide, attention: AttentionMap, count: int) -> tuple[list[MapPatch], list[MapPatch]]:
    """Read the `count` most attended patches, and as many of the least attended, as `read_shown` does."""
    top, least = attention.top(count), attention.lowest(count)
    return read_shown(slide, attention, top), read_shown(slide, attention, least)


@dataclass(frozen=True)
class PatchGroup:
    """Patches to show together, in order: their `title`, the `kind` of their mark ("top" or "least"), and a caption of
    each, which may be of their evidence.
    """

    title: str
    kind: str
    patches: Sequence[MapPatch]
    captions: Sequence[str]
    is_evidence: bool = False


def attention_groups(attention: AttentionMap, top: Sequence[MapPatch], least: Sequence[MapPatch]) -> list[PatchGroup]:
    """Return the most and the least attended patches as groups, captioned with rank and attention."""

    def captions(patches: Sequence[MapPatch]) -> list[str]:
        return [f"{rank_text(attention, patch.index)}: {attention.attention[patch.index]:.3g}" for patch in patches]

    shared = attention.lowest_count
    which = f" ({len(least):,} of the {shared:,} that share the lowest)" if shared > len(least) else ""
    return [
        PatchGroup(attention.most_text, "top", top, captions(top)),
        PatchGroup(f"{attention.least_text}{which}", "least", least, captions(least)),
    ]


def rank_text(attention: AttentionMap, index: int) -> str:
    """Return a patch's rank; of equal patches, their first and last rank."""
    equal, middle = int(attention.equals[index]), attention.mean_ranks[index]
    first, last = round(middle - (equal - 1) / 2), round(middle + (equal - 1) / 2)
    return f"{first:,}" if equal == 1 else f"{first:,} to {last:,}"


def read_evidence_groups(
    slide: Slide, attention: AttentionMap, evidence: EvidenceMap, name: str, count: int
) -> list[PatchGroup]:
    """Read the `count` patches that argue most for a class, and those that argue most against it, as two groups.

    A caption is what the patch adds to the class's log-odds; those that argue for it have their number on the map.
    """
    values = evidence.of_class(name)
    supporters, opponents = evidence.strongest(name, count)
    texts = [
        [f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+#.2g}" for value in values[indices[:GRID_PATCHES]]]
        for indices in (supporters, opponents)
    ]
    texts[0] = [f"{number}: {text}" for number, text in enumerate(texts[0], start=1)]
    return [
        PatchGroup(
            f"patches with most evidence {side} {name}", kind, read_shown(slide, attention, indices), captions,
            is_evidence=True,
        )
        for side, kind, indices, captions in (
            ("for", "top", supporters, texts[0]), ("against", "least", opponents, texts[1]),
        )
    ]  # fmt: skip


def patch_width_text(size_level0: int, mpp: float | None) -> str:
    """Return how wide a patch of `size_level0` level-0 px is: in um if `mpp`, the um per level-0 px, is known."""
    pixels = f"{size_level0:,} level-0 px"
    if mpp is None:
        return f"Each patch is {pixels} wide"
    width = size_level0 * mpp
    return f"Each patch is {f'{width:,.0f}' if width >= 100 else f'{width:.3g}'} µm wide ({pixels})"


def grid_figure(attention: AttentionMap, groups: Sequence[PatchGroup], title: str, mpp: float | None = None) -> Figure:
    """Draw groups of patches, at most 50 each, with their captions and positions, and how wide they are; `mpp` is the
    um per level-0 px.
    """
    rows = []
    for group in groups:
        patches = group.patches[:GRID_PATCHES]
        captions = [
            f"{caption}\nlevel-0 px ({x}, {y})"
            for caption, patch in zip(group.captions, patches, strict=False)
            for x, y in [attention.coords[patch.index].tolist()]
        ]
        rows.append((group.title, group.kind, [patch.pixels for patch in patches], captions))
    return patch_grid_figure(rows, "\n".join(filter(None, [title, patch_width_text(attention.size_level0, mpp)])))


def patch_records(attention: AttentionMap, count: int, seen_in_training: bool | None) -> list[PatchRecord]:
    """Return the rows of `patches.csv`: the `count` most attended patches, then as many of the least attended."""
    digits = len(str(len(attention)))
    records = []
    for kind, indices in (("top", attention.top(count)), ("least", attention.lowest(count))):
        for index in indices.tolist():
            rank, (x, y) = int(attention.ranks[index]), attention.coords[index].tolist()
            weight, percentile = float(attention.attention[index]), float(attention.percentiles[index])
            name = f"{kind}_{rank:0{digits}d}_x{x}_y{y}.png"
            ties = float(attention.mean_ranks[index]), int(attention.equals[index])
            records.append(PatchRecord(name, rank, weight, round(percentile, 3), x, y, seen_in_training, *ties))
    return records


def patch_files(folder: Path, records: Sequence[PatchRecord]) -> list[Path]:
    """Return the files that `write_patches` writes."""
    return [folder / name for name in (*(record.file for record in records if record.file), _TABLE)]


def write_patches(folder: Path, records: Sequence[PatchRecord], patches: Iterable[MapPatch]) -> None:
    """Write the patches and their table, and remove the patches of an earlier call; rows without a file have none."""
    for kind in ("top", "least"):
        for path in folder.glob(f"{kind}_*_x*_y*.png"):
            path.unlink()
    for record, patch in zip([record for record in records if record.file], patches, strict=True):
        with whole_file(folder / record.file) as unfinished:
            Image.fromarray(patch.pixels).save(unfinished, format="png")
    write_records(folder / _TABLE, records, PatchRecord)
