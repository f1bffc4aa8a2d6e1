"""WSIFeatureExtractor: a slide's patches through a backbone into a feature file with its passport.

extractor = WSIFeatureExtractor(backbone="resnet50", patch_size=256)
result = extractor.process("slide.svs", save_path="slide.h5")
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from utils.bags.store import Bag, peek_bag, write_bag
from utils.core.config import Extraction, ExtractionFiles
from utils.core.errors import (
    BackboneError,
    ConfigError,
    FeatureFileError,
    LiteMILError,
    NoTissueError,
    RecipeError,
    SlideError,
)
from utils.core.files import check_distinct, write_records
from utils.core.passport import Passport, recipe_differences
from utils.core.runtime import log, progress, progress_bar, resolve_device, versions
from utils.slides.backbones import Backbone, canonical_backbone, load_backbone
from utils.slides.patching import PatchPlan, plan_patches, read_patches
from utils.slides.tissue import TISSUE_SETTINGS
from utils.slides.wsi import Slide, find_slides, open_slide

REPORT = "extraction_report.csv"
# A slide's own bar appears only when the slide takes longer than this.
_BAR_DELAY_SECONDS = 3


class WSIFeatureExtractor:
    """One feature recipe; its backbone is loaded when it is first needed.

    `backbone` is `resnet50`, `phikon-v2`, `uni` or `timm:<model>`, with local `weights` instead of a download where
    given; `patch_size` and `stride` are pixels at pyramid level `level`; a patch is kept when at least
    `tissue_threshold` of it is tissue; `dtype` is the stored precision. Raises BackboneError, ConfigError.
    """

    def __init__(
        self,
        backbone: str = Extraction.backbone,
        patch_size: int = Extraction.patch_size,
        stride: int | None = Extraction.stride,
        level: int = Extraction.level,
        tissue_threshold: float = Extraction.tissue_threshold,
        batch_size: int = Extraction.batch_size,
        device: str = Extraction.device,
        *,
        weights: str | Path | None = Extraction.weights,
        dtype: str = Extraction.dtype,
    ) -> None:
        self.config = Extraction(
            backbone=backbone, patch_size=patch_size, stride=stride, level=level, tissue_threshold=tissue_threshold,
            batch_size=batch_size, device=device, weights=Path(weights) if weights else None, dtype=dtype,  # type: ignore[arg-type]
        )  # fmt: skip
        self.device = resolve_device(device)
        canonical_backbone(backbone)
        if self.config.weights is not None and not self.config.weights.is_file():
            raise BackboneError(f"{self.config.weights}: no such weights file; check the path")

    @cached_property
    def backbone(self) -> Backbone:
        """The network, loaded when it is first needed: what is wrong with the slides shows before."""
        backbone = load_backbone(self.config.backbone, self.config.weights).to(self.device)
        log.info("Backbone %s (%d features) on %s", backbone.name, backbone.dim, self.device)
        return backbone

    @classmethod
    def of_config(cls, config: Extraction) -> Self:
        return cls(**vars(config))

    @classmethod
    def of_recipe(cls, recipe: dict[str, Any], *, weights: Path | None, batch_size: int, device: str) -> Self:
        """The extractor that makes features the way `recipe` (a passport's) says.

        Raises BackboneError when the weights at hand are not the recipe's, RecipeError for an incomplete recipe.
        """
        needed = ("backbone", "patch_size", "stride", "level", "tissue_threshold", "dtype")
        missing = [name for name in needed if recipe.get(name) is None]
        if missing:
            raise RecipeError(
                f"the training features' recipe does not say {', '.join(missing)}; give it "
                f"({', '.join('--' + name for name in missing)}), or extract the slide yourself"
            )
        extractor = cls(
            recipe["backbone"], recipe["patch_size"], recipe["stride"], recipe["level"], recipe["tissue_threshold"],
            batch_size, device, weights=weights, dtype=recipe["dtype"],
        )  # fmt: skip
        differences = recipe_differences(recipe, extractor.recipe, ("weights_digest", "transform"))
        if differences:
            raise BackboneError(
                f"{weights or recipe['backbone']}: not the backbone of the training features "
                f"({'; '.join(differences)}); give its weights with --weights"
            )
        changed = recipe_differences(recipe, extractor.recipe, ("tissue", "precision"))
        if changed:
            log.warning("the training features were made by other settings of this tool: %s", "; ".join(changed))
        return extractor

    @property
    def recipe(self) -> dict[str, Any]:
        """What makes features comparable; the passport's `recipe`."""
        config = self.config
        return {
            "backbone": self.backbone.name,
            "weights_digest": self.backbone.weights_digest,
            "transform": self.backbone.transform.as_dict(),
            "precision": "float32",
            "dtype": config.dtype,
            "patch_size": config.patch_size,
            "stride": config.stride or config.patch_size,
            "level": config.level,
            "tissue_threshold": config.tissue_threshold,
            "tissue": TISSUE_SETTINGS.as_dict(),
        }

    def process(self, wsi_path: str | Path, save_path: str | Path | None = None) -> dict[str, Any]:
        """Extract one slide: `features (N, D)`, `coords (N, 2)` level-0 top-left, and `metadata` (the passport).

        With `save_path` (`.h5` or `.pt`) also writes the feature file. Raises SlideError, NoTissueError.
        """
        bag = self.extract(Path(wsi_path))
        if save_path is not None:
            write_bag(Path(save_path), bag)
        assert bag.passport is not None  # noqa: S101 - for the type checker: `extract` makes one
        passport = bag.passport
        metadata = {"recipe": passport.recipe, "slide": passport.slide, "software": passport.software}
        return {
            "features": bag.features,
            "coords": bag.coords,
            "metadata": metadata | {"num_patches": len(bag.features)},
        }

    def extract(self, wsi_path: Path) -> Bag:
        """One slide's bag, with coordinates and passport."""
        config = self.config
        with open_slide(wsi_path) as slide:
            plan = plan_patches(
                slide, patch_size=config.patch_size, stride=config.stride, level=config.level,
                tissue_threshold=config.tissue_threshold,
            )  # fmt: skip
            features = self._encode(slide, plan)
            passport = Passport(self.recipe, _slide_record(slide, plan), versions())
        return Bag(features, plan.coords, plan.patch_size_level0, passport)

    def _encode(self, slide: Slide, plan: PatchPlan) -> np.ndarray:
        features = np.empty((len(plan.coords), self.backbone.dim), dtype=self.config.dtype)
        bar = progress_bar(slide.name, len(features), unit="patch", leave=False, delay=_BAR_DELAY_SECONDS)
        with bar:
            for start, patches in _batches(slide, plan, self.config.batch_size):
                encoded = self.backbone.embed(patches).cpu().numpy()
                features[start : start + len(patches)] = encoded
                bar.update(len(patches))
        if not np.isfinite(features).all():
            raise FeatureFileError(
                f"{slide.path}: the backbone gave features that are not finite in {self.config.dtype}; "
                "try --dtype float32"
            )
        return features


@dataclass(frozen=True)
class SlideStatus:
    """What became of one slide: "done", "skipped" (its features are there), "no tissue" or "failed", and why."""

    slide: Path
    status: str
    reason: str = ""
    patches: int | None = None
    mpp: float | None = None
    seconds: float | None = None


def extract_slides(extractor: WSIFeatureExtractor, files: ExtractionFiles) -> list[SlideStatus]:
    """Extract a slide or a folder of them, skip what is there, go on past a bad slide.

    For a folder, also writes `extraction_report.csv`. Raises for a single slide that fails, ConfigError for slides
    that would share an output file.
    """
    if files.input is not None:
        if not files.input.is_file():
            raise SlideError(f"{files.input}: no such file; give a slide, or --input_dir for a folder")
        return [extract_one(extractor, files.input, _targets([files.input], files)[files.input], files.overwrite)]
    assert files.input_dir is not None and files.output_dir is not None  # noqa: S101, PT018 - checked by the config
    targets = _targets(_slides_in(files), files)
    _ = extractor.backbone  # a backbone that cannot be had is no slide's fault
    statuses = []
    bar = progress(targets.items(), "Slides", unit="slide")
    for slide, target in bar:
        bar.set_postfix_str(slide.name, refresh=False)
        statuses.append(_guarded(extractor, slide, target, files.overwrite))
    write_records(files.output_dir / REPORT, statuses)
    return statuses


def _slides_in(files: ExtractionFiles) -> list[Path]:
    assert files.input_dir is not None  # noqa: S101 - for the type checker
    found = find_slides(files.input_dir, files.extensions)
    if not found:
        endings = " ".join(files.extensions) if files.extensions else "a slide's ending"
        raise ConfigError(f"{files.input_dir}: no file with {endings} in it; name the endings with --extensions")
    return found[: files.limit]


def _targets(slides: Sequence[Path], files: ExtractionFiles) -> dict[Path, Path]:
    """Each slide's feature file; two slides of one name would overwrite each other."""
    targets = {
        slide: files.output or (files.output_dir or slide.parent) / f"{slide.stem}.{files.format or 'h5'}"
        for slide in slides
    }
    check_distinct(targets)
    return targets


def _guarded(extractor: WSIFeatureExtractor, slide: Path, target: Path, overwrite: bool) -> SlideStatus:
    try:
        return extract_one(extractor, slide, target, overwrite)
    except LiteMILError as error:
        log.error("%s", error)
        return SlideStatus(slide, "no tissue" if isinstance(error, NoTissueError) else "failed", str(error))


def extract_one(extractor: WSIFeatureExtractor, slide: Path, target: Path, overwrite: bool = False) -> SlideStatus:
    """Make sure that `target` holds the features of `slide`: extract them unless they are there, by the same recipe.

    Raises SlideError, NoTissueError, and RecipeError when `target` holds something else and `overwrite` is not given.
    """
    if target.exists() and not overwrite:
        _check_current(extractor, slide, target)
        return SlideStatus(slide, "skipped", f"{target} is there, of the same recipe")
    started = time.perf_counter()
    bag = extractor.extract(slide)
    write_bag(target, bag)
    mpp = bag.passport.slide["mpp_delivered"] if bag.passport else None
    return SlideStatus(slide, "done", "", len(bag.features), mpp, round(time.perf_counter() - started, 2))


def _check_current(extractor: WSIFeatureExtractor, slide: Path, target: Path) -> None:
    """Raise RecipeError unless `target` holds this slide's features by this recipe: since our own files are whole,
    anything else is somebody's, and not overwritten unasked.
    """
    try:
        passport = peek_bag(target).passport
    except FeatureFileError as error:
        raise RecipeError(f"{error}; is in the way: move it, or extract with --overwrite") from error
    if passport is None:
        raise RecipeError(
            f"{target}: was made by something else (it holds no recipe); move it, or extract with --overwrite"
        )
    with open_slide(slide) as opened:
        found = passport.recipe | {"slide": passport.slide.get("quick_hash")}
        wanted = extractor.recipe | {"slide": opened.quick_hash()}
    differences = recipe_differences(wanted, found, wanted, strict=True)
    if differences:
        raise RecipeError(
            f"{target}: made with another recipe ({'; '.join(differences)}); move it, or extract with --overwrite"
        )


def _batches(slide: Slide, plan: PatchPlan, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """`(start, patches (B, P, P, 3) uint8)` in the plan's order."""
    patches: list[np.ndarray] = []
    start = 0
    for patch in read_patches(slide, plan):
        patches.append(patch)
        if len(patches) == batch_size:
            yield start, np.stack(patches)
            start += batch_size
            patches = []
    if patches:
        yield start, np.stack(patches)


def _slide_record(slide: Slide, plan: PatchPlan) -> dict[str, Any]:
    return {
        "name": slide.name,
        "width": slide.width,
        "height": slide.height,
        "mpp": slide.mpp,
        "mpp_delivered": plan.mpp,
        "objective": slide.objective,
        "vendor": slide.vendor,
        "bounds": list(slide.bounds) if slide.bounds else None,
        "quick_hash": slide.quick_hash(),
        "patch_size_level0": plan.patch_size_level0,
        "stride_level0": plan.stride_level0,
    }


def summary(statuses: Sequence[SlideStatus]) -> str:
    """The closing lines of an extraction."""
    counts = {
        name: sum(status.status == name for status in statuses) for name in ("done", "skipped", "no tissue", "failed")
    }
    patches = sum(status.patches or 0 for status in statuses)
    lines = [
        f"{counts['done']} extracted ({patches} patches), "
        + ", ".join(f"{counts[name]} {name}" for name in list(counts)[1:])
    ]
    unknown = sum(status.status == "done" and status.mpp is None for status in statuses)
    if unknown:
        lines.append(f"{unknown} of the extracted slides have no known um/px; it is recorded as unknown")
    return "\n".join(lines)
