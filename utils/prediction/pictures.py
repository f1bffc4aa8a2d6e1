"""The pictures of `predict.py --visualize`: on which slides, and how they look."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from utils.bags.store import Bag, StoredBag, is_feature_file
from utils.core.errors import ConfigError, SlideError
from utils.pictures.settings import Pictures
from utils.pictures.visualizer import AttentionVisualizer, check_drawable, set_paths
from utils.prediction.inputs import PredictionFiles
from utils.prediction.settings import PredictionRecipe
from utils.slides.find import find_slides, one_per_series


class PredictionPictures:
    """The pictures that `predict.py --visualize` was asked for: on which slides, and how they look.

    Raises ConfigError where that contradicts the inputs.
    """

    def __init__(self, asked: Pictures, files: PredictionFiles, recipe: PredictionRecipe, device: torch.device) -> None:
        self.asked, self.recipe, self.allow_renamed = asked, recipe, files.asked.allow_mismatch
        self.formats = files.asked.figure_format
        self.visualizer = AttentionVisualizer(asked.cmap, asked.alpha, asked.scale, device)
        wsi, one = asked.wsi, files.asked.input is not None
        self._slides: dict[str, Path] | None = None
        if files.are_raw:
            if wsi not in (None, files.asked.input):
                raise ConfigError(f"--wsi {wsi}: the input is raw slides itself; leave --wsi out")
        elif wsi is None:
            raise ConfigError("--visualize needs the slide of each feature file: give it, or their folder, with --wsi")
        elif is_feature_file(wsi):
            raise ConfigError(f"--wsi {wsi}: a feature file; give the slide it was made from")
        elif wsi.is_dir() and not one:
            self._slides = {slide.stem: slide for slide in one_per_series(find_slides(wsi))}
        elif not one:
            raise ConfigError(f"--wsi {wsi}: no folder; give the one that holds the slides of --input_dir")

    @property
    def cmap(self) -> str:
        """The colour map of every picture."""
        return self.asked.cmap

    def settings(self, source: Path) -> dict[str, Any]:
        """What changes a slide's pictures."""
        look = {name: getattr(self.asked, name) for name in ("top_k", "scale", "cmap", "alpha")}
        footprint = {name: getattr(self.recipe, name) for name in ("patch_size", "level")}
        return look | footprint | {"wsi": str(self.slide_of(source))}

    def slide_of(self, source: Path) -> Path:
        """The slide that a feature file's patches are of; a slide's own."""
        if not is_feature_file(source):
            return source
        if self._slides is None:
            assert self.asked.wsi is not None  # noqa: S101 - for the type checker: checked at the beginning
            return self.asked.wsi
        if source.stem not in self._slides:
            raise SlideError(f"{source}: --wsi {self.asked.wsi} holds no slide {source.stem} to draw it on")
        return self._slides[source.stem]

    def check(self, source: Path, bag: Bag | StoredBag) -> int:
        """The edge in level-0 px of the patches; raises as `check_drawable` does."""
        recipe = self.recipe
        return check_drawable(
            self.slide_of(source), source, bag, recipe.patch_size, recipe.level, allow_renamed=self.allow_renamed
        )

    def paths(self, folder: Path, name: str) -> list[Path]:
        return set_paths(folder, name, self.formats)

    def save(
        self,
        source: Path,
        folder: Path,
        coords: NDArray[np.int64],
        attention: NDArray,
        size_level0: int,
        record: Mapping[str, Any],
    ) -> list[Path]:
        """Write the whole set of a slide's record; its files."""
        return self.visualizer.save_set(
            self.slide_of(source), folder, coords, attention, size_level0, record, top_k=self.asked.top_k,
            formats=self.formats,
        )  # fmt: skip
