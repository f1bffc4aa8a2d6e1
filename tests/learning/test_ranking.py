"""Trainings are ordered by their validation."""

import pytest

from tests.small import TASK
from utils.core.errors import TrainingError
from utils.learning.ranking import best_of, mean_rank, rank, refit_epochs


def validation(**figures: float | None) -> dict[str, float | None]:
    return {f"val_{name}": value for name, value in ({"loss": 1.0, "auc": 0.5} | figures).items()}


class TestRank:
    def test_greater_is_better_for_scores_and_losses(self):
        assert rank(TASK, validation(auc=0.9), "slide_auc") > rank(TASK, validation(auc=0.8, loss=0.1), "slide_auc")
        assert rank(TASK, validation(loss=0.4), "slide_loss") > rank(TASK, validation(loss=0.5, auc=1.0), "slide_loss")
        assert rank(TASK, validation(f1_macro=0.7), "slide_f1_macro") > rank(
            TASK, validation(f1_macro=0.6), "slide_f1_macro"
        )

    def test_of_some_metrics_the_smaller_is_better(self):
        assert rank(TASK, validation(brier=0.1), "slide_brier") > rank(TASK, validation(brier=0.2), "slide_brier")

    def test_ties_are_decided_by_the_loss(self):
        assert rank(TASK, validation(loss=0.4), "slide_auc") > rank(TASK, validation(loss=0.5), "slide_auc")

    def test_an_undefined_score_chooses_nothing(self):
        with pytest.raises(TrainingError, match=r"slide_auc is undefined.*--monitor slide_loss"):
            rank(TASK, validation(auc=None), "slide_auc")

    def test_settings_are_compared_by_their_inner_folds_mean(self):
        steady = [validation(auc=0.8), validation(auc=0.8)]
        lucky = [validation(auc=0.99), validation(auc=0.5)]
        ranks = [mean_rank(TASK, one, "slide_auc") for one in (lucky, steady)]
        assert ranks[0] == pytest.approx((0.745, -1))
        assert best_of(ranks) == 1

    def test_the_first_of_equals_is_taken(self):
        assert best_of([(0.5, -1.0), (0.7, -1.0), (0.7, -1.0)]) == 1


@pytest.mark.parametrize(("epochs", "expected"), [([3], 3), ([1, 9, 4], 4), ([3, 4], 4), ([2, 4, 6, 20], 5)])
def test_refit_takes_the_median_epoch(epochs, expected):
    assert refit_epochs(epochs) == expected
