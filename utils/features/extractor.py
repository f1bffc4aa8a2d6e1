"""WSIFeatureExtractor: a slide's patches through a backbone into a feature file with its passport.

extractor = WSIFeatureExtractor(backbone="resnet50", patch_size=256)
result = extractor.process("slide.svs", save_path="slide.h5")
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from utils.bags.store import Bag, BagInfo, bag_writer, check_writable, peek_bag, write_bag
from utils.core.device import amp_dtype, resolve_device
from utils.core.differences import differences, first_differences
from utils.core.errors import BackboneError, FeatureFileError, NoTissueError, RecipeError, SlideError
from utils.core.passport import Passport
from utils.core.recipe import OUR_FIELDS, Recipe
from utils.core.runtime import keep_freed_memory, log, processors, progress_bar, versions
from utils.features.backbones import Backbone, canonical_backbone, load_backbone
from utils.features.settings import Extraction
from utils.slides.batch import SlideNotes
from utils.slides.contours import write_contours
from utils.slides.patching import PatchGrid, PatchPlan, choose_sampling, delivered_mpp, plan_patches, read_batches
from utils.slides.preview import (
    LITTLE_TISSUE,
    MAX_SIDE,
    draw_preview,
    write_preview,
)
from utils.slides.quality import DAMAGED, QUALITY_SETTINGS, no_reasons, patch_quality
from utils.slides.slide import Slide
from utils.slides.status import ANEW, KEPT_OUTLINES, OUTLINES, SlideStatus
from utils.slides.tissue import TISSUE_SETTINGS
from utils.slides.wsi import opened

# A slide's own bar appears only when the slide takes longer than this.
_BAR_DELAY_SECONDS = 3
# um/px that differ by more than this factor contradict each other.
_ALIKE = 1.05


class WSIFeatureExtractor:
    """One feature recipe; its backbone is loaded when it is first needed.

    `backbone` is a name of the registry or `timm:<model>`, with local `weights` instead of a download where given.
    Patches of `patch_size` pixels, `stride` apart, are cut from pyramid level `level` (0 where nothing is said), or
    resampled to `mpp` um/px or to `magnification` (10 / mpp); one is kept when at least `tissue_threshold` of it is
    tissue. `dtype` is the stored precision. Of several devices ("cuda:0,cuda:1") a folder makes use, a single slide of
    the first. Further settings are those of `utils.features.settings.Extraction`. Raises BackboneError, ConfigError.
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
        self.devices = [resolve_device(one) for one in device.split(",")]
        self.device = self.devices[0]
        amp_dtype(self.config.precision, self.device)
        canonical_backbone(backbone)
        if self.config.weights is not None and not self.config.weights.is_file():
            raise BackboneError(f"{self.config.weights}: no such weights file; check the path")
        # Set from another thread, it ends what is being extracted at the next batch.
        self.stop = threading.Event()
        self._most_at_once = batch_size

    def on(self, device: torch.device) -> Self:
        """The same recipe on another device, stopped by the same event."""
        other = type(self).of_config(replace(self.config, device=str(device)))
        other.stop = self.stop
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process it is its settings, and loads its backbone there."""
        return type(self).of_config, (self.config,)

    @cached_property
    def backbone(self) -> Backbone:
        """The network, loaded when it is first needed: what is wrong with the slides shows before."""
        keep_freed_memory()
        backbone = load_backbone(self.config.backbone, self.config.weights).to(self.device)
        log.info("Backbone %s (%d features) on %s", backbone.name, backbone.dim, self.device)
        return backbone

    @classmethod
    def of_config(cls, config: Extraction) -> Self:
        return cls(**vars(config))

    @classmethod
    def of_recipe(cls, recipe: Recipe, *, weights: Path | None, batch_size: int, device: str) -> Self:
        """Return the extractor that makes features by the recipe, whose backbone's `weights` may be a local file.

        Raises BackboneError when the weights at hand are not the recipe's, RecipeError for an incomplete recipe.
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
        """What the backbone computes in where it is not single precision."""
        return amp_dtype(self.config.precision, self.device, self.backbone.precision)

    @cached_property
    def recipe(self) -> Recipe:
        """What makes features comparable; the passport's `recipe`."""
        config = self.config
        return Recipe(
            backbone=self.backbone.name,
            weights_digest=self.backbone.weights_digest,
            transform=self.backbone.transform.as_dict(),
            precision=str(self.amp_dtype or torch.float32).removeprefix("torch."),
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
        """Extract one slide: `features (N, D)`, `coords (N, 2)` level-0 top-left, and `metadata` (the passport).

        With `save_path` (`.h5` or `.pt`) also writes the feature file. Raises SlideError, NoTissueError.
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
            parts, reasons = zip(*self.encode(slide, plan), strict=True)
            found = Extracted.of(plan, reasons)
            found.conclude(slide)
            return Bag(np.concatenate(parts), found.coords, plan.patch_size_level0, self.passport(slide, found))

    def extract_to(self, wsi: Path | Slide, target: Path, told: SlideNotes | None = None) -> "Extracted":
        """Extract one slide into a feature file, in memory that does not grow with it, knowing what the user told.

        Raises as `process` does.
        """
        told = told or SlideNotes()
        with self.opened(wsi, told.mpp) as slide:
            plan = self.plan(slide, told)
            if told.save_tissue is not None and plan.tissue is not None:
                write_contours(told.save_tissue, plan.tissue, slide)
            reasons = []
            with bag_writer(target, self.backbone.dim, self.config.dtype) as writer:
                for features, why_not in self.encode(slide, plan):
                    writer.append(features)
                    reasons.append(why_not)
                found = Extracted.of(plan, reasons)
                found.conclude(slide, told.preview)
                writer.finish(found.coords, plan.patch_size_level0, self.passport(slide, found))
        return found

    @contextmanager
    def opened(self, wsi: Path | Slide, mpp: float | None = None) -> Iterator[Slide]:
        """Open a slide as `wsi.opened` does, to be read past damage where the settings say so."""
        with opened(wsi, mpp) as slide:
            slide.reads_past_damage = self.config.skip_damaged
            yield slide

    def plan(self, slide: Slide, told: SlideNotes | None = None) -> PatchPlan:
        """Which patches of a slide to read.

        Raises NoTissueError where there is none, with the preview to show it, and as `plan_patches` does.
        """
        config, told = self.config, told or SlideNotes()
        if (
            slide.told_mpp
            and slide.own_mpp
            and max(slide.told_mpp, slide.own_mpp) > _ALIKE * min(slide.told_mpp, slide.own_mpp)
        ):
            log.warning(
                "%s: its own um/px, %.4g, contradicts the %.4g given for it, which is used",
                slide.path, slide.own_mpp, slide.told_mpp,
            )  # fmt: skip
        tissue = told.outlined(slide)
        grid = PatchGrid(
            config.patch_size, config.stride, config.level, config.target_mpp, config.allow_upsample,
            config.tissue_threshold, keep_edge=config.edge == "keep",
        )  # fmt: skip
        plan = plan_patches(slide, grid, tissue)
        if not len(plan):
            Extracted.of(plan, []).conclude(slide, told.preview)
        return plan

    def delivered_mpp(self, wsi: Path | Slide, mpp: float | None = None) -> float | None:
        """um per px that a slide's patches would have, None where its own (`mpp`, where told) is unknown; no patch is
        looked for.

        Raises SlideError, as `plan` does.
        """
        config = self.config
        asked = config.patch_size, config.level, config.target_mpp, config.allow_upsample
        with opened(wsi, mpp) as slide:
            return delivered_mpp(slide, choose_sampling(slide, *asked), config.target_mpp)

    def passport(self, slide: Slide, found: "Extracted") -> Passport:
        record = _slide_record(slide, found.plan)
        if self.config.qc or found.dropped:
            record["dropped"] = found.dropped
        return Passport(self.recipe, record, versions())

    def encode(self, slide: Slide, plan: PatchPlan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batch by batch, in the plan's order: of B patches the features `(n, D)` of those that are kept, and `(B,)`
        why each is not, "" for those.
        """
        config, on_gpu = self.config, self.device.type == "cuda"
        workers = processors() if config.num_workers == "auto" else config.num_workers
        bar = progress_bar(slide.name, len(plan), unit="patch", leave=False, delay=_BAR_DELAY_SECONDS)
        damage: dict[int, SlideError] = {}
        batches = read_batches(
            slide, plan, config.batch_size, workers=workers, pin_memory=on_gpu,
            on_damage=damage.__setitem__ if config.skip_damaged else None,
        )  # fmt: skip
        start = 0
        with bar, closing(batches):
            for patches in batches:
                if self.stop.is_set():
                    raise KeyboardInterrupt
                reasons = patch_quality(patches.numpy(), plan.mpp) if config.qc else no_reasons(len(patches))
                reasons[[number - start for number in list(damage) if start <= number < start + len(patches)]] = DAMAGED
                start += len(patches)
                kept = patches[torch.from_numpy(reasons == "")] if reasons.any() else patches
                features = self._embed(kept).cpu().numpy().astype(config.dtype)
                if not np.isfinite(features).all():
                    raise FeatureFileError(
                        f"{slide.path}: the backbone gave features that are not finite in {config.dtype}; "
                        "try --dtype float32, or --precision fp32"
                    )
                if on_gpu:
                    bar.set_postfix_str(f"{torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB", refresh=False)
                bar.update(len(patches))
                yield features, reasons
        if damage:
            first = damage[min(damage)]
            log.warning("%s: %d of %d patches cannot be read, and are dropped; the first: %s", slide.path, len(damage),
                        len(plan), str(first).removeprefix(f"{slide.path}: "))  # fmt: skip

    def rate(self, slide: Slide, plan: PatchPlan) -> float:
        """Patches per second, tried on two batches of a slide; the first is not counted."""
        few = replace(plan, coords=plan.coords[: 2 * self.config.batch_size])
        counts, times = [], [time.perf_counter()]
        for _, reasons in self.encode(slide, few):
            counts.append(len(reasons))
            times.append(time.perf_counter())
        return counts[-1] / (times[-1] - times[-2])

    def _embed(self, patches: torch.Tensor) -> torch.Tensor:
        """Features of a batch; where the device's memory does not hold it, of half as many at once from then on."""
        parts, start = [], 0
        while start < len(patches):
            part = patches[start : start + self._most_at_once]
            try:
                parts.append(self._embed_at_once(part))
                start += len(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise SlideError(
                        f"--device {self.device}: its memory does not hold the backbone with a single patch; "
                        "free some of it, or give another device"
                    ) from None
                self._most_at_once = len(part) // 2
                log.warning("%s: out of memory; going on with batches of %d", self.device, self._most_at_once)
                torch.cuda.empty_cache()
        return torch.cat(parts) if parts else torch.empty(0, self.backbone.dim)

    def _embed_at_once(self, patches: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.backbone.embed(patches)


@dataclass(frozen=True, eq=False)
class Extracted:
    """What of a plan's M patches became features, by `reasons (M,)` why one was dropped, "" for the N that were not."""

    plan: PatchPlan
    reasons: np.ndarray

    @classmethod
    def of(cls, plan: PatchPlan, reasons: Sequence[np.ndarray]) -> Self:
        """Of the reasons batch by batch."""
        return cls(plan, np.concatenate([np.empty(0, dtype=str), *reasons]))

    def conclude(self, slide: Slide, preview: Path | None = None) -> None:
        """Draw the preview, where one is wanted; then raise NoTissueError unless a patch is left."""
        if preview is not None:
            write_preview(preview, self.drawn(slide))
        if not len(self.coords):
            dropped = f"{slide.path}: {_dropped_words(self.dropped)}, which is all; leave the slide out"
            raise NoTissueError(self.plan.shortage or dropped)

    @property
    def coords(self) -> np.ndarray:
        """(N, 2) level-0 px of the patches that were kept."""
        return self.plan.coords[self.reasons == ""]

    @property
    def dropped(self) -> dict[str, int]:
        """How many patches, by reason."""
        names, counts = np.unique(self.reasons[self.reasons != ""], return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))

    def drawn(self, slide: Slide) -> Image.Image:
        """The slide with its tissue, and the patches that were kept and dropped."""
        plan = self.plan
        places, chosen = (corners[:, 1] * slide.width + corners[:, 0] for corners in (plan.grid, plan.coords))
        little = plan.grid[~np.isin(places, chosen)]
        dropped = {reason: plan.coords[self.reasons == reason] for reason in self.dropped}
        resolution = "" if plan.mpp is None else f" at {plan.mpp:.3g} um/px"
        area = slide.scanned
        corner, size = np.array(area[:2]), np.array(area[2:])

        def within(places: np.ndarray) -> np.ndarray:
            """Corners as counted from the area's, of the patches that reach into it."""
            moved = places - corner
            return moved[((moved > -plan.patch_size_level0) & (moved < size)).all(axis=1)]

        return draw_preview(
            slide.thumbnail(max_side=MAX_SIDE, area=area),
            area[2:],
            kept=within(self.coords),
            dropped={reason: within(places) for reason, places in ({LITTLE_TISSUE: little} | dropped).items()},
            size_level0=plan.patch_size_level0,
            mask=None if plan.tissue is None else plan.tissue.within(area, (slide.width, slide.height)),
            mpp=slide.mpp,
            title=f"{slide.name}: {len(self.coords):,} patches of {plan.patch_size} px{resolution}",
        )


def extract_one(
    extractor: WSIFeatureExtractor,
    slide: Path | Slide,
    target: Path,
    overwrite: bool = False,
    told: SlideNotes | None = None,
) -> SlideStatus:
    """Make sure that `target` holds the features of `slide`: extract them unless they are there, by the same recipe and
    of the same tissue. A slide that is open stays open.

    Raises SlideError, NoTissueError, and RecipeError when `target` holds something else and `overwrite` is not given.
    """
    told, is_mended = told or SlideNotes(), False
    if target.exists() and not overwrite:
        current = current_status(extractor, slide, target, told)
        if current is not None:
            return current
        is_mended = True
    started = time.perf_counter()
    found = extractor.extract_to(slide, target, told)
    seconds = round(time.perf_counter() - started, 2)
    reasons = [ANEW] if is_mended else []
    reasons += [_dropped_words(found.dropped)] if found.dropped else []
    tissue = OUTLINES if found.plan.outlines_digest else ""
    path = slide.path if isinstance(slide, Slide) else slide
    return SlideStatus(path, "done", "; ".join(reasons), len(found.coords), found.plan.mpp, seconds, tissue=tissue)


def current_status(
    extractor: WSIFeatureExtractor, slide: Path | Slide, target: Path, told: SlideNotes
) -> SlideStatus | None:
    """The status of a slide whose features are there; None where they are of other tissue than is told.

    Raises RecipeError where `target` holds something else.
    """
    info, is_same_tissue = _check_current(extractor, slide, target, told)
    if not is_same_tissue:
        return None
    record = info.passport.slide if info.passport else {}
    reasons = [f"{target} is there, of the same recipe"]
    if record.get("tissue") and told.tissue is None:
        reasons.append(KEPT_OUTLINES)
    reasons += [_dropped_words(record["dropped"])] if record.get("dropped") else []
    path = slide.path if isinstance(slide, Slide) else slide
    return SlideStatus(
        path, "skipped", "; ".join(reasons), info.num_instances, record.get("mpp_delivered"),
        tissue=OUTLINES if record.get("tissue") else "",
    )  # fmt: skip


def _dropped_words(dropped: Mapping[str, int]) -> str:
    """Return how many patches `--qc` dropped and why, and how many could not be read."""
    judged = {reason: count for reason, count in dropped.items() if reason != DAMAGED}
    parts = [f"--qc dropped {_by_reason(judged)}"] if judged else []
    return "; ".join([*parts, *([f"{dropped[DAMAGED]} cannot be read"] if DAMAGED in dropped else [])])


def _by_reason(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items())


def _check_current(
    extractor: WSIFeatureExtractor, slide: Path | Slide, target: Path, told: SlideNotes
) -> tuple[BagInfo, bool]:
    """What `target` holds, and whether it is of the tissue that the outlines show, if there are any.

    Raises RecipeError unless it is this slide's features by this recipe. Our own files are always complete, so anything
    else belongs to the user and is not overwritten.
    """
    try:
        info = peek_bag(target)
    except FeatureFileError as error:
        raise RecipeError(f"{error}; is in the way: move it, or extract with --overwrite") from error
    if info.passport is None:
        raise RecipeError(
            f"{target}: was made by something else (it holds no recipe); move it, or extract with --overwrite"
        )
    recorded = {name: info.passport.slide.get(name) for name in ("quick_hash", "mpp", "data_hash")}
    with extractor.opened(slide, told.mpp) as opened:
        now = {"quick_hash": opened.quick_hash(), "mpp": opened.mpp}
        now["data_hash"] = recorded["data_hash"] and opened.data_hash()  # older files do not record it
        unlike = _differences(extractor, info.passport.recipe.as_dict(), recorded, now)
        if unlike:
            is_other_data = any(recorded[name] != now[name] for name in ("quick_hash", "data_hash"))
            why = "the slide's data has changed since it was made" if is_other_data else "made with another recipe"
            raise RecipeError(f"{target}: {why} ({first_differences(unlike)}); move it, or extract with --overwrite")
        return info, told.is_same_tissue(opened, info.passport.slide.get("tissue"))


def _differences(
    extractor: WSIFeatureExtractor, recipe: Mapping[str, Any], recorded: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    """What differs between a file's `recipe` and the extractor's, and what is `recorded` of the slide and what it is
    `now`.
    """
    found, wanted = ({f"slide's {name}": value for name, value in about.items()} for about in (recorded, now))
    found, wanted = {**recipe, **found}, {**extractor.recipe.as_dict(), **wanted}
    if extractor.config.precision == "auto":
        # What is each device's own: a batch that goes on elsewhere is the same batch.
        wanted["precision"] = found.get("precision")
    for settings in (found, wanted):
        settings["edge"] = settings.get("edge") or "drop"  # as the flag has it
    return differences(wanted, found, wanted, strict=True)


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
        "data_hash": slide.data_hash(),
        "patch_size_level0": plan.patch_size_level0,
        "stride_level0": plan.stride_level0,
        "tissue": plan.outlines_digest,
    }
