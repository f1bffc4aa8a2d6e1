"""The plain model: the usual linear models, and inputs that know the training slides alone."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from utils.bags.described_columns import Column
from utils.learning.plain_model import PlainModel, encoded
from utils.tasks.classification import Classification
from utils.tasks.multilabel import Multilabel
from utils.tasks.ordinal import Ordinal
from utils.tasks.regression import Regression
from utils.tasks.survival import Survival

N = 200
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((N, 3))
SIGNAL = INPUTS @ [1.0, -0.5, 0.0]
CASES = np.arange(N).astype(str)


def fit(task, targets, inputs=INPUTS, cases=CASES, *, is_balanced=False) -> PlainModel:
    return PlainModel.fit(task, inputs, targets, cases, is_balanced=is_balanced)


def test_of_two_classes_it_is_logistic_regression():
    labels = (SIGNAL + RNG.logistic(size=N) > 0).astype(int)
    found = fit(Classification(("a", "b")), labels).values(INPUTS)
    # Both classes have weights of opposite sign here, which share the penalty.
    expected = LogisticRegression(C=2, tol=1e-8).fit(INPUTS, labels).predict_proba(INPUTS)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_of_numbers_with_small_errors_it_is_ridge_regression():
    numbers = 50 + 10 * SIGNAL + 0.1 * RNG.standard_normal(N)
    task = Regression("x").fitted_to(numbers, CASES.tolist())
    expected = Ridge(alpha=1).fit(INPUTS, numbers).predict(INPUTS)
    np.testing.assert_allclose(fit(task, numbers).values(INPUTS)[:, 0], expected, atol=0.1)


def test_a_higher_sum_means_a_higher_grade_and_an_earlier_event():
    grades = np.digitize(SIGNAL + 0.3 * RNG.standard_normal(N), [-0.7, 0.7])
    ordinal = Ordinal("grade", ("low", "mid", "high"))
    assert np.corrcoef(ordinal.scores(fit(ordinal, grades).values(INPUTS))[:, 0], SIGNAL)[0, 1] > 0.95
    times = np.stack([RNG.exponential(np.exp(-2 * SIGNAL)) + 0.01, RNG.random(N) < 0.7], axis=1)
    survival = Survival("t", "e").of_cohort(times, CASES.tolist()).fitted_to(times, CASES.tolist())
    model = fit(survival, times)
    assert model.weights.shape == (3, 1), "proportional: a weight for all bins"
    assert survival.unweighted_metrics(times, model.values(INPUTS))["c_index"] > 0.75


def test_labels_that_are_unknown_do_not_count():
    labels = np.stack([SIGNAL > 0, SIGNAL < 0], axis=1).astype(int)
    labels[::2, 1] = -1
    values = fit(Multilabel(("A", "B")), labels).values(INPUTS)
    assert ((values[:, 0] > 0.5) == (SIGNAL > 0)).mean() > 0.95
    assert ((values[:, 1] > 0.5) == (SIGNAL < 0)).mean() > 0.95


def test_slides_of_a_patient_weigh_as_much_as_one():
    labels = (SIGNAL + RNG.logistic(size=N) > 0).astype(int)
    task, twice = Classification(("a", "b")), np.repeat(np.arange(N), 2)
    found = fit(task, labels[twice], INPUTS[twice], CASES[twice]).values(INPUTS)
    np.testing.assert_allclose(found, fit(task, labels).values(INPUTS), atol=2e-3)


class TestInputs:
    COLUMNS = (
        Column.of("age", ["40", "60", "NA", "80", "1000", "NA"]),
        Column.of("sex", ["m", "f", "m", "NA", "x", "f"]),
    )
    TRAIN = np.arange(4)

    def test_numbers_are_standardised_and_words_become_marks(self):
        inputs = encoded(self.COLUMNS, self.TRAIN)
        np.testing.assert_allclose(inputs[:4, 0], [-np.sqrt(2), 0, 0, np.sqrt(2)])
        assert inputs[:, 1].tolist() == [0, 0, 1, 0, 0, 1], "age is unknown"
        # Sorted: unknown, f, m. Nothing is known of x.
        assert inputs[:, 2:].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]]

    def test_other_slides_change_nothing(self):
        changed = (
            Column.of("age", ["40", "60", "NA", "80", "-5", "7"]),
            Column.of("sex", ["m", "f", "m", "NA", "y", "z"]),
        )
        np.testing.assert_array_equal(encoded(self.COLUMNS, self.TRAIN)[:4], encoded(changed, self.TRAIN)[:4])

    @pytest.mark.parametrize("cells", [["NA"] * 4 + ["1", "2"], ["5"] * 4 + ["1", "2"]])
    def test_a_number_that_training_slides_do_not_vary_in_is_finite(self, cells):
        assert np.isfinite(encoded([Column.of("age", cells)], self.TRAIN)).all()
