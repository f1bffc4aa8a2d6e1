"""AttentionVisualizer: draws a model's attention on the slide.

visualizer = AttentionVisualizer(cmap="viridis", alpha=0.5)
visualizer.visualize_full_attention("slide.svs", coords, attention, size_level0, save_path="heatmap.png")
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from utils.core.settings import FIGURE_FORMAT
from utils.pictures.attention_map import ATTENTION, AttentionMap, weight_name
from utils.pictures.heatmap import Figure, heatmap_figure, save_picture
from utils.pictures.overlay import MapStyle, Overlay
from utils.pictures.picture_set import PictureSet, captioned_figure, overview
from utils.pictures.prediction_caption import Caption
from utils.pictures.settings import Pictures
from utils.pictures.slide_match import check_patches_fit
from utils.pictures.top_patches import (
    GRID_PATCHES,
    attention_groups,
    grid_figure,
    patch_records,
    read_extremes,
    read_patches,
    write_patches,
)
from utils.slides.open_slides import opened
from utils.slides.slide import Slide


class AttentionVisualizer:
    """Draws the attention to a slide: `attention (N,)`, which sums to 1, of the patches at `coords (N, 2)`, level-0 px
    of their top-left corners, each `patch_size_level0` px wide and high.

    Colours are those of `cmap` over `scale`, "percentile" within the slide, "attention" itself or "uniform", its
    multiple of uniform attention, with the opacity `alpha`. Figures are returned, and written to `save_path` if given.
    Raises FeatureFileError if the patches are not on the slide, ConfigError for an unknown colour map.
    """

    def __init__(
        self,
        cmap: str = Pictures.cmap,
        alpha: float = Pictures.alpha,
        scale: str = Pictures.scale,
        device: torch.device | str = "cpu",
    ) -> None:
        self.style = MapStyle(cmap, alpha, scale, device)

    def visualize_full_attention(
        self,
        wsi_path: str | Path | Slide,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        *,
        save_path: str | Path | None = None,
        title: str = "",
        top_k: int = Pictures.top_k,
    ) -> Figure:
        """Draw the heatmap over the whole slide, the `top_k` most attended patches outlined and numbered."""
        with opened(wsi_path) as slide:
            overlay = self._overlay(slide, coords, attention, patch_size_level0)
        figure = heatmap_figure(overlay, title=title, top_k=top_k)
        save_picture(figure, save_path)
        return figure

    def visualize_chunked_attention(
        self,
        wsi_path: str | Path | Slide,
        coords: Sequence[NDArray[np.int64]],
        attention: Sequence[NDArray],
        patch_size_level0: int,
        *,
        save_path: str | Path | None = None,
        title: str = "",
        top_k: int = Pictures.top_k,
    ) -> Figure:
        """Draw the heatmap of a slide that was fed in chunks, given the `coords (n, 2)` and `attention (n,)` of each.

        A chunk's attention sums to 1, and is weighted by the chunk's size.
        """
        count = sum(len(chunk) for chunk in attention)
        merged = np.concatenate([chunk * (len(chunk) / count) for chunk in attention])
        return self.visualize_full_attention(
            wsi_path, np.concatenate(coords), merged, patch_size_level0, save_path=save_path, title=title, top_k=top_k
        )

    def visualize_detailed_attention(
        self,
        wsi_path: str | Path | Slide,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        *,
        caption: Caption | None = None,
        save_path: str | Path | None = None,
        title: str = "",
        top_k: int = Pictures.top_k,
    ) -> Figure:
        """Draw the slide beside the heatmap, the distribution and concentration of attention, and the `caption`."""
        with opened(wsi_path) as slide:
            overlay = self._overlay(slide, coords, attention, patch_size_level0)
        figure = captioned_figure(overlay, caption or Caption(), title, top_k)
        save_picture(figure, save_path)
        return figure

    def extract_top_patches(
        self,
        wsi_path: str | Path | Slide,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        *,
        save_dir: str | Path | None = None,
        top_k: int = Pictures.top_k,
    ) -> list[NDArray[np.uint8]]:
        """Return the `top_k` most attended patches at full resolution, `(P, P, 3)` uint8, most attended first.

        With `save_dir` each is written as `top_<rank>_x<x>_y<y>.png`, the least attended ones as `least_<rank>_...`,
        and a table of all as `patches.csv`; patches of an earlier call are removed.
        """
        with opened(wsi_path) as slide:
            attention_map = _attention_map(slide, coords, attention, patch_size_level0)
            top = list(read_patches(slide, attention_map, attention_map.top(top_k)))
            if save_dir is not None:
                patches = chain(top, read_patches(slide, attention_map, attention_map.lowest(top_k)))
                write_patches(Path(save_dir), patch_records(attention_map, top_k, None), patches)
        return [patch.pixels for patch in top]

    def create_patch_grid(
        self,
        wsi_path: str | Path | Slide,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        *,
        save_path: str | Path | None = None,
        title: str = "",
        top_k: int = Pictures.top_k,
    ) -> Figure:
        """Draw the `top_k` most attended patches (at most 50), and as many of the least attended."""
        with opened(wsi_path) as slide:
            attention_map = _attention_map(slide, coords, attention, patch_size_level0)
            top, least = read_extremes(slide, attention_map, min(top_k, GRID_PATCHES))
            mpp = slide.mpp
        figure = grid_figure(attention_map, attention_groups(attention_map, top, least), title, mpp)
        save_picture(figure, save_path)
        return figure

    def save_set(
        self,
        wsi_path: str | Path | Slide,
        output_dir: str | Path,
        coords: NDArray[np.int64],
        attention: NDArray,
        patch_size_level0: int,
        record: Mapping[str, Any],
        *,
        top_k: int = Pictures.top_k,
        formats: Sequence[str] = FIGURE_FORMAT,
    ) -> list[Path]:
        """Write `<slide>_heatmap`, `_detailed` and `_patch_grid` in each of the `formats`, `_thumbnail.jpg` (a small
        heatmap), `_top_patches/`, `_attention.npz` (the arguments and the prediction), `_attention.geojson` and
        `_report.html`. Return the files.

        Here `attention` is `(H, N)`, of each head; the pictures show the mean. `record` is the content of
        `<slide>_prediction.json`.
        """
        with opened(wsi_path) as slide:
            weights = attention.mean(axis=0)
            attention_map = _attention_map(slide, coords, weights, patch_size_level0, weight_name(record))
            pictures = PictureSet(slide, Path(output_dir), attention_map, attention, record, self.style, top_k, formats)
            pictures.write()
        return pictures.files

    def _overlay(self, slide: Slide, coords: NDArray[np.int64], attention: NDArray, patch_size_level0: int) -> Overlay:
        attention_map = _attention_map(slide, coords, attention, patch_size_level0)
        return Overlay(overview(slide, attention_map), attention_map, self.style)


def _attention_map(
    slide: Slide, coords: NDArray[np.int64], attention: NDArray, patch_size_level0: int, name: str = ATTENTION
) -> AttentionMap:
    check_patches_fit(slide, coords, attention, patch_size_level0)
    return AttentionMap(np.asarray(coords, dtype=np.int64), attention, patch_size_level0, name)
