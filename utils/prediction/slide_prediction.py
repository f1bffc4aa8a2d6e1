"""What trained models say of one slide."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.bags.store import Bag, StoredBag
from utils.prediction.feeding import SlideFeed
from utils.tasks.classification import Classification

SEEN = "%s: this model was trained on this %s; its prediction proves nothing"


@dataclass(frozen=True)
class SlidePrediction:
    """`probabilities (C,)`; `calibrated (C,)`, the same temperature-scaled, None where a model has no temperature;
    `attention (H, N)`, each head summing to 1 over the patches; `bag` with their places; `seen_as` "slide" or "case",
    whichever a model was trained on, "" where neither, None where a checkpoint does not record it;
    `member_probabilities (M, C)` of several models, None of a single one.
    """

    slide: str
    task: Classification
    probabilities: NDArray[np.float64]
    calibrated: NDArray[np.float64] | None
    attention: NDArray[np.float32] | None
    bag: Bag | StoredBag
    feed: SlideFeed
    seen_as: str | None
    member_probabilities: NDArray[np.float64] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.task.class_names

    @property
    def predicted_class(self) -> str:
        return self.class_names[int(self.task.decide(self.probabilities))]

    @property
    def confidence(self) -> float:
        """The predicted class's probability."""
        return float(self.probabilities.max())

    @property
    def seen_in_training(self) -> bool | None:
        return None if self.seen_as is None else bool(self.seen_as)

    @property
    def num_instances(self) -> int:
        return len(self.bag.features)

    @property
    def coords(self) -> NDArray[np.int64] | None:
        """`(N, 2)` level-0 px of the patches' top-left corners."""
        return self.bag.coords

    @property
    def patch_attention(self) -> NDArray[np.float32] | None:
        """`(N,)`, the mean over heads; sums to 1."""
        return None if self.attention is None else self.attention.mean(axis=0)

    def as_dict(self) -> dict[str, Any]:
        """What `<slide>_prediction.json` says of the slide; of several models also each one's probabilities, and their
        (sample) standard deviation.
        """
        members = self.member_probabilities
        ensemble = {} if members is None else {
            "member_probabilities": [self._by_class(one) for one in members],
            "spread": self._by_class(members.std(axis=0, ddof=1)),
        }  # fmt: skip
        return {
            "slide": self.slide,
            "predicted_class": self.predicted_class,
            "confidence": self.confidence,
            "probabilities": self._by_class(self.probabilities),
            "calibrated_probabilities": None if self.calibrated is None else self._by_class(self.calibrated),
            **ensemble,
            "num_instances": self.num_instances,
            **self.feed.as_dict(),
            "seen_in_training": self.seen_in_training,
            "seen_as": self.seen_as,
        }

    def _by_class(self, values: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(self.class_names, values.tolist(), strict=True))
