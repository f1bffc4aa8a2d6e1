"""Which epoch of a training is kept, and when the training ends."""

import pytest

from tests.learning.runs import Scripted
from utils.learning import training


class TestSelection:
    @pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 6), (3, 7), (10, 8)])
    def test_stops_after_patience_epochs_without_a_better_one(self, patience, epochs, train, monkeypatch):
        monkeypatch.setattr(training, "validate", Scripted([0.5, 0.6, 0.5, 0.7, 0.7, 0.6, 0.6, 0.6], [1.0] * 8))
        assert len(train(epochs=8, patience=patience, batch_size=100).history) == epochs

    def test_equal_aucs_are_decided_by_the_loss_then_by_the_earlier_epoch(self, train, monkeypatch):
        monkeypatch.setattr(training, "validate", Scripted([0.9, 0.9, 0.9, 0.8], [0.5, 0.4, 0.4, 0.1]))
        assert train(epochs=4).epoch == 2

    def test_the_loss_chooses_where_it_is_monitored(self, train, monkeypatch):
        monkeypatch.setattr(training, "validate", Scripted([0.9, None, 0.8], [0.5, 0.4, 0.6]))
        assert train(epochs=3, monitor="slide_loss").epoch == 2
