"""What a model attended to on a slide, as every picture of it needs it: places, ranks, and a raster without seams."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """`attention (N,)` of one distribution, summing to 1, over the patches at `coords (N, 2)`, level-0 px of their
    top-left corners, each `size_level0` px wide and high.
    """

    coords: NDArray[np.int64]
    attention: NDArray
    size_level0: int

    def __len__(self) -> int:
        return len(self.coords)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(N,) indices, the most attended first; of equals, the first."""
        return np.argsort(-self.attention, kind="stable")

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """(N,) place in `order`, from 1."""
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[self.order] = np.arange(1, len(self) + 1)
        return ranks

    @cached_property
    def percentiles(self) -> NDArray[np.float64]:
        """(N,) from 0 to 100; equal attention gives an equal percentile (all equal: 50)."""
        if len(self) == 1:
            return np.array([50.0])
        from scipy.stats import rankdata  # slow to import, and not always needed

        return (rankdata(self.attention) - 1) / (len(self) - 1) * 100

    @property
    def peak(self) -> float:
        """The highest attention, as a multiple of what it would be were all equal."""
        return float(self.attention.max()) * len(self)

    @property
    def half(self) -> int:
        """How few patches hold half of the attention."""
        held = np.cumsum(self.attention[self.order], dtype=np.float64)
        return int(np.searchsorted(held, held[-1] / 2)) + 1

    def top(self, count: int) -> NDArray[np.int64]:
        """Indices of the most attended patches, the most attended first."""
        return self.order[:count]

    def lowest(self, count: int) -> NDArray[np.int64]:
        """Indices of the least attended patches that are not among the `count` most attended, the least first."""
        return self.order[count:][::-1][:count]

    def raster(
        self,
        values: NDArray,
        extent: tuple[int, int],
        shape: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> NDArray[np.float64]:
        """`(h, w)` mean of the `values (N,)` of the patches that cover each pixel, NaN where none does.

        `extent` is (width, height) of the slide in level-0 px, `shape` (h, w) of the raster over it. Edges are rounded
        once in raster pixels, so that neighbouring patches share theirs: no seam, no overlap. Work is in proportion to
        N + h w: each patch adds its four corners, sums along both axes spread them. `device` computes it, in float64.
        """
        height, width = shape
        device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
        scale = torch.tensor([width / extent[0], height / extent[1]], dtype=torch.float64, device=device)
        corners = torch.from_numpy(self.coords).to(device).double()
        limit = torch.tensor([width, height], device=device)
        low = torch.minimum((corners * scale).round().long(), limit - 1)
        # A patch smaller than a raster pixel still shows.
        high = torch.minimum(torch.maximum(((corners + self.size_level0) * scale).round().long(), low + 1), limit)
        weights = torch.from_numpy(np.stack([values, np.ones(len(self))]).astype(np.float64)).to(device)
        total, count = _spread(weights, low, high, height, width)
        covered = count.round() > 0
        return torch.where(covered, total / count.round().clamp(min=1), torch.nan).cpu().numpy()


def _spread(weights: torch.Tensor, low: torch.Tensor, high: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(2, h, w)` sums of `weights (2, N)` over the rectangles from `low` to `high` (N, 2)."""
    steps = torch.zeros(2, height + 1, width + 1, dtype=torch.float64, device=weights.device)
    flat = steps.view(2, -1)
    for xs, ys, sign in ((low, low, 1), (high, low, -1), (low, high, -1), (high, high, 1)):
        flat.index_add_(1, ys[:, 1] * (width + 1) + xs[:, 0], sign * weights)
    return steps.cumsum(1).cumsum(2)[:, :height, :width]
