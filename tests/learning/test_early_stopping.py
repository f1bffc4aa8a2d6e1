"""Which epoch of a training is kept, and when the training ends."""

import pytest

from tests.learning.runs import Scripted
from utils.learning import training


def two_steps(model_training, _):
    """Stand for an epoch's steps."""
    model_training.steps += 2
    return 1.0


class TestSelection:
    @pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 7), (3, 8), (10, 8)])
    def test_stops_after_patience_epochs_without_a_better_one(self, patience, epochs, train, monkeypatch):
        monkeypatch.setattr(training, "validate", Scripted([0.5, 0.6, 0.5, 0.7, 0.7, 0.6, 0.6, 0.6], [1.0] * 8))
        assert len(train(epochs=8, patience=patience, batch_size=100).history) == epochs

    def test_of_equal_aucs_the_later_epoch_is_kept_whatever_the_loss(self, train, monkeypatch):
        monkeypatch.setattr(training, "validate", Scripted([0.9, 0.9, 0.9, 0.8], [0.5, 0.4, 0.6, 0.1]))
        assert train(epochs=4).epoch == 3

    def test_of_equal_losses_the_later_epoch_is_kept(self, train, monkeypatch):
        monkeypatch.setattr(training, "validate", Scripted([0.5] * 4, [0.5, 0.4, 0.4, 0.6]))
        assert train(epochs=4, monitor="slide_loss").epoch == 3

    @pytest.mark.parametrize(("least_steps", "kept"), [(0, 1), (2, 1), (3, 3), (6, 3), (7, 5), (100, 5)])
    def test_no_epoch_is_kept_before_the_least_steps_but_the_last(self, least_steps, kept, train, monkeypatch):
        """An epoch of 16 slides in batches of 8 chunks takes 2 or more steps."""
        monkeypatch.setattr(training, "validate", Scripted([0.9, 0.5, 0.7, 0.5, 0.6], [1.0] * 5))
        monkeypatch.setattr(training.ModelTraining, "_steps", two_steps)
        assert train(epochs=5, least_steps=least_steps).epoch == kept

    def test_no_training_stops_before_the_least_steps(self, train, monkeypatch):
        monkeypatch.setattr(
            training, "validate", Scripted([0.9] + [0.5 - 0.01 * epoch for epoch in range(9)], [1.0] * 10)
        )
        monkeypatch.setattr(training.ModelTraining, "_steps", two_steps)
        fitted = train(epochs=10, least_steps=10, patience=2)
        assert (fitted.epoch, len(fitted.history)) == (5, 7)

    @pytest.mark.parametrize(("warmup_epochs", "epochs"), [(0, 2), (1, 2), (4, 5), (100, 6)])
    def test_no_training_stops_within_its_warm_up(self, warmup_epochs, epochs, train, monkeypatch):
        """Which takes at most a quarter of the epochs: here 5."""
        monkeypatch.setattr(training, "validate", Scripted([0.9] + [0.5] * 19, [1.0] * 20))
        fitted = train(epochs=20, patience=1, warmup_epochs=warmup_epochs)
        assert (fitted.epoch, len(fitted.history)) == (1, epochs)

    def test_the_last_epoch_is_kept_where_that_is_asked_for(self, train, monkeypatch):
        monkeypatch.setattr(training, "validate", Scripted([0.9, 0.5, 0.5, 0.4], [0.1, 1.0, 1.0, 1.0]))
        fitted = train(epochs=4, patience=1, keep="last")
        assert (fitted.epoch, len(fitted.history), fitted.validation["val_auc"]) == (4, 4, 0.4)

    def test_the_loss_chooses_where_it_is_monitored(self, train, monkeypatch):
        monkeypatch.setattr(training, "validate", Scripted([0.9, None, 0.8], [0.5, 0.4, 0.6]))
        assert train(epochs=3, monitor="slide_loss").epoch == 2
