"""The figures of one outer fold."""

import math

import numpy as np
import pytest

from tests.small import TASK, classification_metrics
from utils.prediction.checkpoint import load_checkpoint
from utils.prediction.forward_pass import SlideFeed, predict_features
from utils.tasks.calibration import Scaling


class TestOutputs:
    def test_the_scaling_is_the_checkpoints_and_calibrates_the_test_slides(self, finished, dataset):
        rows = finished.table()
        raw, scaled = (
            np.array([[float(row[f"{kind}_benign"]), float(row[f"{kind}_malignant"])] for row in rows])
            for kind in ("prob", "calibrated")
        )
        for result in finished.results["fold_results"]:
            checkpoint = load_checkpoint(finished.folder / f"fold_{result['fold']}_best.pth")
            assert checkpoint.temperature == result["temperature"]
            assert checkpoint.prior == pytest.approx((0.5, 0.5))
            part = np.array([int(row["fold"]) == result["fold"] for row in rows])
            scaling = Scaling(checkpoint.temperature, checkpoint.intercepts, checkpoint.prior)
            np.testing.assert_allclose(scaled[part], scaling.apply(raw[part]))
            assert result["intercepts"] == pytest.approx(checkpoint.intercepts)
        figures = classification_metrics(dataset.labels, scaled)
        assert finished.results["pooled_calibrated"] == pytest.approx(
            {name: figures[name] for name in ("brier", "ece")}
        )
        assert not np.allclose(raw, scaled)

    def test_chunk_accuracy_counts_chunks(self, finished, dataset):
        for result in finished.results["fold_results"]:
            model = load_checkpoint(finished.folder / f"fold_{result['fold']}_best.pth").build()
            right = []
            for slide, row in enumerate(finished.table()):
                if int(row["fold"]) == result["fold"]:
                    output = predict_features(TASK, model, dataset.features(slide), SlideFeed(20, "mean"))
                    assert len(output.chunk_sizes) == math.ceil(dataset.info[slide].num_instances / 20)
                    right += (output.chunk_probabilities.argmax(axis=1) == dataset.labels[slide]).tolist()
            assert len(right) > result["n_slides"]
            assert result["chunk"]["accuracy"] == pytest.approx(np.mean(right))
