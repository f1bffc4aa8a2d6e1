"""The figures of `outputs.json`, and the slides to look at first."""

from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.predicted import predicted
from utils.evaluation.outputs import GALLERY_SIZE, NO_PATIENTS, gallery_table, outputs_content


def fold(number: int, auc: float | None, threshold: dict | None = None) -> dict:
    return {"fold": number, "chunk": {"accuracy": 0.5}, "slide": {"auc": auc}, "thresholded": threshold}


def test_figures_over_the_folds_leave_out_where_they_are_undefined():
    folds = [fold(1, 0.6), fold(2, None, {"accuracy": 0.8}), fold(3, 0.8)]
    outputs = outputs_content(predicted(), folds, "the column case_id")
    assert outputs["slide_auc_mean"] == pytest.approx(0.7)
    assert outputs["slide_auc_std"] == pytest.approx(np.sqrt(0.02))
    assert outputs["slide_auc_folds"] == 2
    assert outputs["chunk_accuracy_folds"] == 3
    assert (outputs["thresholded_accuracy_mean"], outputs["thresholded_accuracy_folds"]) == (0.8, 1)


def test_the_content_counts_what_was_predicted():
    outputs = outputs_content(predicted(repeats=2), [fold(number, 0.5) for number in range(6)], None)
    assert [outputs[name] for name in ("n_slides", "n_cases", "n_folds", "n_repeats")] == [24, 12, 6, 2]
    assert outputs["class_names"] == ["no", "yes"]
    assert outputs["patients_from"] == NO_PATIENTS
    assert (outputs["pooled_thresholded"], outputs["pooled_calibrated"]) == (None, None)
    assert outputs["pooled"].keys() == outputs["intervals_95"].keys()


def test_the_gallery_has_the_surest_and_the_most_uncertain_slides_by_their_mean():
    whole = predicted(patients=30, repeats=2)
    mean = whole.mean_over_repeats()
    surest = dict(zip(mean.slides, mean.values.max(axis=1), strict=True))
    is_correct = dict(zip(mean.slides, mean.task.decide(mean.values) == mean.labels, strict=True))
    table = gallery_table(whole)
    kinds = {kind: rows["wsi_id"].tolist() for kind, rows in table.groupby("kind", sort=False)}
    assert list(kinds) == ["surest correct", "surest wrong", "most uncertain"]
    for kind, order in (("surest correct", -1), ("surest wrong", -1), ("most uncertain", 1)):
        slides = [slide for slide in surest if kind == "most uncertain" or is_correct[slide] == (kind[7:] == "correct")]
        assert kinds[kind] == sorted(slides, key=lambda slide: order * surest[slide])[:GALLERY_SIZE]
    row = table.iloc[0]
    index = mean.slides.tolist().index(row["wsi_id"])
    assert row["prob_yes"] == mean.values[index, 1]
    assert (row["label"], row["predicted"]) == (("no", "yes")[mean.labels[index]],) * 2


def test_of_slides_that_are_all_right_none_is_wrong():
    whole = predicted()
    right = replace(whole, values=np.where(np.eye(2)[whole.labels] > 0, 0.9, 0.1))
    assert set(gallery_table(right)["kind"]) == {"surest correct", "most uncertain"}
