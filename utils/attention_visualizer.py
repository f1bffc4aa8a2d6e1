"""AttentionVisualizer: what a model attended to, drawn on its slide.

visualizer = AttentionVisualizer(cmap="viridis", alpha=0.5)
visualizer.visualize_full_attention("slide.svs", coords, attention, size_level0, save_path="heatmap.png")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.bags.store import Bag
from utils.core.config import Pictures
from utils.core.errors import ConfigError, FeatureFileError
from utils.core.files import whole_file
from utils.core.geometry import level0_size
from utils.core.passport import recipe_differences
from utils.pictures.heatmap import Figure, Picture, checked_colormap, heatmap_figure, patch_grid_figure
from utils.slides.wsi import Slide, open_slide

# The longer side of the overview that is drawn on, in pixels.
_OVERVIEW = 2000
# More than this is no figure any more; `extract_top_patches` has no limit.
_GRID_PATCHES = 50


class AttentionVisualizer:
    """Draws attention of one distribution per slide: `attention (N,)` summing to 1 over the patches at
    `coords (N, 2)`, level-0 px of their top-left corners, each `patch_size_level0` px wide and high.

    Figures are returned, and written to `save_path` where given. Raises FeatureFileError when the patches cannot be
    the slide's, ConfigError for an unknown colour map.
    """

    def __init__(self, cmap: str = Pictures.cmap, alpha: float = Pictures.alpha) -> None:
        self.cmap, self.alpha = checked_colormap(cmap), alpha

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
            check_patches_fit(slide, coords, attention, patch_size_level0)
            thumbnail = slide.thumbnail(max_side=_OVERVIEW)
            picture = Picture(thumbnail, slide.width, slide.height, slide.mpp)
        figure = heatmap_figure(
            picture, coords, attention, patch_size_level0,
            title=title, cmap=self.cmap, alpha=self.alpha, top=_most_attended(attention, top_k),
        )  # fmt: skip
        _save(figure, save_path)
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

        With `save_dir` each is written as `top_<rank>_x<x>_y<y>.png`; those of an earlier call are removed.
        """
        with open_slide(wsi_path) as slide:
            check_patches_fit(slide, coords, attention, patch_size_level0)
            top = _most_attended(attention, top_k)
            places = [(int(x), int(y)) for x, y in coords[top]]
            patches = [slide.read_region(x, y, 0, patch_size_level0, patch_size_level0) for x, y in places]
        if save_dir is not None:
            _write_patches(Path(save_dir), places, patches)
        return patches

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
        """The `top_k` most attended patches (at most 50) in one figure, with rank, attention and place."""
        top_k = min(top_k, _GRID_PATCHES)
        patches = self.extract_top_patches(wsi_path, coords, attention, patch_size_level0, top_k=top_k)
        captions = [
            f"{rank}: {attention[index]:.3g} at ({coords[index][0]}, {coords[index][1]})"
            for rank, index in enumerate(_most_attended(attention, top_k), start=1)
        ]
        figure = patch_grid_figure(patches, captions, title)
        _save(figure, save_path)
        return figure

    def save_set(
        self,
        wsi_path: str | Path,
        output_dir: str | Path,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        *,
        name: str,
        title: str,
        top_k: int = Pictures.top_k,
        record: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Write `<name>_heatmap.png`, `<name>_patch_grid.png`, `<name>_top_patches/` and `<name>_attention.npz` (the
        arguments, the per-head attention `(H, N)` among them, and what `record` adds). Returns the four paths.

        Here `attention` is `(H, N)`; the pictures show its mean over heads.
        """
        folder = Path(output_dir)
        heatmap, grid, top, data = (
            folder / f"{name}_{part}" for part in ("heatmap.png", "patch_grid.png", "top_patches", "attention.npz")
        )
        patch_attention = attention.mean(axis=0)
        shown = (wsi_path, coords, patch_attention, patch_size_level0)
        self.visualize_full_attention(*shown, save_path=heatmap, title=title, top_k=top_k)
        self.create_patch_grid(*shown, save_path=grid, title=title, top_k=top_k)
        self.extract_top_patches(*shown, save_dir=top, top_k=top_k)
        with whole_file(data) as part, part.open("wb") as file:
            np.savez(
                file, coords=coords, attention=patch_attention, attention_heads=attention,
                patch_size_level0=patch_size_level0, **(record or {}),
            )  # fmt: skip
        return [heatmap, grid, top, data]


def check_drawable(
    wsi_path: Path, source: Path, bag: Bag, patch_size: int | None = None, level: int | None = None
) -> int:
    """The edge in level-0 pixels of the patches of `bag`, read from `source`, once they are known to be the slide's.

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
        found = {"width": slide.width, "height": slide.height, "quick_hash": slide.quick_hash()}
        differences = recipe_differences(made_from, found, found)
        if differences:
            raise FeatureFileError(
                f"{wsi_path}: not the slide that {source} was made from ({'; '.join(differences)}); "
                f"give slide {made_from.get('name')} with --wsi"
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


def _most_attended(attention: NDArray, top_k: int) -> NDArray[np.int64]:
    """Indices, the most attended first; of equals, the first."""
    return np.argsort(-attention, kind="stable")[:top_k]


def _save(figure: Figure, path: str | Path | None) -> None:
    if path is not None:
        with whole_file(Path(path)) as part:
            figure.savefig(part, format="png", dpi=200)


def _write_patches(folder: Path, places: list[tuple[int, int]], patches: list[NDArray[np.uint8]]) -> None:
    for earlier in folder.glob("top_*_x*_y*.png"):
        earlier.unlink()
    digits = len(str(len(patches)))
    for rank, ((x, y), patch) in enumerate(zip(places, patches, strict=True), start=1):
        with whole_file(folder / f"top_{rank:0{digits}d}_x{x}_y{y}.png") as part:
            Image.fromarray(patch).save(part, format="png")
