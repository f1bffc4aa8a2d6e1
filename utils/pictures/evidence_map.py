"""`EvidenceMap`: how much each patch of a slide argues for or against each class."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from utils.pictures.attention_map import AttentionMap
from utils.pictures.overlay import Picture

# Dark blue argues against, grey says nothing, yellow argues for: its lightness only rises, so that both signs are told
# apart without colour and by the colour-blind (Nunez, Anderton and Renslow 2018,
# https://doi.org/10.1371/journal.pone.0199239).
CMAP = colormaps["cividis"]
# The colours end at this share of the patches with evidence, so that a single one does not leave the others grey.
_WITHIN = 0.99
# A patch is pointed out from this share of where the colours end.
_NOTABLE = 0.05


@dataclass(frozen=True, eq=False)
class EvidenceMap:
    """Signed `contributions (C, N)` of patches to the log-odds of each of the classes, or to another `quantity`; over
    the patches they add up to `log_odds (C,)` less those of the `reference (C,)`.

    Of a slide that was answered together with its patient's others, they add up so with `of_case (C, M)`, the
    contributions of all their patches, which colours then compare.
    """

    class_names: Sequence[str]
    contributions: NDArray[np.float32]
    log_odds: NDArray[np.float64]
    reference: NDArray[np.float64]
    quantity: str = "log-odds"
    of_case: NDArray[np.float32] | None = None

    def of_class(self, name: str) -> NDArray[np.float32]:
        """Return the contributions (N,) to a class."""
        return self.contributions[self.class_names.index(name)]

    def limit(self, name: str) -> float:
        """Return where a class's colours end, on either side of 0."""
        compared = self.contributions if self.of_case is None else self.of_case
        sizes = np.abs(compared[self.class_names.index(name)])
        sizes = sizes[sizes > 0]
        return float(np.quantile(sizes, _WITHIN)) if len(sizes) else 1.0

    def mappable(self, name: str) -> ScalarMappable:
        """Return Matplotlib's mapping of a class's contributions to colours."""
        return ScalarMappable(Normalize(-self.limit(name), self.limit(name)), CMAP)

    def strongest(self, name: str, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the indices of the patches that argue most for a class, and of those that argue most against it: at
        most `count` each, without those of little evidence.
        """
        values, least = self.of_class(name), _NOTABLE * self.limit(name)
        order = np.argsort(-values, kind="stable")
        supporters, opponents = order[values[order] > least], order[::-1][values[order[::-1]] < -least]
        return supporters[:count], opponents[:count]

    def label(self, name: str) -> str:
        """Return the label of the colour bar."""
        return f"{self.quantity} of {name}: against (dark) and for (bright), 0 in the middle"


@dataclass(frozen=True, eq=False)
class EvidenceOverlay:
    """The evidence for one class over a slide's overview."""

    picture: Picture
    attention: AttentionMap
    evidence: EvidenceMap
    name: str

    @cached_property
    def heat(self) -> NDArray[np.float64]:
        """The mean contribution `(h, w)` of the patches at each pixel, NaN where no patch is."""
        picture, values = self.picture, self.evidence.of_class(self.name)
        return self.attention.raster(values, (picture.width, picture.height), picture.shape, corner=picture.corner)

    def colours(self) -> NDArray[np.float64]:
        """Return RGBA `(h, w, 4)` of 0..1; opaque on patches, transparent elsewhere."""
        colours = self.evidence.mappable(self.name).to_rgba(np.nan_to_num(self.heat))
        colours[..., 3] = ~np.isnan(self.heat)
        return colours
