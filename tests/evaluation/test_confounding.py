"""What predicts the label without tissue is found; chance, and what only tells patients apart, is not."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from utils.evaluation.confounding import (
    FOLDS,
    _cross_validated_auc,
    _fold_groups,
    _Groups,
    _shuffled,
    confounding,
    values_per_class,
)


def patients(rng, count: int, classes: int = 2, slides: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Labels and cases of patients with 1 to `slides` slides, all of the patient's class."""
    of = np.repeat(np.arange(count), rng.integers(1, slides, count, endpoint=True))
    return rng.integers(0, classes, count)[of], np.array([f"P{patient}" for patient in of])


def by_patient(cases: np.ndarray, values) -> list:
    """One value per patient, on all of the patient's slides."""
    return [values[patient] for patient in np.unique(cases, return_inverse=True)[1]]


@pytest.mark.parametrize("classes", [2, 3])
def test_the_auc_equals_a_plain_cross_validation(classes):
    rng = np.random.default_rng(classes)
    labels, values, fold = rng.integers(0, classes, 60), rng.integers(0, 6, 60), rng.integers(0, FOLDS, 60)
    scores = np.empty((60, classes))
    for slide in range(60):
        peers = labels[(values == values[slide]) & (fold != fold[slide])]
        scores[slide] = [((peers == c).sum() + (labels == c).mean()) / (len(peers) + 1) for c in range(classes)]
    pairs, of_slide = np.unique(values * FOLDS + fold, return_inverse=True)
    found = _cross_validated_auc(labels[None], _Groups(of_slide, pairs // FOLDS), classes)
    plain = roc_auc_score(labels, scores.round(9)[:, 1] if classes == 2 else scores.round(9), multi_class="ovr")
    assert found == pytest.approx([plain], abs=1e-12)


def test_folds_keep_patients_whole():
    patient_of = np.repeat(np.arange(20), 4)
    groups = _fold_groups(np.zeros(80, dtype=int), patient_of, seed=0)
    folds = groups.of_slide.reshape(20, 4)
    assert (folds == folds[:, :1]).all()
    assert np.bincount(folds[:, 0]).tolist() == [4] * FOLDS


def test_shuffling_moves_patients_as_one():
    labels = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    rows = _shuffled(labels, np.repeat(np.arange(4), 2), 200, np.random.default_rng(0))
    pairs = [[tuple(pair) for pair in row.reshape(4, 2).tolist()] for row in rows]
    assert all(sorted(map(sorted, row)) == [[0, 0], [0, 1], [1, 1], [2, 2]] for row in pairs)
    assert {(0, 1), (1, 0)} <= {pair for row in pairs for pair in row}
    assert len({tuple(row) for row in pairs}) == 48  # 4! orders of the patients, 2 of the mixed one's slides


def test_a_patients_labels_fall_on_slides_in_any_order():
    rows = _shuffled(np.arange(4), np.zeros(4, dtype=int), 500, np.random.default_rng(0))
    assert len({tuple(row) for row in rows.tolist()}) == 24


def test_patients_of_unequal_size_give_all_their_slides_one_donor():
    labels, patient_of = np.array([0, 1, 1, 1]), np.array([0, 1, 1, 1])
    rows = _shuffled(labels, patient_of, 100, np.random.default_rng(0))
    assert {tuple(row) for row in rows.tolist()} == {(0, 1, 1, 1), (1, 0, 0, 0)}


@pytest.mark.parametrize("level", ["patient", "slide"])
def test_p_is_uniform_where_there_is_nothing_to_find(level):
    """Held-out frequencies run against held-out labels: without the shuffled labels' help, chance looks below 0.5."""
    p_values, aucs = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels, cases = patients(rng, 40)
        labels = np.where(rng.random(len(labels)) < 0.1, 1 - labels, labels)  # some patients are of both classes
        sites = [f"site {site}" for site in rng.integers(0, 6, len(labels))]
        result = confounding(by_patient(cases, sites) if level == "patient" else sites, labels, cases, seed, 99)
        assert result is not None
        p_values.append(result.p_value)
        aucs.append(result.auc)
    assert np.mean(aucs) < 0.48
    for cut in (0.05, 0.25, 0.5, 0.75, 0.95):
        spread = 3 * np.sqrt(cut * (1 - cut) / len(p_values))
        assert abs(np.mean(np.array(p_values) <= cut) - cut) < spread, cut


def test_a_field_that_encodes_the_label_is_found():
    rng = np.random.default_rng(0)
    labels, cases = patients(rng, 60)
    sites = [f"{label}{site}" for label, site in zip(labels, by_patient(cases, rng.integers(0, 4, 60)), strict=True)]
    result = confounding(sites, labels, cases)
    assert result is not None
    assert result.auc > 0.95
    assert result.p_value == 0.001
    assert result.shuffled[0] < result.shuffled[1] < result.shuffled[2] < result.auc
    assert (result.values, result.slides) == (8, len(labels))


def test_a_field_that_encodes_the_patient_is_not_found():
    labels, cases = patients(np.random.default_rng(0), 60)
    result = confounding(list(cases), labels, cases)
    assert result is not None
    assert result.auc == pytest.approx(0.5)
    assert result.p_value == 1


def test_a_scanner_for_each_class_is_found_within_patients():
    """Each patient has a tumor slide and a normal one: shuffling patients alone would change nothing."""
    labels, cases = np.tile([0, 1], 20), np.repeat([f"P{patient}" for patient in range(20)], 2)
    result = confounding([("A", "B")[label] for label in labels], labels, cases)
    assert result is not None
    assert (result.auc, result.p_value) == (1, 0.001)


def test_numbers_are_tested_by_size():
    rng = np.random.default_rng(0)
    labels, cases = patients(rng, 60)
    sizes = rng.normal(1000 + 300 * labels, 100)
    found, chance = (confounding(list(values), labels, cases) for values in (sizes, rng.permutation(sizes)))
    assert found is not None
    assert chance is not None
    assert found.auc > 0.9
    assert found.p_value == 0.001
    assert chance.p_value > 0.05
    # Few different numbers are categories, however uneven: quintiles would put both of these into one bin.
    rare = confounding([0.23 if label and slide % 2 else 0.25 for slide, label in enumerate(labels)], labels, cases)
    assert rare is not None
    assert rare.values == 2
    assert rare.p_value < 0.01


def test_three_classes():
    rng = np.random.default_rng(0)
    labels, cases = patients(rng, 60, classes=3)
    result = confounding([str(label) for label in labels], labels, cases)
    assert result is not None
    assert (result.auc, result.p_value) == (1, 0.001)


def test_unknown_values_and_the_order_of_the_rows_do_not_matter():
    rng = np.random.default_rng(0)
    labels, cases = patients(rng, 30)
    labels = np.where(rng.random(len(labels)) < 0.1, 1 - labels, labels)
    values = [None if value == 0 else str(value) for value in rng.integers(0, 4, len(labels))]
    order = rng.permutation([slide for slide, value in enumerate(values) if value is not None])
    one = confounding(values, labels, cases, permutations=99)
    other = confounding([values[slide] for slide in order], labels[order], cases[order], permutations=99)
    assert one == other


@pytest.mark.parametrize(
    ("values", "labels", "cases"),
    [
        (["A", "A", None, "A"], [0, 0, 1, 1], ["P", "Q", "R", "S"]),
        (["A", "B", "A", "B"], [0, 0, 0, 0], ["P", "Q", "R", "S"]),
        (["A", "B", "A", "B"], [0, 0, 1, 1], ["P", "P", "P", "P"]),
        ([None, None, None, None], [0, 0, 1, 1], ["P", "Q", "R", "S"]),
        ([], [], []),
    ],
)
def test_nothing_to_test(values, labels, cases):
    assert confounding(values, np.array(labels, dtype=int), np.array(cases, dtype=str)) is None


def test_values_per_class():
    assert values_per_class(["A", "B", "A", None, "C"], np.array([0, 0, 0, 0, 1]), 3) == [2, 1, 0]
