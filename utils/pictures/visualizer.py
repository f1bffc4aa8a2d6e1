"""AttentionVisualizer: what a model attended to, drawn on its slide.

visualizer = AttentionVisualizer(cmap="viridis", alpha=0.5)
visualizer.visualize_full_attention("slide.svs", coords, attention, size_level0, save_path="heatmap.png")
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from utils.bags.store import Bag, StoredBag
from utils.core.differences import differences, first_differences
from utils.core.errors import ConfigError, FeatureFileError
from utils.core.files import whole_file, write_records
from utils.core.geometry import level0_size
from utils.core.plots import figure_paths
from utils.core.settings import FIGURE_FORMAT
from utils.core.text import NOTICE
from utils.pictures.attention_map import AttentionMap
from utils.pictures.caption import Caption, title_of
from utils.pictures.geojson import write_attention
from utils.pictures.heatmap import (
    Figure,
    Look,
    Picture,
    detailed_figure,
    heatmap_figure,
    map_thumbnail,
    patch_grid_figure,
    save_picture,
)
from utils.pictures.report import ShownPatch, write_report
from utils.pictures.settings import Pictures
from utils.slides.slide import Slide
from utils.slides.wsi import open_slide

# The longer side of the overview that is drawn on, in pixels.
_OVERVIEW = 2000
# More than this is no figure any more; `extract_top_patches` has no limit.
_GRID_PATCHES = 50
_TABLE = "patches.csv"
_FIGURES, _OTHERS = (
    ("heatmap", "detailed", "patch_grid"),
    ("thumbnail.jpg", "top_patches", "attention.npz", "attention.geojson", "report.html"),
)


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


class AttentionVisualizer:
    """Draws attention of one distribution per slide: `attention (N,)` summing to 1 over the patches at
    `coords (N, 2)`, level-0 px of their top-left corners, each `patch_size_level0` px wide and high.

    Colours are those of `cmap` over `scale`, "percentile" within the slide or "attention" itself, with the opacity
    `alpha`. Figures are returned, and written to `save_path` where given. Raises FeatureFileError when the patches
    cannot be the slide's, ConfigError for an unknown colour map.
    """

    def __init__(
        self,
        cmap: str = Pictures.cmap,
        alpha: float = Pictures.alpha,
        scale: str = Pictures.scale,
        device: torch.device | str = "cpu",
    ) -> None:
        self.look = Look(cmap, alpha, scale, device)

    def visualize_full_attention(
        self,
        wsi_path: str | Path,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        *,
        save_path: str | Path | None = None,
        title: str = "",
        top_k: int = Pictures.top_k,
    ) -> Figure:
        """The heatmap over the whole slide, the `top_k` most attended patches outlined and numbered."""
        with open_slide(wsi_path) as slide:
            shown = _attention_map(slide, coords, attention, patch_size_level0)
            figure = heatmap_figure(_overview(slide), shown, self.look, title=title, top_k=top_k)
        save_picture(figure, save_path)
        return figure

    def visualize_chunked_attention(
        self,
        wsi_path: str | Path,
        coords: Sequence[NDArray[np.int64]],
        attention: Sequence[NDArray],
        patch_size_level0: int,
        *,
        save_path: str | Path | None = None,
        title: str = "",
        top_k: int = Pictures.top_k,
    ) -> Figure:
        """The same of a slide that was fed in chunks: of each its `coords (n, 2)` and `attention (n,)`, which sums to 1
        within the chunk and counts in proportion to its size.
        """
        number = sum(len(part) for part in attention)
        whole = np.concatenate([part * (len(part) / number) for part in attention])
        return self.visualize_full_attention(
            wsi_path, np.concatenate(coords), whole, patch_size_level0, save_path=save_path, title=title, top_k=top_k
        )

    def visualize_detailed_attention(
        self,
        wsi_path: str | Path,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        *,
        caption: Caption | None = None,
        save_path: str | Path | None = None,
        title: str = "",
        top_k: int = Pictures.top_k,
    ) -> Figure:
        """The slide beside the heatmap, how attention is spread and concentrated, and what `caption` says."""
        with open_slide(wsi_path) as slide:
            shown = _attention_map(slide, coords, attention, patch_size_level0)
            figure = self._detailed(_overview(slide), shown, caption or Caption(), title, top_k)
        save_picture(figure, save_path)
        return figure

    def extract_top_patches(
        self,
        wsi_path: str | Path,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        *,
        save_dir: str | Path | None = None,
        top_k: int = Pictures.top_k,
    ) -> list[NDArray[np.uint8]]:
        """The `top_k` most attended patches at full resolution, `(P, P, 3)` uint8, most attended first.

        With `save_dir` each is written as `top_<rank>_x<x>_y<y>.png`, for contrast the least attended ones as
        `least_<rank>_...`, and a table of them all, `patches.csv`; those of an earlier call are removed.
        """
        with open_slide(wsi_path) as slide:
            shown = _attention_map(slide, coords, attention, patch_size_level0)
            top, least = _patches(slide, shown, shown.top(top_k)), []
            if save_dir is not None:
                least = _patches(slide, shown, shown.lowest(top_k))
                _write_patches(Path(save_dir), shown, top, least, None)
        return [patch.pixels for patch in top]

    def create_patch_grid(
        self,
        wsi_path: str | Path,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        *,
        save_path: str | Path | None = None,
        title: str = "",
        top_k: int = Pictures.top_k,
    ) -> Figure:
        """The `top_k` most attended patches (at most 50), and as many of the least attended, in one figure."""
        count = min(top_k, _GRID_PATCHES)
        with open_slide(wsi_path) as slide:
            shown = _attention_map(slide, coords, attention, patch_size_level0)
            top, least = (_patches(slide, shown, few) for few in (shown.top(count), shown.lowest(count)))
        figure = _grid(shown, top, least, title)
        save_picture(figure, save_path)
        return figure

    def save_set(
        self,
        wsi_path: str | Path,
        output_dir: str | Path,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        record: Mapping[str, Any],
        *,
        top_k: int = Pictures.top_k,
        formats: Sequence[str] = FIGURE_FORMAT,
    ) -> list[Path]:
        """Write `<slide>_heatmap`, `_detailed` and `_patch_grid` in each of the `formats`, `_thumbnail.jpg` (the
        heatmap, small), `_top_patches/`, `_attention.npz` (the arguments, the per-head attention `(H, N)` among them,
        and the prediction), `_attention.geojson` and `_report.html`. Returns the files.

        Here `attention` is `(H, N)`; the pictures show its mean over heads. `record` is what
        `<slide>_prediction.json` holds.
        """
        caption = Caption.of(record)
        name, title = record["slide"], title_of(record)
        *paths, small, top_patches, data, tiles, page = set_paths(Path(output_dir), name, formats)
        with open_slide(wsi_path) as slide:
            shown = _attention_map(slide, coords, attention.mean(axis=0), patch_size_level0)
            picture = _overview(slide, (record["slide_record"] or {}).get("mpp"))
            top, least = (_patches(slide, shown, few) for few in (shown.top(top_k), shown.lowest(top_k)))
            about = {"prediction": caption.answer, "seen_in_training": record["seen_in_training"], "notice": NOTICE}
            write_attention(tiles, shown, slide, self.look.cmap, about)
        figures = [
            heatmap_figure(picture, shown, self.look, title=title, top_k=top_k),
            self._detailed(picture, shown, caption, title, top_k),
            _grid(shown, top[:_GRID_PATCHES], least[:_GRID_PATCHES], title),
        ]
        for part, figure in zip(_FIGURES, figures, strict=True):
            for path in figure_paths(Path(output_dir) / f"{name}_{part}", formats):
                save_picture(figure, path)
        with whole_file(small) as part:
            map_thumbnail(picture, shown, self.look).save(part, "JPEG", quality=75)
        patches = _write_patches(top_patches, shown, top, least, record["seen_in_training"])
        with whole_file(data) as part, part.open("wb") as file:
            np.savez(
                file, coords=coords, attention=shown.attention, attention_heads=attention,
                patch_size_level0=patch_size_level0, class_names=list(caption.probabilities),
                probabilities=list(caption.probabilities.values()), prediction=record["predicted_class"],
                seen_in_training=str(record["seen_in_training"]),
                mpp=(record["slide_record"] or {}).get("mpp_delivered") or np.nan,
            )  # fmt: skip
        write_report(
            page, picture, shown, self.look, slide=name, answer=caption.answer, probabilities=caption.probabilities,
            notes=caption.notes, facts=caption.facts, top=top, least=least,
        )  # fmt: skip
        return [*paths, small, *patches, data, tiles, page]

    def _detailed(self, picture: Picture, shown: AttentionMap, caption: Caption, title: str, top_k: int) -> Figure:
        return detailed_figure(
            picture, shown, self.look, title=title, top_k=top_k, probabilities=caption.probabilities,
            facts=[*caption.facts, *(("note", note) for note in caption.notes)],
        )  # fmt: skip


def set_paths(folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
    """Where `AttentionVisualizer.save_set` writes, the figures first."""
    figures = [path for part in _FIGURES for path in figure_paths(Path(folder) / f"{name}_{part}", formats)]
    return [*figures, *(Path(folder) / f"{name}_{part}" for part in _OTHERS)]


def _attention_map(slide: Slide, coords: NDArray[np.int64], attention: NDArray, size_level0: int) -> AttentionMap:
    check_patches_fit(slide, coords, attention, size_level0)
    return AttentionMap(np.asarray(coords, dtype=np.int64), attention, size_level0)


def _overview(slide: Slide, told_mpp: float | None = None) -> Picture:
    """`told_mpp` is what the user said of a slide that does not tell its um per level-0 px itself."""
    return Picture(slide.thumbnail(max_side=_OVERVIEW), slide.width, slide.height, told_mpp or slide.mpp)


def _patches(slide: Slide, shown: AttentionMap, indices: NDArray[np.int64]) -> list[ShownPatch]:
    size = shown.size_level0
    places = zip(indices.tolist(), shown.coords[indices].tolist(), strict=True)
    return [ShownPatch(index, slide.read_region(x, y, 0, size, size)) for index, (x, y) in places]


def _grid(shown: AttentionMap, top: Sequence[ShownPatch], least: Sequence[ShownPatch], title: str) -> Figure:
    def captions(patches: Sequence[ShownPatch]) -> list[str]:
        return [
            f"{shown.ranks[patch.index]}: {shown.attention[patch.index]:.3g}\nat ({x}, {y})"
            for patch in patches
            for x, y in [shown.coords[patch.index].tolist()]
        ]

    shown_top, shown_least = ([patch.pixels for patch in patches] for patches in (top, least))
    return patch_grid_figure(shown_top, captions(top), shown_least, captions(least), title)


def check_drawable(
    wsi_path: Path,
    source: Path,
    bag: Bag | StoredBag,
    patch_size: int | None = None,
    level: int | None = None,
    *,
    allow_renamed: bool = False,
) -> int:
    """The edge in level-0 pixels of the patches of `bag`, read from `source`, once they are known to be the slide's: by
    what was recorded of it, else by its name, unless that is allowed to differ.

    `patch_size` and `level` say it for a bag that does not. Raises FeatureFileError for a bag without coordinates, or
    of another slide; ConfigError where the size is unknown; SlideError.
    """
    if bag.coords is None:
        reason = f" ({bag.coords_withheld})" if bag.coords_withheld else ""
        raise FeatureFileError(
            f"{source}: has no coordinates, so nothing can be drawn{reason}; extract the slide again"
        )
    with open_slide(wsi_path) as slide:
        made_from = bag.passport.slide if bag.passport else {}
        found = {
            "width": slide.width,
            "height": slide.height,
            "bounds": list(slide.bounds) if slide.bounds else None,
            "quick_hash": slide.quick_hash(),
        }
        unlike = differences(made_from, found, found)
        if unlike:
            raise FeatureFileError(
                f"{wsi_path}: not the slide that {source} was made from ({first_differences(unlike)}); "
                f"give slide {made_from.get('name')} with --wsi"
            )
        if made_from.get("quick_hash") is None and slide.name != source.stem and not allow_renamed:
            raise FeatureFileError(
                f"{wsi_path}: is not called as {source}, which does not tell what slide it was made from; "
                f"give slide {source.stem} with --wsi, or --allow_mismatch for one that was renamed"
            )
        size = bag.patch_size_level0 or _footprint(slide, source, patch_size, level or 0)
        _check_reach(slide, bag.coords, size)
    return size


def _footprint(slide: Slide, source: Path, patch_size: int | None, level: int) -> int:
    if patch_size is None:
        raise ConfigError(f"{source}: does not record the patch size; give --patch_size, and --level if not 0")
    slide.check_level(level)
    return level0_size(patch_size, slide.level_downsamples[level])


def check_patches_fit(slide: Slide, coords: NDArray[np.int64], attention: NDArray, patch_size_level0: int) -> None:
    """Raise FeatureFileError unless the patches can be this slide's, each with its attention."""
    if attention.shape != (len(coords),):
        raise FeatureFileError(f"{slide.path}: {len(coords)} patches but attention of shape {attention.shape}")
    _check_reach(slide, coords, patch_size_level0)


