"""Tasks whose values are probabilities: of classes, of which one is true, or of labels, of which each may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.tasks.answers import numbers_in
from utils.tasks.targets import Row
from utils.tasks.task import Task

_NO_CHANCE = 1e-6  # at least, so that log-odds are finite


class Probabilities(Task):
    """A task whose values are a probability of each of the `outputs`, in columns of their own."""

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Return the log-odds of the ranked outputs."""
        chances = values[..., list(self.ranked_outputs)].clip(_NO_CHANCE, 1 - _NO_CHANCE)
        return np.log(chances / (1 - chances))

    def answer_columns(
        self, predicted: str, values: Mapping[str, float], calibrated: Mapping[str, float] | None
    ) -> dict[str, Any]:
        """Return the columns `prob_<output>` and, if calibrated, `calibrated_<output>`."""
        columns = {f"prob_{name}": value for name, value in values.items()}
        return columns | {f"calibrated_{name}": value for name, value in (calibrated or {}).items()}

    def probability_columns(self, values: np.ndarray, calibrated: np.ndarray | None) -> dict[str, np.ndarray]:
        """Return the same columns `(n,)` of several slides, given their values `(n, C)`."""
        columns: dict[str, np.ndarray] = {}
        for prefix, numbers in (("prob", values), ("calibrated", calibrated)):
            if numbers is not None:
                columns |= {f"{prefix}_{name}": numbers[:, index] for index, name in enumerate(self.outputs)}
        return columns

    def values_in(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the probabilities and the calibrated ones."""
        scaled = [f"calibrated_{name}" for name in self.outputs]
        values = numbers_in(rows, [f"prob_{name}" for name in self.outputs])
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("a probability that is no number from 0 to 1")
        return values, numbers_in(rows, scaled) if set(scaled) <= rows[0].keys() else None

    def shares(self, values: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Return the probabilities."""
        return "probability", dict(values)
