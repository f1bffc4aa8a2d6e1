"""Draw the pictures of `predict.py --visualize` on the slides of the predictions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.bags.store import Bag, StoredBag, is_feature_file
from utils.core.errors import ConfigError, did_you_mean_path
from utils.core.runtime import log
from utils.pictures.attention_map import EVIDENCE_STRENGTH, AttentionMap, weight_name
from utils.pictures.blank_slide import BlankSlide
from utils.pictures.evidence_map import EvidenceMap
from utils.pictures.overlay import MapStyle
from utils.pictures.picture_set import PictureSet, picture_paths
from utils.pictures.settings import Pictures
from utils.pictures.slide_match import check_drawable, check_patches_fit
from utils.prediction.inputs import PredictionFiles
from utils.prediction.settings import PredictionRecipe
from utils.prediction.slide_folder import SlideFolder
from utils.prediction.slide_prediction import SlidePrediction
from utils.slides.slide import Slide


class PredictionPictures:
    """The settings of the pictures, and the slide that each input's pictures are drawn on.

    Raises ConfigError if the settings contradict the inputs.
    """

    def __init__(
        self, settings: Pictures, files: PredictionFiles, recipe: PredictionRecipe, device: torch.device
    ) -> None:
        self.settings, self.recipe, self.allow_renamed = settings, recipe, files.settings.allow_mismatch
        self.formats = files.settings.figure_format
        self.style = MapStyle(settings.cmap, settings.alpha, settings.scale, device)
        wsi, is_single = settings.wsi, files.settings.input is not None
        self._slides: SlideFolder | None = None
        self._are_raw = files.are_raw
        if files.are_raw:
            if wsi not in (None, files.settings.input):
                raise ConfigError(f"--wsi {wsi}: the input is raw slides itself; leave --wsi out")
        elif wsi is None:
            log.info("Without --wsi, maps are drawn on white ground by the patches' coordinates, and no patch is shown")
        elif is_feature_file(wsi):
            raise ConfigError(f"--wsi {wsi}: a feature file; give the slide it was made from")
        elif wsi.is_dir() and not is_single:
            self._slides = SlideFolder(wsi, files.feat_type)
        elif not is_single:
            near = did_you_mean_path(wsi)
            raise ConfigError(f"--wsi {wsi}: no folder; give the one that holds the slides of --input_dir{near}")

    @property
    def is_blank(self) -> bool:
        """Whether maps are drawn without their slides."""
        return self.settings.wsi is None and not self._are_raw

    @property
    def cmap(self) -> str:
        """Return the colour map of every picture."""
        return self.settings.cmap

    def picture_settings(self, source: Path) -> dict[str, Any]:
        """Return the settings that change a slide's pictures."""
        look = {name: getattr(self.settings, name) for name in ("top_k", "scale", "cmap", "alpha")}
        footprint = {name: getattr(self.recipe, name) for name in ("patch_size", "level")}
        slide = self.slide_of(source)
        return look | footprint | {"wsi": slide and str(slide)}

    def slide_of(self, source: Path) -> Path | None:
        """Return the slide that a feature file was made from, or a raw slide itself; None if no slide is given."""
        if not is_feature_file(source):
            return source
        return self.settings.wsi if self._slides is None else self._slides.slide_of(source)

    def check(self, slide: Slide | None, source: Path, bag: Bag | StoredBag) -> int:
        """Return the edge of the patches in level-0 px. Raises what `check_drawable` raises."""
        recipe = self.recipe
        return check_drawable(slide, source, bag, recipe.patch_size, recipe.level, allow_renamed=self.allow_renamed)

    def paths(self, folder: Path, record: Mapping[str, Any]) -> list[Path]:
        """Return the paths of the pictures of a slide's record."""
        has_evidence, count = bool(record.get("evidence")), record["num_instances"]
        return picture_paths(
            folder, record["slide"], self.formats, count, evidence=has_evidence, top_k=self.settings.top_k,
            is_blank=self.is_blank,
        )  # fmt: skip

    def pictures(
        self,
        slide: Slide | None,
        folder: Path,
        prediction: SlidePrediction,
        size_level0: int,
        record: Mapping[str, Any],
    ) -> PictureSet:
        """Return the set of pictures of a slide's record, ready to be written."""
        ground = slide or BlankSlide.of(prediction.slide, prediction.bag, size_level0)
        coords, attention, name = prediction.coords, prediction.attention, weight_name(record)
        case = prediction.of_case
        compared = (None, 0) if case is None else (case.attention, case.first)
        if attention is None:
            attention, name, compared = prediction.evidence_strength, EVIDENCE_STRENGTH, (None, 0)
        assert coords is not None and attention is not None  # noqa: S101, PT018 - for the type checker: checked before
        attention_map = AttentionMap(coords, attention.mean(axis=0), size_level0, name, *compared)
        check_patches_fit(ground, coords, attention_map.attention, size_level0)
        values = prediction.evidence
        evidence = values and EvidenceMap(
            prediction.task.signal_names,
            values.contributions,
            values.signals,
            values.reference,
            prediction.task.quantity,
            None if case is None or case.evidence is None else case.evidence.contributions,
        )
        for note in attention_map.notes:
            log.info("%s: %s", record["slide"], note)
        top_k = self._patches_of_each_kind(record["slide"], len(attention_map))
        return PictureSet(ground, folder, attention_map, attention, record, self.style, top_k, self.formats, evidence)

    def _patches_of_each_kind(self, name: str, count: int) -> int:
        """Return how many of `count` patches are shown as the most attended; no other half is shown as the least."""
        top_k = self.settings.top_k
        if 2 * top_k <= count:
            return top_k
        most, least = count - count // 2, count // 2
        log.info(
            "%s: the %d most and the %d least attended patches are shown, not %d of each, as it has %d",
            name, most, least, top_k, count,
        )  # fmt: skip
        return most
