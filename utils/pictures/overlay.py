"""Attention drawn over a slide's overview: each patch at its exact footprint, overlaps averaged."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from utils.core.errors import ConfigError, did_you_mean
from utils.core.settings import check_setting
from utils.core.text import multiple_text
from utils.pictures.attention_map import UNIFORM_REASON, AttentionMap
from utils.pictures.settings import Pictures

GREY = (0.6, 0.6, 0.6)  # of patches without a rank: in no colour map that is readable in print

_MOST_DOUBLINGS = 10  # of uniform attention, at either end of the logarithmic scale


@dataclass(frozen=True)
class Picture:
    """A slide's overview to draw on: `thumbnail (h, w, 3)` uint8 of an area of `width` x `height` level-0 px from
    `corner` (x, y) on; `mpp` um per level-0 px, or None. `is_blank` if the slide is not at hand.
    """

    thumbnail: NDArray[np.uint8]
    width: int
    height: int
    mpp: float | None
    corner: tuple[int, int] = (0, 0)
    is_blank: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the overview."""
        return self.thumbnail.shape[:2]

    @property
    def scale(self) -> NDArray[np.float64]:
        """Overview px per level-0 px, along x and y."""
        h, w = self.shape
        return np.array([w / self.width, h / self.height])


@dataclass(frozen=True)
class MapStyle:
    """The colours of attention: a Matplotlib colour map over `scale`, "attention" (from 0 to the highest),
    "percentile" (within the slide, or the slides of a patient that were answered together) or "uniform" (log2 of the
    multiple of uniform attention, 0 in the middle), with the opacity `alpha`. The raster is computed on `device`.

    Raises ConfigError for an unknown colour map or scale, or an opacity outside 0 to 1.
    """

    cmap: str = Pictures.cmap
    alpha: float = Pictures.alpha
    scale: str = Pictures.scale
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.cmap not in colormaps:
            near = did_you_mean(self.cmap, colormaps)
            raise ConfigError(f"--cmap {self.cmap}: Matplotlib has no such colour map{near}; try viridis or magma")
        for name in ("alpha", "scale"):
            check_setting(Pictures, name, getattr(self, name))

    def values(self, attention: AttentionMap) -> NDArray:
        """Return the value (N,) of each patch on the scale."""
        if self.scale == "uniform":
            low, high = self.limits(attention)
            return np.clip(np.log2(np.maximum(attention.multiples, 2.0**low)), low, high)
        return attention.percentiles if self.scale == "percentile" else attention.attention

    def limits(self, attention: AttentionMap) -> tuple[float, float]:
        """Return the lower and the upper end of the scale."""
        if self.scale == "uniform":
            end = min(max(1, math.ceil(math.log2(attention.compared.peak) - 1e-9)), _MOST_DOUBLINGS)
            return -end, end
        return 0, 100 if self.scale == "percentile" else float(attention.compared.attention.max())

    def end_texts(self, attention: AttentionMap) -> tuple[str, str]:
        """Return the texts at the ends of the scale."""
        low, high = self.limits(attention)
        if self.scale == "uniform":
            below = " or less" if attention.compared.multiples.min() < 2.0**low else ""
            above = " or more" if attention.compared.peak > 2.0**high * (1 + 1e-9) else ""
            return f"{doublings_text(low)}{below}", f"{doublings_text(high)}{above}"
        return f"{low:g}", f"{high:.3g}"

    def tick_text(self, value: float) -> str | None:
        """Return the text of a tick of the colour bar; None for the number itself, "" for no text."""
        if self.scale != "uniform":
            return None
        return doublings_text(value) if value == int(value) else ""

    def mappable(self, attention: AttentionMap) -> ScalarMappable:
        """Return Matplotlib's mapping of values to colours."""
        return ScalarMappable(Normalize(*self.limits(attention)), colormaps[self.cmap])

    def label(self, attention: AttentionMap) -> str:
        """Return the label of the colour bar."""
        if attention.is_uniform:
            return f"grey, as all {len(attention):,} patches weigh the same ({UNIFORM_REASON})"
        peak = f"highest: {multiple_text(attention.peak)} x uniform"
        if self.scale == "percentile":
            equal = int(attention.is_unranked.sum())
            ties = f"; grey: {equal:,} of {len(attention):,} patches, equal and so without a rank" if equal else ""
            return f"{attention.name} percentile within the {attention.compared_text} ({peak}){ties}"
        if self.scale == "uniform":
            return f"{attention.name} as a multiple of uniform, logarithmic, 1 in the middle ({peak})"
        whose = "" if attention.of_case is None else " of the patient's slides"
        return f"{attention.name}, which sums to 1 over {len(attention.compared):,} patches{whose} ({peak})"

    def title(self, attention: AttentionMap) -> str:
        """Return the name of the map on this scale; all scales of equal weights are alike."""
        if attention.is_uniform:
            return attention.name
        kinds = {"percentile": "percentile", "attention": "from 0 to the highest", "uniform": "times uniform"}
        return f"{attention.name}, {kinds[self.scale]}"

    def is_grey(self, attention: AttentionMap) -> NDArray[np.bool_]:
        """Return whether (N,) a patch is equal to so many others that it has no colour on the scale."""
        if self.scale == "percentile":
            return attention.is_unranked
        return np.full(len(attention), attention.is_uniform)


def doublings_text(value: float) -> str:
    """Return how many times uniform so many doublings are; below 0 as a fraction."""
    return f"1/{2 ** -int(value):,} x" if value < 0 else f"{2 ** int(value):,} x"


@dataclass(frozen=True, eq=False)
class Overlay:
    """Attention over a slide's overview."""

    picture: Picture
    attention: AttentionMap
    style: MapStyle

    @cached_property
    def heat(self) -> NDArray[np.float64]:
        """The value `(h, w)` of each pixel on the scale, NaN where no patch is."""
        return self._raster(self.style.values(self.attention))

    @cached_property
    def is_grey(self) -> NDArray[np.bool_]:
        """Whether (h, w) most patches at a pixel have no colour on the scale."""
        is_grey = self.style.is_grey(self.attention)
        return np.nan_to_num(self._raster(is_grey)) > 0.5 if is_grey.any() else np.zeros(self.picture.shape, bool)

    def _raster(self, values: NDArray) -> NDArray[np.float64]:
        picture = self.picture
        extent = picture.width, picture.height
        return self.attention.raster(values, extent, picture.shape, self.style.device, corner=picture.corner)

    @property
    def colours(self) -> NDArray[np.float64]:
        """RGBA `(h, w, 4)` of 0..1; opaque on patches, transparent elsewhere."""
        colours = self.style.mappable(self.attention).to_rgba(np.nan_to_num(self.heat))
        colours[self.is_grey, :3] = GREY
        colours[..., 3] = ~np.isnan(self.heat)
        return colours
