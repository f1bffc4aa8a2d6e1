"""Attention painted over a slide's overview: each patch at its exact footprint, overlaps averaged, nothing outside."""

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
from utils.pictures.attention_map import AttentionMap
from utils.pictures.settings import Pictures


@dataclass(frozen=True)
class Picture:
    """A slide's overview and what is needed to draw on it: `thumbnail (h, w, 3)` uint8 over the whole slide of
    `width` x `height` level-0 px; `mpp` um per level-0 px, or None.
    """

    thumbnail: NDArray[np.uint8]
    width: int
    height: int
    mpp: float | None

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
class Look:
    """How attention becomes colour: a Matplotlib colour map over `scale`, "attention" (from 0 to the highest) or
    "percentile" (within the slide), laid over the slide with the opacity `alpha`. `device` makes the raster.

    Raises ConfigError for an unknown colour map or scale, or an opacity that is none.
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
        """(N,) what is painted."""
        return attention.percentiles if self.scale == "percentile" else attention.attention

    def colours(self, attention: AttentionMap) -> ScalarMappable:
        most = 100 if self.scale == "percentile" else float(attention.attention.max())
        return ScalarMappable(Normalize(0, most), colormaps[self.cmap])

    def label(self, attention: AttentionMap) -> str:
        """What the colour bar says."""
        peak = f"highest: {attention.peak:.3g} x uniform"
        if self.scale == "percentile":
            return f"attention percentile within the slide ({peak})"
        return f"attention, which sums to 1 over {len(attention):,} patches ({peak})"


@dataclass(frozen=True, eq=False)
class Overlay:
    """Attention painted over a slide's overview."""

    picture: Picture
    attention: AttentionMap
    look: Look

    @cached_property
    def heat(self) -> NDArray[np.float64]:
        """`(h, w)` what is painted over the overview, NaN where no patch is."""
        picture, look = self.picture, self.look
        extent = picture.width, picture.height
        return self.attention.raster(look.values(self.attention), extent, picture.shape, look.device)

    @property
    def colours(self) -> NDArray[np.float64]:
        """`(h, w, 4)` RGBA of 0..1; opaque on patches, 0 elsewhere."""
        colours = self.look.colours(self.attention).to_rgba(np.nan_to_num(self.heat))
        colours[..., 3] = ~np.isnan(self.heat)
        return colours
