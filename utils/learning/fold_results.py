"""The result of an outer fold: the predictions of its test slides and their figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.bags.dataset import MILDataset
from utils.evaluation.predictions import Predictions
from utils.learning.splits import OuterFold
from utils.prediction.forward_pass import SlideOutput, mean_calibrated
from utils.tasks.task import FittedFigures, Task


@dataclass(frozen=True)
class FoldResult:
    """The result of an outer fold: the tested model's output for each test slide; what was fitted to inner validation
    (see `Task.fit_on_validation`); the record of the model's selection; the epochs of all trainings; and the values
    `validated` of the inner validation slides, `(n, C)` of each inner fold.
    """

    task: Task
    fold: OuterFold
    outputs: list[SlideOutput]
    fitted: FittedFigures
    selection: dict[str, Any]
    history: list[dict[str, Any]]
    validated: Sequence[np.ndarray] = ()

    @property
    def probabilities(self) -> np.ndarray:
        """Return the probabilities `(n, C)` of the test slides."""
        return np.stack([output.probabilities for output in self.outputs])

    @property
    def each(self) -> np.ndarray:
        """Return the probabilities `(M, n, C)` of the test slides by each of the M models."""
        return np.stack([output.each for output in self.outputs], axis=1)

    @property
    def calibrated(self) -> np.ndarray | None:
        """Return the calibrated probabilities `(n, C)`, or None if nothing calibrates them."""
        slides = [mean_calibrated(self.task, [output], [self.fitted]) for output in self.outputs]
        scaled = [probabilities for probabilities in slides if probabilities is not None]
        return np.stack(scaled) if scaled else None

    @property
    def decisions(self) -> np.ndarray | None:
        """Return the decisions `(n,)` int for the test slides by what was fitted, or None if nothing decides."""
        return self.task.decide_by(self.fitted, self.each)

    def figures(self, data: MILDataset) -> dict[str, Any]:
        """Return the fold's entry in `outputs.json`."""
        task, labels = self.task, data.labels[self.fold.test]
        chunk_labels = np.repeat(labels, [len(output.chunk_sizes) for output in self.outputs], axis=0)
        chunks = np.concatenate([output.chunk_probabilities for output in self.outputs])
        return {
            "fold": self.fold.number,
            "repeat": self.fold.repeat,
            "n_slides": data.num_slides(self.fold.test),
            "n_cases": len(set(data.cases[self.fold.test])),
            "n_train": data.num_slides(self.fold.train),
            "chunk": task.unweighted_metrics(chunk_labels, chunks),
            "slide": task.unweighted_metrics(labels, self.probabilities),
            **task.fitted_figures(self.fitted, labels, self.each),
            "selection": self.selection,
        }


def pooled_predictions(results: Sequence[FoldResult], data: MILDataset, seed: int) -> Predictions:
    """Return the out-of-fold predictions of all folds, sorted by repeat, then in the label table's order.

    Calibrated probabilities, and decisions by what was fitted, are included only if every fold has them.
    """
    slides = np.concatenate([result.fold.test for result in results])
    sizes = [len(result.fold.test) for result in results]
    scaled = [calibrated for result in results if (calibrated := result.calibrated) is not None]
    decisions = [decided for result in results if (decided := result.decisions) is not None]
    predictions = Predictions(
        slides=np.array([data.rows[slide].wsi_id for slide in slides.tolist()]),
        cases=data.cases[slides],
        labels=data.labels[slides],
        values=np.concatenate([result.probabilities for result in results]),
        task=data.task,
        repeats=np.repeat([result.fold.repeat for result in results], sizes),
        seed=seed,
        folds=np.repeat([result.fold.number for result in results], sizes),
        calibrated=np.concatenate(scaled) if len(scaled) == len(results) else None,
        decisions=np.concatenate(decisions) if len(decisions) == len(results) else None,
        groups=None if data.group_column is None else data.groups[slides],
        unit="slide" if data.unit == "slide" else "patient",
    )
    return predictions.where(np.lexsort((slides, predictions.repeats)))
