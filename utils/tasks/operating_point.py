"""Fit a decision threshold on validation slides: for the best balanced accuracy, or a sensitivity or specificity.

NumPy is imported only to fit, as the settings of training import this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import numpy as np

BALANCED = "balanced_accuracy"
_RATES = ("sensitivity", "specificity")
_ROUNDING = 1e-9


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold on the positive class's probability is fitted for.

    Attributes
        metric: "balanced_accuracy", "sensitivity" or "specificity", of the positive class.
        wanted: the sensitivity or specificity that other slides are to have, between 0 and 1.
    """

    metric: str = BALANCED
    wanted: float = 0.0

    @classmethod
    def of(cls, text: str) -> Self:
        """Return the point of a text such as "sensitivity=0.95". Raises ValueError with what is expected."""
        metric, _, number = text.partition("=")
        if text == BALANCED:
            return cls()
        try:
            wanted = float(number)
        except ValueError:
            wanted = math.nan
        if metric not in _RATES or not 0 < wanted < 1:
            raise ValueError(f"{BALANCED}, or sensitivity=S or specificity=S with S between 0 and 1, such as 0.95")
        return cls(metric, wanted)

    def __str__(self) -> str:
        return self.metric if self.metric == BALANCED else f"{self.metric}={self.wanted:g}"

    @property
    def label(self) -> int | None:
        """Return the label of the slides that a wanted rate counts, 1 for positive ones; None if none is wanted."""
        return {BALANCED: None, "sensitivity": 1, "specificity": 0}[self.metric]

    @property
    def least_slides(self) -> int:
        """Return how many slides of that label a wanted rate takes; with fewer, no threshold can promise it."""
        return 1 if self.metric == BALANCED else math.ceil(1 / (1 - self.wanted) - 1 - _ROUNDING)

    def threshold(self, labels: np.ndarray, scores: np.ndarray) -> float | None:
        """Return the threshold on `scores (n,)`, the positive class's probability; a slide is positive at `score >=
        threshold`. None if a class is missing or has too few slides.
        """
        if not (0 < labels.sum() < len(labels)):
            return None
        if self.label is None:
            return _for_balanced_accuracy(labels, scores)
        return self._for_rate(scores[labels == self.label])

    def _for_rate(self, scores: np.ndarray) -> float | None:
        """Return the threshold that a further slide like these is expected to be on the right side of, as wanted.

        A further slide ranks anywhere among n others with the same probability 1 / (n + 1), so it is beyond the k
        outermost of them with one of at most k / (n + 1) (split conformal prediction; Vovk, Gammerman and Shafer 2005,
        Algorithmic Learning in a Random World).
        """
        import numpy as np

        beyond = math.floor((len(scores) + 1) * (1 - self.wanted) + _ROUNDING)
        if beyond == 0:
            return None
        ordered = np.sort(scores.astype(np.float64))
        # A negative slide is right below the threshold, a positive one from it on.
        return float(ordered[beyond - 1] if self.label == 1 else np.nextafter(ordered[-beyond], 2))


def _for_balanced_accuracy(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the threshold with the best balanced accuracy.

    It is halfway between neighbouring scores (or a score and 0 or 1); of equally good ones, the nearest to 0.5.
    """
    import numpy as np

    edges = np.unique(np.concatenate([[0.0, 1.0], scores]))
    thresholds = (edges[:-1] + edges[1:]) / 2
    negatives, positives = (np.sort(scores[labels == label].astype(np.float64)) for label in (0, 1))
    missed, rejected = (np.searchsorted(group, thresholds, "left") for group in (positives, negatives))
    # Twice the balanced accuracy, times both counts: integers, so that equal thresholds compare equal.
    quality = (len(positives) - missed) * len(negatives) + rejected * len(positives)
    best = thresholds[quality == quality.max()]
    return float(best[np.abs(best - 0.5).argmin()])
