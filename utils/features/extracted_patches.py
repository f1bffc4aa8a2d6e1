"""What became of a slide's patches: which were kept, and which were dropped for what reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from utils.core.errors import NoTissueError
from utils.slides.patching import PatchPlan
from utils.slides.preview import LITTLE_TISSUE, MAX_SIDE, draw_preview, write_preview
from utils.slides.quality import DAMAGED
from utils.slides.slide import Slide


@dataclass(frozen=True, eq=False)
class Extracted:
    """Which of a plan's M patches became features. `reasons (M,)` says why a patch was dropped; "" marks the N that
    were kept.
    """

    plan: PatchPlan
    reasons: np.ndarray

    @classmethod
    def of(cls, plan: PatchPlan, reasons: Sequence[np.ndarray]) -> Self:
        """Join the reasons of all batches."""
        return cls(plan, np.concatenate([np.empty(0, dtype=str), *reasons]))

    def check_not_empty(self, slide: Slide, preview: Path | None = None) -> None:
        """Raise NoTissueError unless a patch was kept; write the preview before, if a path for it is given."""
        if preview is not None:
            write_preview(preview, self.picture(slide))
        if not len(self.coords):
            dropped = f"{slide.path}: {dropped_text(self.dropped)}, which is all; leave the slide out"
            raise NoTissueError(self.plan.shortage or dropped)

    @property
    def coords(self) -> np.ndarray:
        """(N, 2) level-0 px of the patches that were kept."""
        return self.plan.coords[self.reasons == ""]

    @property
    def dropped(self) -> dict[str, int]:
        """How many patches were dropped, by reason."""
        names, counts = np.unique(self.reasons[self.reasons != ""], return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))

    def picture(self, slide: Slide) -> Image.Image:
        """Draw the slide with its tissue, and the patches that were kept and dropped."""
        plan = self.plan
        grid, tried = (corners[:, 1] * slide.width + corners[:, 0] for corners in (plan.grid, plan.coords))
        little_tissue = plan.grid[~np.isin(grid, tried)]
        dropped = {reason: plan.coords[self.reasons == reason] for reason in self.dropped}
        resolution = "" if plan.mpp is None else f" at {plan.mpp:.3g} um/px"
        area = slide.scanned
        corner, size = np.array(area[:2]), np.array(area[2:])

        def within(coords: np.ndarray) -> np.ndarray:
            """Return the corners of the patches that reach into the area, counted from the area's corner."""
            moved = coords - corner
            return moved[((moved > -plan.patch_size_level0) & (moved < size)).all(axis=1)]

        return draw_preview(
            slide.thumbnail(max_side=MAX_SIDE, area=area),
            area[2:],
            kept=within(self.coords),
            dropped={reason: within(coords) for reason, coords in ({LITTLE_TISSUE: little_tissue} | dropped).items()},
            size_level0=plan.patch_size_level0,
            mask=None if plan.tissue is None else plan.tissue.within(area, (slide.width, slide.height)),
            mpp=slide.mpp,
            title=f"{slide.name}: {len(self.coords):,} patches of {plan.patch_size} px{resolution}",
        )


def dropped_text(dropped: Mapping[str, int]) -> str:
    """Return how many patches `--qc` dropped and why, and how many could not be read."""
    by_quality = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if reason != DAMAGED)
    texts = [f"--qc dropped {by_quality}"] if by_quality else []
    return "; ".join([*texts, *([f"{dropped[DAMAGED]} cannot be read"] if DAMAGED in dropped else [])])


def slide_record(slide: Slide, plan: PatchPlan) -> dict[str, Any]:
    """Return what the passport of a feature file records of the slide and its patches."""
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
