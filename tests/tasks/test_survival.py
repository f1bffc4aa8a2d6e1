"""Survival: targets, loss, values and metrics."""

import numpy as np
import pytest
import torch

from tests.tasks.drawn_survival import drawn_patients
from utils.evaluation.intervals import ScoredRows
from utils.tasks.records import Answer, task_of
from utils.tasks.survival import Survival
from utils.tasks.survival_curves import kaplan_meier

OS = Survival("days", "died")


def patients(targets: np.ndarray) -> list[str]:
    """Patients of one slide each."""
    return [f"P{number}" for number in range(len(targets))]


def of_cohort(targets: np.ndarray) -> Survival:
    return OS.of_cohort(targets, patients(targets))


@pytest.fixture
def cohort() -> tuple[np.ndarray, Survival]:
    targets, _ = drawn_patients(200, 0)
    return targets, of_cohort(targets).fitted_to(targets, patients(targets))


def test_time_and_event_are_read_and_what_is_neither_is_refused():
    assert OS.target({"days": "12.5", "died": "1"}) == (12.5, 1)
    assert OS.target({"days": "12", "died": "0.0"}) == (12, 0)
    for days, died in (
        ("0", "1"),
        ("-3", "0"),
        ("", "1"),
        ("12", ""),
        ("12", "2"),
        ("12", "yes"),
        ("inf", "1"),
        ("nan", "1"),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - of float, or of the task
            OS.target({"days": days, "died": died})
    assert OS.target_text(np.array([[12.5, 1], [700, 0]])).tolist() == ["event at 12.5", "censored at 700"]


def test_a_cohort_without_event_is_refused():
    with pytest.raises(ValueError, match="no row has an event"):
        of_cohort(np.array([[3.0, 0], [5, 0]]))


def test_strata_tell_events_from_censored_patients_and_early_from_late(cohort):
    targets, task = cohort
    strata = task.strata(targets)
    events = targets[:, 1] == 1
    assert set(strata[events]) & set(strata[~events]) == set()
    assert len(task.strata_names) == strata.max() + 1
    assert np.bincount(strata).min() > 0
    early = targets[strata == 0]
    assert early[:, 0].max() <= np.quantile(targets[events, 0], 0.25, method="inverted_cdf")
    assert task.strata_names[0].startswith("event, days up to")


def test_values_are_survival_that_falls_and_a_risk_that_rises_with_hazards(cohort):
    _, task = cohort
    logits = torch.randn(50, 4, dtype=torch.float64)
    values = task.activate(logits)
    assert values.shape == (50, len(task.outputs))
    assert ((values[:, 1:] >= 0) & (values[:, 1:] <= 1)).all()
    assert (np.diff(values[:, 1:], axis=1) <= 1e-12).all()
    assert (task.activate(logits + 1)[:, 0] > values[:, 0]).all()
    assert ((values[:, 0] >= 0) & (values[:, 0] <= task.times[-1])).all(), "time lost until the last time"
    certain = task.activate(torch.full((1, 4), -50.0))
    assert certain[0].tolist() == pytest.approx([0] + [1] * len(task.times), abs=1e-9)
    assert task.activate(logits.view(5, 10, 4)).shape == (5, 10, len(task.outputs))


def test_the_risk_is_the_area_above_the_curve(cohort):
    _, task = cohort
    values = task.activate(torch.randn(1, 4, dtype=torch.float64))[0]
    area = np.trapezoid([1, *values[1:]], [0, *task.times])
    assert values[0] == pytest.approx(task.times[-1] - area)


def test_the_loss_is_least_at_the_hazards_of_the_cohort(cohort):
    targets, task = cohort
    logits = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    rows = torch.tensor(targets, dtype=torch.float32)
    for _ in range(200):
        optimizer.zero_grad()
        loss = task.loss(logits.expand(len(rows), 4), rows, torch.ones(1)).mean()
        loss.backward()
        optimizer.step()
    curve, values = kaplan_meier(targets), task.activate(logits.detach())
    for time, survival in zip(task.times, values[0, 1:], strict=True):
        assert survival == pytest.approx(curve.at(time)[0], abs=0.06)


def test_fewer_different_event_times_than_bins_leave_logits_unused():
    targets = np.array([[4.0, 1], [4, 1], [9, 1], [12, 0]])
    task = of_cohort(targets).fitted_to(targets, patients(targets))
    assert task.edges == (0, 4, 9)
    logits = torch.randn(4, 4, requires_grad=True)
    task.loss(logits, torch.tensor(targets, dtype=torch.float32), torch.ones(1)).sum().backward()
    assert logits.grad is not None
    assert not logits.grad[:, 2:].any()
    assert task.activate(logits.detach()).shape == (4, len(task.outputs))


def test_the_signal_rises_with_every_hazard_and_is_that_of_the_mean_survival(cohort):
    _, task = cohort
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    (signal,) = task.signals(logits, shares)
    signal.backward()
    assert logits.grad is not None
    assert (logits.grad > 0).all()
    survival = np.exp(-np.logaddexp(0, logits.detach().numpy()).sum(axis=1))
    assert signal.item() == pytest.approx(np.log(-np.log(survival @ shares.numpy())))


def test_the_validation_loss_is_the_likelihood_of_what_was_observed(cohort):
    targets, task = cohort
    values = task.activate(torch.randn(len(targets), 4, dtype=torch.float64))
    grid = np.array([0, *task.times])
    logs = []
    for (time, event), row in zip(targets, values[:, 1:], strict=True):
        curve = np.array([1, *row])
        if not event:
            logs.append(np.log(np.interp(time, grid, curve)))
            continue
        place = int(np.searchsorted(grid[1:], time))
        after = 0 if place == len(task.times) else curve[place + 1]
        logs.append(np.log(curve[place] - after))
    assert task.validation(targets, values, np.ones(1))["loss"] == pytest.approx(-np.mean(logs))
    assert OS.why_undefined("c_index", np.array([[3.0, 0]])) == "has no event"


def test_risk_groups_and_dead_models_are_reported(cohort):
    targets, task = cohort
    folds = np.repeat([1, 2], 100)
    values = task.activate(torch.randn(200, 4, dtype=torch.float64))
    values[folds == 2] = values[0]
    fitted = task.fit_on_validation(targets, values, patients(targets), "balanced_accuracy", is_balanced=True)
    decisions = task.decide_by(fitted, values[None])
    assert decisions is not None
    assert decisions.tolist() == (values[:, 0] > np.median(values[:, 0])).tolist(), "above the median is high"
    figures = task.further_figures(targets, values, folds, decisions)
    assert figures["constant_folds"] == [2]
    assert 0.3 < figures["tied_pairs"] < 0.7, "the pairs of the second fold"
    groups = figures["risk_groups"]
    assert groups["low risk"]["n"] + groups["high risk"]["n"] == 200
    assert groups["high risk"]["events"] == targets[decisions == 1, 1].sum()
    assert 0 <= groups["log_rank_p"] <= 1
    words = " ".join(task.closing_sentences(figures))
    assert "The model of fold 2 gives all slides the same risk: it ranks nothing." in words
    assert "log-rank p" in words
    assert task.decide_by({"median_risk": None}, values[None]) is None


def test_a_patient_of_many_slides_counts_once():
    """In the times and strata of the cohort, and in the median risk."""
    once, _ = drawn_patients(200, 0)
    slides = np.repeat(np.arange(200), np.where(np.arange(200) < 20, 30, 1))
    cases = [f"P{number}" for number in slides]
    assert OS.of_cohort(once[slides], cases) == of_cohort(once)
    values = once[:, :1]
    fitted = [
        OS.fit_on_validation(targets, risks, names, "balanced_accuracy", is_balanced=True)
        for targets, risks, names in ((once, values, patients(once)), (once[slides], values[slides], cases))
    ]
    assert fitted[0]["median_risk"] == pytest.approx(fitted[1]["median_risk"]) == pytest.approx(np.median(values))


def test_records_give_the_task_and_its_answer_back(cohort):
    _, task = cohort
    assert task_of(task.record) == task
    values = task.activate(torch.zeros(1, 4, dtype=torch.float64))[0]
    answer = Answer.of({"slide": "S1", **task.answer(values)})
    assert (answer.task, answer.signal) == (task, "died")
    assert list(answer.values) == list(task.outputs)
    title, bars = task.shares(answer.values)
    assert title == "survival until days"
    assert list(bars.values()) == pytest.approx(values[1:])
    assert task.headline(answer.predicted).startswith(f"risk {values[0]:.4g}: days lost on average until ")


@pytest.mark.parametrize(("events", "has_interval"), [(4, False), (5, True)])
def test_few_events_give_no_interval(events, has_interval):
    rng = np.random.default_rng(0)
    times = rng.permutation(40) + 1.0
    targets = np.stack([times, np.isin(times, np.sort(times)[:: 40 // events][:events])], axis=1).astype(float)
    task = Survival("days", "died", times=(10.0, 20.0, 30.0, 40.0)).of_cohort(targets, np.arange(40).astype(str))
    survival = np.tile([0.9, 0.7, 0.5, 0.3], (40, 1))
    values = np.concatenate([rng.normal(size=(40, 1)) - times[:, None] / 20, survival], axis=1)
    rows = ScoredRows(task, targets, values, np.arange(40), np.ones(40))
    estimates = rows.estimates(rows.pooled, 0)
    for name in ("c_index", "c_index_ipcw", "integrated_brier"):
        assert (estimates[name].interval is not None) is (has_interval and estimates[name].value is not None), name
    if not has_interval:
        assert estimates["c_index"].reason == "fewer than 5 patients with an event"
    assert estimates["auc_20"].reason == "fewer than 5 patients with an event by then, or without one"


def test_intervals_of_the_c_index_hold_the_truth():
    """In simulated cohorts of 80 patients, 150 times."""
    rng, held, within = np.random.default_rng(5), [], []

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        risk = rng.normal(size=count)
        times, ends = rng.exponential(np.exp(-0.8 * risk)), rng.exponential(2.0, count)
        return np.stack([np.minimum(times, ends), times <= ends], axis=1).astype(float), risk

    targets, risks = drawn(3000)
    task = of_cohort(targets).fitted_to(targets, patients(targets))
    template = task.activate(torch.zeros(1, 4, dtype=torch.float64))
    truth = task.unweighted_metrics(targets, np.concatenate([risks[:, None], np.repeat(template[:, 1:], 3000, 0)], 1))
    for number in range(150):
        targets, risks = drawn(80)
        values = np.concatenate([risks[:, None], np.repeat(template[:, 1:], 80, axis=0)], axis=1)
        rows = ScoredRows(task, targets, values, np.arange(80), np.ones(80), np.arange(80) % 4)
        low, high = rows.estimates(rows.pooled, number)["c_index"].interval
        held.append(low <= truth["c_index"] <= high)
        low, high = rows.estimates(rows.within_folds, number)["c_index"].interval
        within.append(low <= truth["c_index"] <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.05)
    assert np.mean(within) == pytest.approx(0.95, abs=0.05)
