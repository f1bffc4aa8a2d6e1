import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lifelines.utils import concordance_index
from torchsurv.metrics.auc import Auc
from torchsurv.metrics.brier_score import BrierScore
from torchsurv.metrics.cindex import ConcordanceIndex
from torchsurv.stats.ipcw import get_ipcw

from tests.tasks.drawn_survival import drawn_patients, once
from utils.tasks.survival_metrics import (
    brier_scores,
    concordance,
    concordance_ipcw,
    constant_strata,
    dynamic_auc,
    integrated_brier,
    tied_share,
)

TIMES, TAU = np.array([2.5, 6.5, 11.5]), 9.5
CURVES = np.array([0.9, 0.7, 0.4])

# The means over five folds that were published with the predictions: of the multimodal model, and of slides alone.
PUBLISHED = {
    "blca": (0.624, 0.536), "brca": (0.580, 0.564), "gbmlgg": (0.818, 0.787), "luad": (0.620, 0.559),
    "ucec": (0.622, 0.625),
}  # fmt: skip


def all_metrics(targets: np.ndarray, risks: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric that takes weights; strata and curves follow from the risks."""
    strata, curves = (risks > 0).astype(int), CURVES ** np.exp(risks)[:, None]
    aucs, scores = dynamic_auc(targets, risks, TIMES, weights), brier_scores(targets, curves, TIMES, weights)
    return {
        "Harrell": concordance(targets, risks, weights),
        "Harrell within": concordance(targets, risks, weights, strata),
        "Uno": concordance_ipcw(targets, risks, weights, TAU),
        "Uno within": concordance_ipcw(targets, risks, weights, TAU, strata),
        **{f"AUC at {time}": aucs[:, column] for column, time in enumerate(TIMES)},
        **{f"Brier at {time}": scores[:, column] for column, time in enumerate(TIMES)},
        "Brier": integrated_brier(targets, curves, TIMES, weights),
    }


def pairs_by_hand(targets: np.ndarray, risks: np.ndarray, strata: np.ndarray) -> float:
    """Harrell's C within strata, pair by pair."""
    scores = [
        (risk > other_risk) + (risk == other_risk) / 2
        for (time, event), risk, stratum in zip(targets, risks, strata, strict=True)
        for (other_time, other_event), other_risk, other_stratum in zip(targets, risks, strata, strict=True)
        if event and stratum == other_stratum and (time < other_time or (time == other_time and not other_event))
    ]
    return float(np.mean(scores))


def as_tensors(targets: np.ndarray, values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What torchsurv takes: values, events, times."""
    return torch.tensor(values).float(), torch.tensor(targets[:, 1] == 1), torch.tensor(targets[:, 0]).float()


@given(st.integers(10, 60), st.integers(0, 10_000))
def test_harrells_c_is_that_of_lifelines(count, seed):
    targets, risks = drawn_patients(count, seed)
    targets[targets[:, 0].argmin(), 1] = 1  # at least one pair
    (value,) = concordance(targets, risks, once(targets))
    assert value == pytest.approx(concordance_index(targets[:, 0], -risks, targets[:, 1]))


@pytest.mark.parametrize("seed", range(5))
def test_harrells_c_within_strata_compares_no_others(seed):
    targets, risks = drawn_patients(50, seed)
    strata = np.random.default_rng(seed).integers(4, size=50)
    assert concordance(targets, risks, once(targets), strata) == pytest.approx(pairs_by_hand(targets, risks, strata))
    shifted = concordance(targets, risks + 100 * strata, once(targets), strata)
    assert shifted == pytest.approx(pairs_by_hand(targets, risks, strata))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_weights_for_censoring_give_torchsurvs_metrics(seed, ties):
    targets, risks = drawn_patients(80, seed, ties)
    estimate, event, time = as_tensors(targets, risks)
    # Where times tie, torchsurv takes the probability just after an event; the time before gives that just before it.
    weight = get_ipcw(event, time, time - 0.5 if ties else time)
    moments = torch.tensor(TIMES).float()
    at_moments = get_ipcw(event, time, moments)

    for tau, tmax in ((np.inf, None), (TAU, torch.tensor(TAU))):
        reference = ConcordanceIndex()(estimate, event, time, weight=weight, tmax=tmax)
        assert concordance_ipcw(targets, risks, once(targets), tau) == pytest.approx(reference.item(), abs=1e-5)

    reference = Auc()(estimate, event, time, weight=weight, new_time=moments, weight_new_time=at_moments)
    assert dynamic_auc(targets, risks, TIMES, once(targets))[0] == pytest.approx(reference.numpy(), abs=1e-5)

    curves, brier = CURVES ** np.exp(risks)[:, None], BrierScore()
    reference = brier(torch.tensor(curves).float(), event, time, moments, weight, at_moments)
    assert brier_scores(targets, curves, TIMES, once(targets))[0] == pytest.approx(reference.numpy(), abs=1e-5)
    integral = integrated_brier(targets, curves, TIMES, once(targets))
    assert integral == pytest.approx(brier.integral().item(), abs=1e-5)


@given(st.integers(5, 40), st.integers(0, 10_000))
def test_a_weight_counts_as_copies_of_a_patient(count, seed):
    targets, risks = drawn_patients(count, seed)
    weights = np.random.default_rng(seed).integers(0, 4, size=(3, count)).astype(float)
    weighted = all_metrics(targets, risks, weights)
    for row, copies in enumerate(weights.astype(int)):
        repeated = np.repeat(targets, copies, axis=0), np.repeat(risks, copies)
        if copies.any():
            for name, (value,) in all_metrics(*repeated, once(repeated[0])).items():
                assert weighted[name][row] == pytest.approx(value, nan_ok=True), name


def test_many_pairs_are_compared_in_blocks(monkeypatch):
    targets, risks = drawn_patients(60, 0)
    weights = np.random.default_rng(0).integers(0, 3, size=(4, 60)).astype(float)
    whole = all_metrics(targets, risks, weights)
    monkeypatch.setattr("utils.tasks.survival_metrics._BLOCK_PAIRS", 100)
    for name, values in all_metrics(targets, risks, weights).items():
        assert values == pytest.approx(whole[name]), name


def test_unos_c_does_not_depend_on_who_is_censored():
    rng = np.random.default_rng(0)
    risks = rng.normal(size=4000)
    times = rng.exponential(np.exp(-risks))
    everybody = np.stack([times, np.ones(4000)], axis=1)
    (truth,) = concordance_ipcw(everybody, risks, once(everybody), tau=1.0)
    follow_up = rng.exponential(0.7, size=4000)
    targets = np.stack([np.minimum(times, follow_up), times <= follow_up], axis=1)
    assert concordance_ipcw(targets, risks, once(targets), tau=1.0) == pytest.approx(truth, abs=0.01)
    assert concordance(targets, risks, once(targets))[0] > truth + 0.01  # Harrell's C does


def test_without_censoring_all_weights_are_one():
    targets, risks = drawn_patients(50, 1, events=1.1)
    figures = all_metrics(targets, risks, once(targets))
    assert concordance_ipcw(targets, risks, once(targets), np.inf) == pytest.approx(figures["Harrell"])
    alive = targets[:, :1] > TIMES
    errors = (alive - CURVES ** np.exp(risks)[:, None]) ** 2
    assert [figures[f"Brier at {time}"][0] for time in TIMES] == pytest.approx(errors.mean(axis=0))


def test_without_an_event_nothing_ranks():
    targets, risks = drawn_patients(50, 2, events=0)
    figures = all_metrics(targets, risks, once(targets))
    assert all(np.isnan(values).all() for name, values in figures.items() if not name.startswith("Brier"))
    # All who are still followed have survived, so that only the distance from 1 counts.
    left = targets[:, 0] > TIMES[0]
    assert figures["Brier at 2.5"] == pytest.approx(np.mean((1 - CURVES[0] ** np.exp(risks[left])) ** 2))


def test_one_patient_has_no_pair():
    figures = all_metrics(np.array([[5.0, 1.0]]), np.array([1.0]), np.ones((2, 1)))
    assert all(np.isnan(values).all() for name, values in figures.items() if not name.startswith("Brier"))
    assert figures["Brier at 6.5"] == pytest.approx((CURVES[1] ** np.exp(1)) ** 2)


def test_an_event_at_the_very_time_has_occurred_by_then():
    targets, risks = np.array([[2.0, 1], [4, 1], [6, 0]]), np.array([1, 3, 2])
    assert dynamic_auc(targets, risks, np.array([2.0, 4]), once(targets)).tolist() == [[0, 0.5]]
    assert concordance_ipcw(targets, risks, once(targets), tau=4) == 0  # only the event at 2 is before tau
    assert concordance_ipcw(targets, risks, once(targets), tau=4.1) == pytest.approx(1 / 3)


def test_nobody_counts():
    targets, risks = drawn_patients(10, 3)
    assert all(np.isnan(values).all() for values in all_metrics(targets, risks, np.zeros((2, 10))).values())


def test_no_brier_score_after_all_have_been_censored():
    targets = np.array([[1.0, 1], [2, 0], [3, 0]])
    scores = brier_scores(targets, np.full((3, 3), 0.5), np.array([1.0, 2.5, 3.0]), once(targets))
    assert scores[0, :2] == pytest.approx(0.25)
    assert np.isnan(scores[0, 2])
    assert np.isnan(integrated_brier(targets, np.full((3, 3), 0.5), np.array([1.0, 2.5, 3.0]), once(targets)))


def test_a_score_at_one_time_is_its_own_mean():
    targets, _ = drawn_patients(20, 4)
    curves, times = np.full((20, 1), 0.7), np.array([3.0])
    assert integrated_brier(targets, curves, times, once(targets)) == brier_scores(
        targets, curves, times, once(targets)
    )


def test_constant_risks_are_detected():
    targets, risks = drawn_patients(40, 5)
    folds, constant = np.arange(40) % 4, np.full(40, -2.3)
    assert concordance(targets, constant, once(targets)) == 0.5
    assert concordance_ipcw(targets, constant, once(targets), TAU) == 0.5
    assert tied_share(targets, constant) == 1
    assert tied_share(targets, np.arange(40)) == 0
    assert 0 < tied_share(targets, risks) < 0.1
    assert tied_share(targets, folds * 1.0) < tied_share(targets, folds * 1.0, folds) == 1
    dead = np.where(np.isin(folds, [1, 3]), -2.3, risks).astype(np.float32)
    dead[3] = np.nextafter(dead[3], np.float32(0))
    assert constant_strata(dead, folds).tolist() == [1, 3]
    assert constant_strata(constant, np.zeros(40)).tolist() == [0]
    assert constant_strata(risks, folds).tolist() == []


def read_predictions(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Targets, risks and folds of each model."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    models: dict[str, list[list[float]]] = {}
    for line in lines:
        row = [float(line["survival_months"]), 1 - float(line["censorship"]), float(line["risk"]), int(line["fold"])]
        models.setdefault(line["model"], []).append(row)
    return {name: (rows[:, :2], rows[:, 2], rows[:, 3]) for name, rows in ((n, np.array(r)) for n, r in models.items())}


def mean_over_folds(targets: np.ndarray, risks: np.ndarray, folds: np.ndarray) -> float:
    rows_of = [folds == fold for fold in np.unique(folds)]
    return float(np.mean([concordance(targets[rows], risks[rows], once(targets[rows])) for rows in rows_of]))


@pytest.fixture
def predictions(shared_data) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Published predictions of eleven models for five cohorts, or a skip."""
    folder = shared_data / "cohorts" / "survival_cv"
    if not folder.is_dir():
        pytest.skip(f"published predictions of survival not there: {folder}")
    return {cohort: read_predictions(folder / f"tcga_{cohort}.csv") for cohort in PUBLISHED}


def test_published_means_over_folds(predictions):
    """All ten come out where an event and a censoring at the same time are no pair, as for a censoring a moment before.

    They are a pair for us, as for lifelines. That changes the third decimal of one mean.
    """
    ours = {}
    for cohort, published in PUBLISHED.items():
        for model, value in zip(("MCATsm-concat", "AMILsm-sig"), published, strict=True):
            targets, risks, folds = predictions[cohort][model]
            before = targets - np.stack([1e-6 * (targets[:, 1] == 0), np.zeros(len(targets))], axis=1)
            assert round(mean_over_folds(before, risks, folds), 3) == value, (cohort, model)
            ours[cohort, model] = round(mean_over_folds(targets, risks, folds), 3), value
    assert {key: pair for key, pair in ours.items() if pair[0] != pair[1]} == {
        ("gbmlgg", "MCATsm-concat"): (0.817, 0.818)
    }


def test_dead_baselines_of_a_published_table_are_named(predictions):
    dead = {
        (cohort, model): constant_strata(risks, folds).astype(int).tolist()
        for cohort, models in predictions.items()
        for model, (_, risks, folds) in models.items()
        if len(constant_strata(risks, folds))
    }
    everywhere, baseline = [0, 1, 2, 3, 4], "DSsm-sig"
    assert dead == {
        ("blca", baseline): everywhere, ("brca", baseline): everywhere, ("ucec", baseline): everywhere,
        ("gbmlgg", baseline): [2, 4], ("luad", baseline): [4],
    }  # fmt: skip
    for cohort in ("blca", "brca", "ucec"):
        assert mean_over_folds(*predictions[cohort][baseline]) == 0.5
    # In the other two, a handful of patients differ from the rest: hardly a pair is ranked.
    for cohort, models in predictions.items():
        ties = {model: tied_share(*columns) for model, columns in models.items()}
        assert {model for model, share in ties.items() if share > 0.1} == {baseline}, cohort
        assert ties[baseline] > 0.95


def test_metrics_are_computed_without_pytorch():
    names = "utils.tasks.survival_metrics, utils.tasks.hazards"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
