"""What an outer fold comes to: the answers for its test slides, what was fitted on inner validation, its figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.bags.dataset import MILDataset
from utils.evaluation.metrics import classification_metrics, decision_metrics
from utils.evaluation.predictions import Predictions
from utils.learning.splits import OuterFold
from utils.prediction.calibration import mean_calibrated
from utils.prediction.feeding import SlideOutput


@dataclass(frozen=True)
class FoldResult:
    """An outer fold: what the tested model says of its test slides, the decision `threshold` that inner validation
    gave (two classes only), the `temperature` that it gave, the record of the selection, and the epochs of all
    trainings.
    """

    fold: OuterFold
    outputs: list[SlideOutput]
    threshold: float | None
    temperature: float | None
    selection: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def probabilities(self) -> np.ndarray:
        """`(n, C)` of the test slides."""
        return np.stack([output.probabilities for output in self.outputs])

    @property
    def calibrated(self) -> np.ndarray | None:
        """The same, temperature-scaled, where there is a temperature."""
        answers = [mean_calibrated([output], [self.temperature]) for output in self.outputs]
        scaled = [answer for answer in answers if answer is not None]
        return np.stack(scaled) if scaled else None

    @property
    def decisions(self) -> np.ndarray:
        """`(n,)` int, the classes of the test slides, decided on at the threshold where there is one."""
        if self.threshold is None:
            return self.probabilities.argmax(axis=1)
        return (self.probabilities[:, 1] >= self.threshold).astype(int)

    def figures(self, data: MILDataset) -> dict[str, Any]:
        """Return the fold's entry in `outputs.json`."""
        labels, names = data.labels[self.fold.test], data.class_names
        chunk_labels = np.repeat(labels, [len(output.chunk_sizes) for output in self.outputs])
        chunks = np.concatenate([output.chunk_probabilities for output in self.outputs])
        return {
            "fold": self.fold.number,
            "repeat": self.fold.repeat,
            "n_slides": len(labels),
            "n_cases": len(set(data.cases[self.fold.test])),
            "n_train": len(self.fold.train),
            "chunk": classification_metrics(chunk_labels, chunks, names),
            "slide": classification_metrics(labels, self.probabilities, names),
            "threshold": self.threshold,
            "thresholded": None if self.threshold is None else decision_metrics(labels, self.decisions, names),
            "temperature": self.temperature,
            "selection": self.selection,
        }


def pooled_predictions(results: Sequence[FoldResult], data: MILDataset, seed: int) -> Predictions:
    """Return the out-of-fold answers of all folds: the repeats' one after the other, each in the label table's order.

    Calibrated probabilities, and decisions at a threshold, are there where every fold has them.
    """
    slides = np.concatenate([result.fold.test for result in results])
    sizes = [len(result.fold.test) for result in results]
    scaled = [calibrated for result in results if (calibrated := result.calibrated) is not None]
    has_thresholds = all(result.threshold is not None for result in results)
    predictions = Predictions(
        slides=np.array([data.rows[slide].wsi_id for slide in slides.tolist()]),
        cases=data.cases[slides],
        labels=data.labels[slides],
        probabilities=np.concatenate([result.probabilities for result in results]),
        class_names=data.class_names,
        repeats=np.repeat([result.fold.repeat for result in results], sizes),
        seed=seed,
        folds=np.repeat([result.fold.number for result in results], sizes),
        calibrated=np.concatenate(scaled) if len(scaled) == len(results) else None,
        decisions=np.concatenate([result.decisions for result in results]) if has_thresholds else None,
    )
    return predictions.where(np.lexsort((slides, predictions.repeats)))
