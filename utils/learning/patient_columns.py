"""Covariates and subgroups of a run: what the columns of the label table that describe patients add to its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.bags.dataset import MILDataset
from utils.bags.described_columns import Column, columns_record, of_all_slides, read_columns, read_covariates
from utils.core.files import read_json, write_json
from utils.evaluation.covariates import covariate_figures
from utils.evaluation.outputs import write_table
from utils.evaluation.predictions import Predictions
from utils.evaluation.subgroups import subgroup_figures, subgroup_table
from utils.learning.covariates import compared_predictions
from utils.learning.finished_runs import read_run
from utils.learning.inner_predictions import InnerPredictions
from utils.learning.settings import Analyses
from utils.learning.splits import OuterFold


@dataclass(frozen=True, eq=False)
class PatientColumns:
    """The `covariates` and the columns of `subgroups` of a dataset's bags, in its order."""

    data: MILDataset
    covariates: Sequence[Column]
    subgroups: Sequence[Column]

    @classmethod
    def read(cls, data: MILDataset, analyses: Analyses) -> PatientColumns:
        """Read the columns. Raise LabelsError if they cannot be used (see `described_columns`)."""
        rows = [row.columns for row in data.slide_rows]
        covariates = read_covariates(data.labels_csv, data.slide_rows, analyses.columns("covariates"), data.task)
        subgroups = read_columns(data.labels_csv, rows, analyses.columns("subgroups"), "--subgroups")
        cases = np.array([row.case_id for row in data.slide_rows])
        if data.unit == "case":
            subgroups = of_all_slides(data.labels_csv, subgroups, cases, "--subgroups")
        subgroups = [column.filled(cases) for column in subgroups]
        firsts = np.array([slides[0] for slides in data.slides_of])
        return cls(data, *([column.where(firsts) for column in columns] for columns in (covariates, subgroups)))

    def write(self, folder: Path, folds: Sequence[OuterFold], *, is_balanced: bool) -> None:
        """Add what is asked for to the results of a finished run in its folder: tables, and entries of `outputs.json`.

        `is_balanced`: the loss of plain models is weighted as that of the trained ones (`Task.loss_weights`).
        """
        if not self.covariates and not self.subgroups:
            return
        predictions, content = read_run(folder, folder.name).predictions, read_json(folder / "outputs.json")
        if self.covariates:
            content["covariates"] = self._covariates(folder, predictions, folds, is_balanced=is_balanced)
        if self.subgroups:
            number_of = {row.wsi_id: number for number, row in enumerate(self.data.rows)}
            numbers = [number_of[wsi_id] for wsi_id in predictions.slides.tolist()]
            groups = {
                column.name: {name: rows[numbers] for name, rows in column.groups().items()}
                for column in self.subgroups
            }
            content["subgroups"] = subgroup_figures(predictions, groups)
            write_table(folder / "subgroups.csv", subgroup_table(content["subgroups"]))
        write_json(folder / "outputs.json", content)

    def _covariates(
        self, folder: Path, predictions: Predictions, folds: Sequence[OuterFold], *, is_balanced: bool
    ) -> dict[str, Any]:
        """Return the entry of `outputs.json`; write the predictions of the compared models."""
        cases, inner = self.data.cases, InnerPredictions.read(folder, predictions.task)
        runs = compared_predictions(predictions, inner, self.covariates, self.data, folds, is_balanced=is_balanced)
        tables = [run.table().assign(model=name) for name, run in runs.items()]
        write_table(folder / "predictions_covariates.csv", pd.concat(tables))
        sizes = [(len(set(cases[fold.train])), len(set(cases[fold.test]))) for fold in folds]
        return covariate_figures(runs, columns_record(self.covariates, cases), sizes)
