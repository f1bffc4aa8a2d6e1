"""`AttentionMap`: a model's attention to the patches of a slide, with ranks, percentiles and a seamless raster."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ATTENTION, UNIFORM, _MIXED = "attention", "uniform weight", "mean weight"
# What is drawn of other people's models without attention.
EVIDENCE_STRENGTH = "strength of the evidence"
# What models without attention give instead.
_NAMES = {"meanPool": UNIFORM, "maxPool": "share of winning features"}
# Equal patches have no rank to show if they are more than this share of a slide's.
_MOST_EQUAL = 0.2
# From this share of effective patches on the attention is called nearly uniform.
_NEARLY_UNIFORM = 0.95
_SAME = 1e-6  # relative difference up to which all patches weigh the same
UNIFORM_REASON = "uniform: this model weighs every patch alike"


def models_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of each of a record's models: those of `models` or, in earlier records, of `model`, which is
    a list of several models only.
    """
    if record.get("models"):
        return [entry["model"] for entry in record["models"]]
    return record["model"] if isinstance(record["model"], list) else [record["model"]]


def weight_name(record: Mapping[str, Any]) -> str:
    """Return what the weights of the patches are in a prediction's record: attention, or what its model has instead."""
    names = {_NAMES.get(model["name"], ATTENTION) for model in models_of(record)}
    return names.pop() if len(names) == 1 else _MIXED


