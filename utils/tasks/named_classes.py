"""Tasks that give each slide one of several named classes: what classes without and with an order share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.tasks.counts import class_counts
from utils.tasks.metrics import balanced_class_weights
from utils.tasks.probabilities import Probabilities
from utils.tasks.targets import Row


class NamedClasses(Probabilities):
    """One of several classes, the `outputs`. Targets are their indices."""

    predicted_key, values_key, names_key = "predicted_class", "probabilities", "class_names"

    def target(self, row: Row) -> int:
        """Return the index of the class that the column names. Raise ValueError for an unknown name."""
        return self.outputs.index(row[self.columns[0]])

    @property
    def no_target(self) -> str:
        """Return that the column names none of the classes."""
        return f"{self.columns[0]} that is none of {', '.join(self.outputs)}"

    @property
    def target_words(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        return self.outputs

    def target_text(self, targets: np.ndarray) -> np.ndarray:
        """Return the names of the classes."""
        return np.array(self.outputs)[targets]

    def prediction_text(self, values: np.ndarray) -> np.ndarray:
        """Return the names of the decided classes."""
        return self.target_text(self.decide(values))

    def label_columns(self, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Return the column of the class."""
        return {self.columns[0]: self.target_text(targets)}

    def table_columns(
        self, targets: np.ndarray, values: np.ndarray, calibrated: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return the class, `predicted`, a column `prob_<class>` and, if calibrated, one `calibrated_<class>` each."""
        columns = self.label_columns(targets) | {"predicted": self.prediction_text(values)}
        return columns | self.probability_columns(values, calibrated)

    def answer_columns(
        self, predicted: str, values: Mapping[str, float], calibrated: Mapping[str, float] | None
    ) -> dict[str, Any]:
        """Return `predicted`, the columns `prob_<class>` and, if calibrated, `calibrated_<class>`."""
        return {"predicted": predicted} | super().answer_columns(predicted, values, calibrated)

    def answer(
        self, values: np.ndarray, calibrated: np.ndarray | None = None, members: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Return the predicted class, its probability (`confidence`) and the probabilities by class."""
        return {
            "predicted_class": str(self.prediction_text(values)),
            "confidence": float(values[self.decide(values)]),
            "probabilities": self._by_output(values),
            "calibrated_probabilities": None if calibrated is None else self._by_output(calibrated),
            **self._by_member(members),
        }

    def marked(self, values: np.ndarray) -> tuple[str, ...]:
        """Return the decided class."""
        return (str(self.prediction_text(values)),)

    def counts_text(self, targets: np.ndarray, cases: Sequence[str]) -> str:
        """Return how many slides and patients each class has, and which class is positive, if one is."""
        slides = list(zip(targets.tolist(), cases, strict=True))
        return class_counts(slides, self.outputs, self.positive_output)

    @property
    def strata_names(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        return self.outputs

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return the classes."""
        return targets

    def loss_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return weights `(C,)` that give each class the same total."""
        return balanced_class_weights(targets, len(self.outputs))

    def case_keys(self, targets: np.ndarray) -> np.ndarray:
        """Return the classes: a patient with slides of two classes has two answers."""
        return targets

    def gallery(self, targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows that are surest and correct, surest and wrong, and most uncertain."""
        ordered = np.sort(values, axis=1)
        surest = np.argsort(-ordered[:, -1], kind="stable")
        uncertain = np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")
        correct = (self.decide(values) == targets)[surest]
        return {"surest correct": surest[correct], "surest wrong": surest[~correct], "most uncertain": uncertain}
