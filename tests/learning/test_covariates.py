"""What is stacked on the answers of inner models."""

from types import SimpleNamespace

import numpy as np

from utils.bags.described_columns import Column
from utils.evaluation.predictions import Predictions
from utils.learning.covariates import BOTH, SLIDES, compared_predictions
from utils.learning.inner_predictions import InnerPredictions
from utils.learning.splits import InnerFold, OuterFold
from utils.tasks.classification import Classification
from utils.tasks.metrics import weighted_metrics

TASK = Classification(("no", "yes"))


def test_models_whose_answers_differ_in_scale_are_stacked_each_on_its_own():
    """Two inner models rank alike, one near 0.01 and one near 0.99: pooled as they are, their answers say little."""
    rng, count = np.random.default_rng(0), 300
    labels, names = np.arange(count) % 2, np.arange(count).astype(str)
    odds = 1.2 * (2 * labels - 1) + rng.normal(size=count)
    train, test = np.arange(200), np.arange(200, 300)
    inner = tuple(InnerFold(np.setdiff1d(train, val), val) for val in (train[:100], train[100:]))
    fold = OuterFold(1, test, inner)

    def rows(slides: np.ndarray, shift: float) -> Predictions:
        positive = 1 / (1 + np.exp(-(odds[slides] + shift)))
        values = np.stack([1 - positive, positive], axis=1)
        ones = np.ones(len(slides), dtype=int)
        return Predictions(names[slides], names[slides], labels[slides], values, TASK, ones, 0, ones)

    parts = [rows(slides, shift) for slides in (None, test) for shift in (-5, 5) if slides is not None]
    parts = [rows(inner[0].val, -5), rows(inner[1].val, 5), *parts]
    columns = ("slides", "cases", "labels", "values", "repeats", "folds")
    merged = Predictions(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns}, task=TASK, seed=0
    )
    validation = np.repeat([True, False], [200, 200])
    models = np.repeat([1, 2, 1, 2], 100)
    data = SimpleNamespace(
        rows=[SimpleNamespace(wsi_id=name) for name in names], labels=labels, cases=names,
        fitted_to=lambda _: SimpleNamespace(task=TASK),
    )  # fmt: skip
    noise = Column.of("noise", [f"{value:.4f}" for value in rng.normal(size=count)])
    compared = compared_predictions(
        rows(test, 0), InnerPredictions(merged, validation, models), [noise], data, [fold], is_balanced=True
    )
    auc = {
        name: weighted_metrics(run.labels, run.values, np.ones((1, 100)))["auc"][0] for name, run in compared.items()
    }
    assert auc[SLIDES] > 0.9
    assert auc[BOTH] > auc[SLIDES] - 0.02