def is_uniform(values: NDArray) -> bool:
    """Return whether all of several `values (N,)` are the same to rounding."""
    low, high = float(values.min()), float(values.max())
    return len(values) > 1 and high - low <= _SAME * max(abs(low), abs(high))


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """`attention (N,)`, which sums to 1, of the patches at `coords (N, 2)`, level-0 px of their top-left corners, each
    `size_level0` px wide and high. `name` is what the weights are.

    Of a slide that was answered together with its patient's others, `of_case (M,)` is the attention of all their
    patches, which sums to 1; the slide's are those from number `first` on. Colours then compare all of them, while
    ranks and shares are those within the slide.
    """

    coords: NDArray[np.int64]
    attention: NDArray
    size_level0: int
    name: str = ATTENTION
    of_case: NDArray | None = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.coords)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Indices (N,) of the patches, the most attended first; ties in the order of the patches."""
        return np.argsort(-self.attention, kind="stable")

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """Number (N,) of each patch by attention, from 1; ties are numbered in the order of the patches."""
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[self.order] = np.arange(1, len(self) + 1)
        return ranks

    @cached_property
    def percentiles(self) -> NDArray[np.float64]:
        """Percentile (N,) of each patch by attention, 0 to 100; ties share their mean (all equal: 50)."""
        compared = self.compared
        if compared is not self:
            return compared.percentiles[self.first : self.first + len(self)]
        return np.full(1, 50.0) if len(self) == 1 else (len(self) - self.mean_ranks) / (len(self) - 1) * 100

    @cached_property
    def compared(self) -> "AttentionMap":
        """All patches that colours compare: the slide's own, or those of all slides of its patient, without places."""
        if self.of_case is None:
            return self
        nowhere = np.zeros((len(self.of_case), 2), dtype=np.int64)
        return AttentionMap(nowhere, self.of_case, self.size_level0, self.name)

    @property
    def compared_text(self) -> str:
        """The words for what colours compare the patches of."""
        return "slide" if self.of_case is None else "patient's slides"

    @cached_property
    def mean_ranks(self) -> NDArray[np.float64]:
        """Rank (N,) of each patch by attention, from 1; ties share their mean."""
        from scipy.stats import rankdata  # slow to import, and not always needed

        return rankdata(np.zeros(len(self)) if self.is_uniform else -self.attention)

    @cached_property
    def equals(self) -> NDArray[np.int64]:
        """Number (N,) of the patches with a patch's attention, itself included."""
        if self.is_uniform:
            return np.full(len(self), len(self))
        _, inverse, counts = np.unique(self.attention, return_inverse=True, return_counts=True)
        return counts[inverse]

    @property
    def is_uniform(self) -> bool:
        """Whether all of several patches weigh the same."""
        return is_uniform(self.compared.attention)

    @property
    def is_unranked(self) -> NDArray[np.bool_]:
        """Whether (N,) so many patches have a patch's attention that it has no rank to show."""
        if self.compared is not self:
            return self.compared.is_unranked[self.first : self.first + len(self)]
        return (self.equals > 1) & (self.equals > _MOST_EQUAL * len(self))

    @property
    def most_text(self) -> str:
        """The words for the patches of the highest attention."""
        return "most attended patches" if self.name == ATTENTION else f"patches with the highest {self.name}"

    @property
    def least_text(self) -> str:
        """The words for the patches of the lowest attention."""
        return "least attended patches" if self.name == ATTENTION else f"patches with the lowest {self.name}"

    @property
    def notes(self) -> list[str]:
        """What a reader must know before the colours are read."""
        if self.is_uniform:
            return [
                f"{UNIFORM_REASON.capitalize()}. All {len(self):,} patches weigh the same: none is the most or the "
                "least attended."
            ]
        if len(self) > 1 and self.effective_count >= _NEARLY_UNIFORM * len(self):
            return [
                f"The {self.name} is nearly uniform, as if {self.effective_count:,.0f} of {len(self):,} patches "
                "weighed the same: strong colours may stand for small differences."
            ]
        return []

    @cached_property
    def effective_count(self) -> float:
        """The number of patches of equal weight that are as spread out: exp of the entropy, from 1 to N."""
        weights = self.attention[self.attention > 0].astype(np.float64)
        weights /= weights.sum() or 1
        return float(np.exp(-(weights * np.log(weights)).sum()))

    @property
    def multiples(self) -> NDArray[np.float64]:
        """Attention (N,) as a multiple of uniform attention."""
        return self.attention.astype(np.float64) * len(self.compared)

    @property
    def peak(self) -> float:
        """The highest attention, as a multiple of uniform attention."""
        return float(self.attention.max()) * len(self.compared)

    @cached_property
    def cumulative(self) -> NDArray[np.float64]:
        """Sum (N,) of the attention of the 1, 2, ... N most attended patches."""
        return np.cumsum(self.attention[self.order], dtype=np.float64)

    @property
    def half_count(self) -> int:
        """The smallest number of patches with half of the attention."""
        return int(np.searchsorted(self.cumulative, self.cumulative[-1] / 2)) + 1

    def top(self, count: int) -> NDArray[np.int64]:
        """Return the indices of the most attended patches, in order; of several that share the lowest, none."""
        shared = self.lowest_count
        return self.order[: min(count, len(self) - shared if shared > 1 else len(self))]

    def lowest(self, count: int) -> NDArray[np.int64]:
        """Return the indices of the least attended patches, the least first, without the `count` most attended; none
        if all weigh the same.
        """
        return self.order[:0] if self.is_uniform else self.order[count:][::-1][:count]

    @property
    def lowest_count(self) -> int:
        """The number of the patches that share the lowest attention."""
        return int(self.equals[self.order[-1]])

    def raster(
        self,
        values: NDArray,
        extent: tuple[int, int],
        shape: tuple[int, int],
        device: torch.device | str = "cpu",
        *,
        corner: tuple[int, int] = (0, 0),
    ) -> NDArray[np.float64]:
        """Return the mean `(h, w)` of the `values (N,)` of the patches that cover each pixel, NaN where none does.

        `extent` is (width, height) of the area to cover in level-0 px, from `corner` (x, y) on, `shape` (h, w) of the
        raster over it. Edges are rounded to raster pixels, so that neighbouring patches share theirs: no seam, no
        overlap. Each patch adds to its four corners, and cumulative sums along both axes fill it: O(N + h w). Computed
        on `device` in float64.
        """
        height, width = shape
        device = "cpu" if torch.device(device).type == "mps" else device  # mps has no float64
        scale = torch.tensor([width / extent[0], height / extent[1]], dtype=torch.float64, device=device)
        corners = torch.from_numpy(self.coords - corner).to(device).double()
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
