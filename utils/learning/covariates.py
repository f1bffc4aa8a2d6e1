"""Plain models of covariates, alone and together with the slides, on the folds of a cross-validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from utils.bags.dataset import MILDataset
from utils.bags.described_columns import Column
from utils.evaluation.predictions import Predictions
from utils.learning.inner_predictions import InnerPredictions
from utils.learning.plain_model import PlainModel, encoded, scaled
from utils.learning.splits import OuterFold

BOTH, ALONE, SLIDES = "slides and covariates", "covariates alone", "slides alone"


def compared_predictions(
    slides: Predictions,
    inner: InnerPredictions,
    columns: Sequence[Column],
    data: MILDataset,
    folds: Sequence[OuterFold],
    *,
    is_balanced: bool,
) -> dict[str, Predictions]:
    """Return the out-of-fold predictions of a plain model of slides and covariates, of one of the covariates alone, and
    those of the `slides`, whose rows all have.

    Covariates alone are fitted to a fold's outer training slides. Both are fitted to its inner validation slides, where
    the answers of the models that did not see a slide are inputs beside the covariates. Each tested model's answer of a
    test slide then gives one answer of both, and these are averaged.
    """
    alone, both = np.empty_like(slides.values), np.empty_like(slides.values)
    for fold in folds:
        rows = np.flatnonzero(slides.folds == fold.number)
        models = _FoldModels(data, columns, fold, is_balanced=is_balanced)
        test = _numbers(data, slides.slides[rows])
        alone[rows] = models.alone(test)
        both[rows] = models.both(inner, test)
    plain = replace(slides, calibrated=None, decisions=None)
    return {BOTH: replace(plain, values=both), ALONE: replace(plain, values=alone), SLIDES: plain}


class _FoldModels:
    """The plain models of an outer fold."""

    def __init__(self, data: MILDataset, columns: Sequence[Column], fold: OuterFold, *, is_balanced: bool) -> None:
        self.data, self.columns, self.fold, self.is_balanced = data, columns, fold, is_balanced
        self.task = data.fitted_to(fold.train).task

    def alone(self, test: np.ndarray) -> np.ndarray:
        """Return the values `(n, C)` of the test slides by the covariates alone."""
        inputs = encoded(self.columns, self.fold.train)
        return self._fit(inputs[self.fold.train], self.fold.train).values(inputs[test])

    def both(self, inner: InnerPredictions, test: np.ndarray) -> np.ndarray:
        """Return the values `(n, C)` of the test slides by both.

        Models differ in the scale of their answers, which is that of each one's own validation slides; of a tested
        model that is none of the inner ones, their mean.
        """
        validated, tested = inner.validation(self.fold.number), inner.tested(self.fold.number)
        train = np.concatenate([_numbers(self.data, rows.slides) for rows in validated])
        inputs, scores = encoded(self.columns, train), [self.task.scores(rows.values) for rows in validated]
        scales = [(each.mean(axis=0), each.std(axis=0)) for each in scores]
        known = np.concatenate([scaled(each, *scale) for each, scale in zip(scores, scales, strict=True)])
        model = self._fit(np.concatenate([inputs[train], known], axis=1), train)
        if len(tested) != len(validated):
            scales = [tuple(np.mean(part, axis=0) for part in zip(*scales, strict=True))] * len(tested)
        answers = []
        for rows, scale in zip(tested, scales, strict=True):
            place = {wsi_id: row for row, wsi_id in enumerate(rows.slides.tolist())}
            values = rows.values[[place[self.data.rows[slide].wsi_id] for slide in test.tolist()]]
            answers.append(
                model.values(np.concatenate([inputs[test], scaled(self.task.scores(values), *scale)], axis=1))
            )
        return np.mean(answers, axis=0)

    def _fit(self, inputs: np.ndarray, slides: np.ndarray) -> PlainModel:
        labels, cases = self.data.labels[slides], self.data.cases[slides]
        return PlainModel.fit(self.task, inputs, labels, cases, is_balanced=self.is_balanced)


def _numbers(data: MILDataset, slides: np.ndarray) -> np.ndarray:
    """Return the numbers of slides in the dataset, given their ids `(n,)`."""
    number_of: Mapping[str, int] = {row.wsi_id: number for number, row in enumerate(data.rows)}
    return np.array([number_of[wsi_id] for wsi_id in slides.tolist()])
