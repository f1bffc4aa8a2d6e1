"""What single models of a cross-validation predict: of inner validation slides, and of an outer fold's test slides.

The table `inner_predictions.csv` keeps it, so that more can be fitted to inner validation after a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.bags.dataset import MILDataset
from utils.core.errors import ConfigError
from utils.evaluation.predictions import Predictions
from utils.learning.fold_results import FoldResult
from utils.learning.splits import OuterFold
from utils.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd

FILE = "inner_predictions.csv"
_VALIDATION, _TEST = "validation", "test"


@dataclass(frozen=True, eq=False)
class InnerPredictions:
    """The predictions, a row per slide and model: which of them are of inner validation (n,) bool, and the number (n,)
    of the model, from 1 within its outer fold.
    """

    rows: Predictions
    is_validation: np.ndarray
    models: np.ndarray

    @classmethod
    def read(cls, folder: Path, task: Task) -> InnerPredictions:
        """Read the table of a run. Raise ConfigError if it is not there or damaged."""
        import pandas as pd

        path = folder / FILE
        try:
            columns = pd.read_csv(path, usecols=["subset", "model"])
            rows = Predictions.read(path, 0, task)
        except (OSError, ValueError) as failure:
            raise ConfigError(
                f"{path}: not there or damaged ({failure}), as in runs of earlier versions; train again into another "
                "--output_dir"
            ) from failure
        return cls(rows, (columns["subset"] == _VALIDATION).to_numpy(), columns["model"].to_numpy())

    def validation(self, fold: int) -> list[Predictions]:
        """Return the predictions of an outer fold's inner validation slides by each of the inner models."""
        return self._by_model((self.rows.folds == fold) & self.is_validation)

    def tested(self, fold: int) -> list[Predictions]:
        """Return the predictions of an outer fold's test slides by each of the tested models."""
        return self._by_model((self.rows.folds == fold) & ~self.is_validation)

    def _by_model(self, rows: np.ndarray) -> list[Predictions]:
        return [self.rows.where(rows & (self.models == model)) for model in np.unique(self.models[rows])]


def inner_table(results: Sequence[FoldResult], data: MILDataset) -> pd.DataFrame:
    """Return the content of `inner_predictions.csv`."""
    import pandas as pd

    parts = []
    for result in results:
        fold = result.fold
        validated = zip([inner.val for inner in fold.inner], result.validated, strict=True)
        tested = [(fold.test, values) for values in result.each]
        for subset, models in ((_VALIDATION, validated), (_TEST, tested)):
            for number, (slides, values) in enumerate(models, start=1):
                table = _predictions(data, fold, slides, values).table()
                parts.append(table.assign(subset=subset, model=number))
    return pd.concat(parts)


def _predictions(data: MILDataset, fold: OuterFold, slides: np.ndarray, values: np.ndarray) -> Predictions:
    return Predictions(
        slides=np.array([data.rows[slide].wsi_id for slide in slides.tolist()]),
        cases=data.cases[slides],
        labels=data.labels[slides],
        values=values,
        task=data.task,
        repeats=np.full(len(slides), fold.repeat),
        seed=0,
        folds=np.full(len(slides), fold.number),
    )
