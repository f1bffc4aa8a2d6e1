"""WSIFeatureExtractor: a slide's patches through a backbone into a feature file with its passport.

extractor = WSIFeatureExtractor(backbone="resnet50", patch_size=256)
result = extractor.process("slide.svs", save_path="slide.h5")
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from utils.bags.store import Bag, bag_writer, check_writable, write_bag
from utils.core.device import amp_dtype, resolve_device, uses_tf32
from utils.core.differences import first_differences
from utils.core.errors import BackboneError
from utils.core.passport import Passport
from utils.core.recipe import OUR_FIELDS, Recipe
from utils.core.runtime import keep_freed_memory, log, versions
from utils.features.backbones import Backbone, canonical_backbone, load_backbone
from utils.features.encoding import Encoder
from utils.features.extracted_patches import Extracted, slide_record
from utils.features.settings import Extraction
from utils.slides.batch import SlideNotes
from utils.slides.contours import write_contours
from utils.slides.open_slides import opened
from utils.slides.patching import PatchGrid, PatchPlan, choose_sampling, delivered_mpp, plan_patches
from utils.slides.quality import QUALITY_SETTINGS
from utils.slides.slide import Slide
from utils.slides.tissue import TISSUE_SETTINGS

# um/px that differ by more than this factor contradict each other.
_ALIKE = 1.05


class WSIFeatureExtractor:
    """Extracts features with one recipe; its backbone is loaded when it is first needed.

    `backbone` is a name of the registry or `timm:<model>`; local `weights` replace the download. Patches of
    `patch_size` pixels, `stride` apart, are cut from pyramid level `level` (default 0), or resampled to `mpp` um/px or
    to `magnification` (10 / mpp); a patch is kept if at least `tissue_threshold` of it is tissue. `dtype` is the stored
    precision. A folder uses all of several devices ("cuda:0,cuda:1"), a single slide the first. Further settings are
    those of `utils.features.settings.Extraction`. Raises BackboneError, ConfigError.
    """

    def __init__(
        self,
        backbone: str = Extraction.backbone,
        patch_size: int = Extraction.patch_size,
        stride: int | None = Extraction.stride,
        level: int | None = Extraction.level,
        tissue_threshold: float = Extraction.tissue_threshold,
        batch_size: int = Extraction.batch_size,
        device: str = Extraction.device,
        *,
        weights: str | Path | None = Extraction.weights,
        dtype: str = Extraction.dtype,
        **settings: Any,
    ) -> None:
        self.config = Extraction(
            backbone=backbone, patch_size=patch_size, stride=stride, level=level, tissue_threshold=tissue_threshold,
            batch_size=batch_size, device=device, weights=Path(weights) if weights else None, dtype=dtype,  # type: ignore[arg-type]
            **settings,
        )  # fmt: skip
        self.devices = [resolve_device(name) for name in device.split(",")]
        self.device = self.devices[0]
        amp_dtype(self.config.precision, self.device)
        canonical_backbone(backbone)
        if self.config.weights is not None and not self.config.weights.is_file():
            raise BackboneError(f"{self.config.weights}: no such weights file; check the path")
        # Set from another thread, it ends an extraction at the next batch.
        self.stop = threading.Event()

    def on(self, device: torch.device) -> Self:
        """Return an extractor with the same recipe on another device, stopped by the same event."""
        extractor = type(self).of_config(replace(self.config, device=str(device)))
        extractor.stop = self.stop
        return extractor

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings alone; another process loads the backbone itself."""
        return type(self).of_config, (self.config,)

    @cached_property
    def backbone(self) -> Backbone:
        """The network, loaded when it is first needed, so that wrong slides are reported before."""
        keep_freed_memory()
        backbone = load_backbone(self.config.backbone, self.config.weights).to(self.device)
        log.info("Backbone %s (%d features) on %s", backbone.name, backbone.dim, self.device)
        return backbone

    @classmethod
    def of_config(cls, config: Extraction) -> Self:
        return cls(**vars(config))

    @classmethod
    def of_recipe(cls, recipe: Recipe, *, weights: Path | None, batch_size: int, device: str) -> Self:
        """Return the extractor of a recipe; `weights` may be a local file with its backbone's weights.

        Raises BackboneError if the weights at hand are not the recipe's, RecipeError for an incomplete recipe.
        """
        extractor = cls(**recipe.settings(), weights=weights, batch_size=batch_size, device=device)
        unlike = recipe.differences(extractor.recipe, ("weights_digest", "transform"))
        if unlike:
            raise BackboneError(
                f"{weights or recipe.backbone}: not the backbone of the training features "
                f"({first_differences(unlike)}); give its weights with --weights"
            )
        changed = recipe.differences(extractor.recipe, ("tissue", "precision", "qc"))
        if changed:
            log.warning("the training features were made by other settings of this tool: %s", "; ".join(changed))
        return extractor

    @cached_property
    def amp_dtype(self) -> torch.dtype | None:
        """What the backbone computes in, None for single precision."""
        return amp_dtype(_precision_of(self), self.device, self.backbone.precision)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, by which features are compared; the passport holds it."""
        config = self.config
        return Recipe(
            backbone=self.backbone.name,
            weights_digest=self.backbone.weights_digest,
            transform=self.backbone.transform.as_dict(),
            precision=str(self.amp_dtype or ("tf32" if _uses_tf32(self) else torch.float32)).removeprefix("torch."),
            dtype=config.dtype,
            patch_size=config.patch_size,
            stride=config.stride or config.patch_size,
            level=None if config.target_mpp else config.level or 0,
            mpp=config.target_mpp,
            tissue_threshold=config.tissue_threshold,
            tissue=TISSUE_SETTINGS.as_dict(),
            qc=QUALITY_SETTINGS.as_dict() if config.qc else None,
            edge=None if config.edge == "drop" else config.edge,  # older files do not record it
            recorded=OUR_FIELDS,
        )

    def process(self, wsi_path: str | Path, save_path: str | Path | None = None) -> dict[str, Any]:
        """Extract one slide; return `features (N, D)`, `coords (N, 2)` level-0 top-left, and `metadata` (the passport).

        With `save_path` (`.h5` or `.pt`) also write the feature file. Raises SlideError, NoTissueError.
        """
        if save_path is not None:
            check_writable(Path(save_path))
        bag = self.extract(Path(wsi_path))
        if save_path is not None:
            write_bag(Path(save_path), bag)
        assert bag.passport is not None  # noqa: S101 - for the type checker: `extract` makes one
        passport = bag.passport
        metadata = {"recipe": passport.recipe.as_dict(), "slide": passport.slide, "software": passport.software}
        return {
            "features": bag.features,
            "coords": bag.coords,
            "metadata": metadata | {"num_patches": len(bag.features)},
        }

    def extract(self, wsi: Path | Slide) -> Bag:
        """Return one slide's bag, with coordinates and passport."""
        with self.opened(wsi) as slide:
            plan = self.plan(slide)
            features, reasons = zip(*self.encoder.encode(slide, plan), strict=True)
            extracted = Extracted.of(plan, reasons)
            extracted.check_not_empty(slide)
            passport = self.passport(slide, extracted)
            return Bag(np.concatenate(features), extracted.coords, plan.patch_size_level0, passport)

    def extract_to(self, wsi: Path | Slide, target: Path, notes: SlideNotes | None = None) -> Extracted:
        """Extract one slide, as the user's notes on it say, into a feature file, in memory that does not grow with it.

        Raises as `process` does.
        """
        notes = notes or SlideNotes()
        with self.opened(wsi, notes.mpp) as slide:
            plan = self.plan(slide, notes)
            if notes.save_tissue is not None and plan.tissue is not None:
                write_contours(notes.save_tissue, plan.tissue, slide)
            all_reasons = []
            with bag_writer(target, self.backbone.dim, self.config.dtype) as writer:
                for features, reasons in self.encoder.encode(slide, plan):
                    writer.append(features)
                    all_reasons.append(reasons)
                extracted = Extracted.of(plan, all_reasons)
                extracted.check_not_empty(slide, notes.preview)
                writer.finish(extracted.coords, plan.patch_size_level0, self.passport(slide, extracted))
        return extracted

    @contextmanager
    def opened(self, wsi: Path | Slide, mpp: float | None = None) -> Iterator[Slide]:
        """Open a slide as `wsi.opened` does; it is read past damage if the settings say so."""
        with opened(wsi, mpp) as slide:
            slide.reads_past_damage = self.config.skip_damaged
            yield slide

    def plan(self, slide: Slide, notes: SlideNotes | None = None) -> PatchPlan:
        """Return which patches of a slide to read.

        Raises NoTissueError if there are none, after writing the preview that shows it, and as `plan_patches` does.
        """
        config, notes = self.config, notes or SlideNotes()
        _check_user_mpp(slide)
        grid = PatchGrid(
            config.patch_size, config.stride, config.level, config.target_mpp, config.allow_upsample,
            config.tissue_threshold, keep_edge=config.edge == "keep",
        )  # fmt: skip
        plan = plan_patches(slide, grid, notes.outlined(slide))
        if not len(plan):
            Extracted.of(plan, []).check_not_empty(slide, notes.preview)
        return plan

    def delivered_mpp(self, wsi: Path | Slide, mpp: float | None = None) -> float | None:
        """Return the um per px that a slide's patches would have, without looking for patches; None if the slide's own
        is unknown. `mpp` overrides the slide's own.

        Raises SlideError, as `plan` does.
        """
        config = self.config
        resolution = config.patch_size, config.level, config.target_mpp, config.allow_upsample
        with opened(wsi, mpp) as slide:
            return delivered_mpp(slide, choose_sampling(slide, *resolution), config.target_mpp)

    def passport(self, slide: Slide, extracted: Extracted) -> Passport:
        record = slide_record(slide, extracted.plan)
        if self.config.qc or extracted.dropped:
            record["dropped"] = extracted.dropped
        return Passport(self.recipe, record, versions())

    @cached_property
    def encoder(self) -> Encoder:
        """What turns patches into features on this extractor's device."""
        return Encoder(self.config, self.backbone, self.amp_dtype, _uses_tf32(self), self.stop)


def _precision_of(extractor: WSIFeatureExtractor) -> str:
    """Return the `--precision` that holds for the extractor's backbone."""
    return "fp32" if extractor.backbone.is_exact else extractor.config.precision


def _uses_tf32(extractor: WSIFeatureExtractor) -> bool:
    """Return whether the backbone's products of float32 numbers are in TF32."""
    return uses_tf32(_precision_of(extractor), extractor.device)


def _check_user_mpp(slide: Slide) -> None:
    """Warn if the um/px that the user gives for a slide contradicts its own."""
    user, file = slide.user_mpp, slide.file_mpp
    if user and file and max(user, file) > _ALIKE * min(user, file):
        log.warning("%s: its own um/px, %.4g, contradicts the %.4g given for it, which is used", slide.path, file, user)