def _check_reach(slide: Slide, coords: NDArray[np.int64], patch_size_level0: int) -> None:
    start, reach = coords.min(axis=0), coords.max(axis=0) + patch_size_level0
    # A patch size rounded to level-0 pixels may reach one beyond the edge.
    if start.min() < 0 or reach[0] > slide.width + 1 or reach[1] > slide.height + 1:
        raise FeatureFileError(
            f"{slide.path}: is {slide.width} x {slide.height} px, but the patches reach from "
            f"{start.tolist()} to {reach.tolist()}; give the slide that the features were made from with --wsi"
        )


def _write_patches(
    folder: Path,
    shown: AttentionMap,
    top: Sequence[ShownPatch],
    least: Sequence[ShownPatch],
    seen_in_training: bool | None,
) -> list[Path]:
    """Write the patches and their table; its files."""
    for kind in ("top", "least"):
        for earlier in folder.glob(f"{kind}_*_x*_y*.png"):
            earlier.unlink()
    digits = len(str(len(shown)))
    records = []
    for kind, patches in (("top", top), ("least", least)):
        for patch in patches:
            rank, (x, y) = int(shown.ranks[patch.index]), shown.coords[patch.index].tolist()
            name = f"{kind}_{rank:0{digits}d}_x{x}_y{y}.png"
            with whole_file(folder / name) as part:
                Image.fromarray(patch.pixels).save(part, format="png")
            weight, percentile = float(shown.attention[patch.index]), float(shown.percentiles[patch.index])
            records.append(PatchRecord(name, rank, weight, round(percentile, 3), x, y, seen_in_training))
    write_records(folder / _TABLE, records)
    return [folder / name for name in (*(record.file for record in records), _TABLE)]
