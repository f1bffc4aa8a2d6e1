"""Encode the planned patches of a slide batch by batch: read them, drop bad ones, embed the others."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from utils.core.cli import is_flag
from utils.core.device import set_tf32
from utils.core.errors import FeatureFileError, SlideError
from utils.core.runtime import log, processors, progress_bar
from utils.features.backbones import Backbone
from utils.features.settings import Extraction
from utils.slides.patching import PatchPlan, read_batches
from utils.slides.quality import DAMAGED, no_reasons, patch_quality
from utils.slides.slide import Slide

# A slide's own bar appears only if the slide takes longer than this.
_BAR_DELAY_SECONDS = 3


class Encoder:
    """A backbone on its device, fed as the settings say; `stop` ends the work at the next batch."""

    def __init__(
        self,
        config: Extraction,
        backbone: Backbone,
        amp_dtype: torch.dtype | None,
        uses_tf32: bool,
        stop: threading.Event,
    ) -> None:
        self.config, self.backbone, self.amp_dtype, self.stop = config, backbone, amp_dtype, stop
        self.uses_tf32 = uses_tf32
        self.device = backbone.device
        self._max_batch = config.batch_size  # less once the device's memory has run out

    def encode(self, slide: Slide, plan: PatchPlan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each batch of B patches, in the plan's order, the features `(n, D)` of the patches that are kept
        and the reasons `(B,)` why the others are dropped, "" for those that are kept.
        """
        config, on_gpu = self.config, self.device.type == "cuda"
        set_tf32(self.device, self.uses_tf32)
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
                good = patches[torch.from_numpy(reasons == "")] if reasons.any() else patches
                features = self._embed(good).cpu().numpy().astype(config.dtype)
                if not np.isfinite(features).all():
                    command = "" if is_flag("dtype") else "extractFeatures.py with "
                    raise FeatureFileError(
                        f"{slide.path}: the backbone gave features that are not finite in {config.dtype}; "
                        f"try {command}--dtype float32, or --precision fp32"
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
        """Return patches per second, from a trial on two batches of a slide; the first is not counted."""
        few = replace(plan, coords=plan.coords[: 2 * self.config.batch_size])
        counts, times = [], [time.perf_counter()]
        for _, reasons in self.encode(slide, few):
            counts.append(len(reasons))
            times.append(time.perf_counter())
        return counts[-1] / (times[-1] - times[-2])

    def _embed(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the features of a batch; if the device runs out of memory, halve the batch size from then on."""
        features, start = [], 0
        while start < len(patches):
            batch = patches[start : start + self._max_batch]
            try:
                with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                    features.append(self.backbone.embed(batch))
                start += len(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise SlideError(
                        f"--device {self.device}: its memory does not hold the backbone with a single patch; "
                        "free some of it, or give another device"
                    ) from None
                self._max_batch = len(batch) // 2
                log.warning("%s: out of memory; going on with batches of %d", self.device, self._max_batch)
                torch.cuda.empty_cache()
        return torch.cat(features) if features else torch.empty(0, self.backbone.dim)
