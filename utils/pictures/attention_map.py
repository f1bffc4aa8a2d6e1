"""`AttentionMap`: a model's attention to the patches of a slide, with ranks, percentiles and a seamless raster."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """`attention (N,)`, which sums to 1, of the patches at `coords (N, 2)`, level-0 px of their top-left corners, each
    `size_level0` px wide and high.
    """

    coords: NDArray[np.int64]
    attention: NDArray
    size_level0: int

    def __len__(self) -> int:
        return len(self.coords)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Indices (N,) of the patches, the most attended first; ties in the order of the patches."""
        return np.argsort(-self.attention, kind="stable")

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """Rank (N,) of each patch by attention, from 1."""
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[self.order] = np.arange(1, len(self) + 1)
        return ranks

    @cached_property
    def percentiles(self) -> NDArray[np.float64]:
        """Percentile (N,) of each patch by attention, 0 to 100; ties share their mean (all equal: 50)."""
        if len(self) == 1:
            return np.array([50.0])
        from scipy.stats import rankdata  # slow to import, and not always needed

        return (rankdata(self.attention) - 1) / (len(self) - 1) * 100

    @property
    def peak(self) -> float:
        """The highest attention, as a multiple of uniform attention."""
        return float(self.attention.max()) * len(self)

    @cached_property
    def cumulative(self) -> NDArray[np.float64]:
        """Sum (N,) of the attention of the 1, 2, ... N most attended patches."""
        return np.cumsum(self.attention[self.order], dtype=np.float64)

    @property
    def half_count(self) -> int:
        """The smallest number of patches with half of the attention."""
        return int(np.searchsorted(self.cumulative, self.cumulative[-1] / 2)) + 1

    def top(self, count: int) -> NDArray[np.int64]:
        """Return the indices of the most attended patches, in order."""
        return self.order[:count]

    def lowest(self, count: int) -> NDArray[np.int64]:
        """Return the indices of the least attended patches, the least first, without the `count` most attended."""
        return self.order[count:][::-1][:count]

    def raster(
        self,
        values: NDArray,
        extent: tuple[int, int],
        shape: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> NDArray[np.float64]:
        """Return the mean `(h, w)` of the `values (N,)` of the patches that cover each pixel, NaN where none does.

        `extent` is (width, height) of the slide in level-0 px, `shape` (h, w) of the raster over it. Edges are rounded
        to raster pixels, so that neighbouring patches share theirs: no seam, no overlap. Each patch adds to its four
        corners, and cumulative sums along both axes fill it: O(N + h w). Computed on `device` in float64.
        """
        height, width = shape
        device = "cpu" if torch.device(device).type == "mps" else device  # mps has no float64
        scale = torch.tensor([width / extent[0], height / extent[1]], dtype=torch.float64, device=device)
        corners = torch.from_numpy(self.coords).to(device).double()
        limit = torch.tensor([width, height], device=device)
        low = torch.minimum((corners * scale).round().long(), limit - 1)
        # A patch smaller than a raster pixel fills one.
        high = torch.minimum(torch.maximum(((corners + self.size_level0) * scale).round().long(), low + 1), limit)
        weights = torch.from_numpy(np.stack([values, np.ones(len(self))]).astype(np.float64)).to(device)
        total, count = _rectangle_sums(weights, low, high, height, width)
        covered = count.round() > 0
        return torch.where(covered, total / count.round().clamp(min=1), torch.nan).cpu().numpy()


def _rectangle_sums(
    weights: torch.Tensor, low: torch.Tensor, high: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Return the sums `(2, h, w)` of `weights (2, N)` over the rectangles from `low` to `high` (N, 2)."""
    steps = torch.zeros(2, height + 1, width + 1, dtype=torch.float64, device=weights.device)
    flat = steps.view(2, -1)
    for xs, ys, sign in ((low, low, 1), (high, low, -1), (low, high, -1), (high, high, 1)):
        flat.index_add_(1, ys[:, 1] * (width + 1) + xs[:, 0], sign * weights)
    return steps.cumsum(1).cumsum(2)[:, :height, :width]
