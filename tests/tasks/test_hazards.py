import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tasks.drawn_survival import drawn_patients
from utils.tasks.hazards import bin_edges, curves_of, hazard_loss, risks_of, survival_at
from utils.tasks.hazards import time_bins as tensor_bins
from utils.tasks.survival_curves import kaplan_meier

EDGES = np.array([0.0, 2, 6, 7])


def time_bins(targets: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return tensor_bins(torch.tensor(targets), torch.tensor(edges)).numpy()


def edges_of(targets: np.ndarray, bins: int) -> np.ndarray:
    """The edges for patients of one slide each."""
    return bin_edges(targets, [f"P{number}" for number in range(len(targets))], bins)


@given(st.integers(2, 80), st.integers(1, 9), st.integers(0, 10_000))
def test_each_bin_ends_at_an_event(count, bins, seed):
    targets, _ = drawn_patients(count, seed)
    targets[0, 1] = 1
    edges, event_times = edges_of(targets, bins), targets[targets[:, 1] == 1, 0]
    assert 2 <= len(edges) <= bins + 1
    assert edges[0] == 0
    assert edges[-1] == event_times.max()
    assert (np.diff(edges) > 0).all()
    held = np.bincount(time_bins(targets, edges)[targets[:, 1] == 1], minlength=len(edges) - 1)
    assert len(held) == len(edges) - 1
    assert (held > 0).all()


def test_bins_hold_equally_many_events_not_patients():
    targets = np.concatenate([[[time, 1] for time in range(1, 13)], [[0.5, 0]] * 50]).astype(float)
    edges = edges_of(targets, 4)
    assert edges.tolist() == [0, 3, 6, 9, 12]
    assert np.bincount(time_bins(targets, edges)[:12]).tolist() == [3, 3, 3, 3]


def test_bins_count_a_patient_once_however_many_slides_there_are():
    once = np.array([[time, 1.0] for time in range(1, 13)])
    slides = np.repeat(np.arange(12), [30, *[1] * 11])
    cases = [f"P{number}" for number in slides]
    assert bin_edges(once[slides], cases, 4).tolist() == edges_of(once, 4).tolist() == [0, 3, 6, 9, 12]


def test_ties_leave_fewer_bins():
    assert edges_of(np.array([[4.0, 1], [4, 1], [4, 1], [9, 0]]), 4).tolist() == [0, 4]
    assert edges_of(np.array([[4.0, 1], [4, 1], [4, 1], [9, 1]]), 4).tolist() == [0, 4, 9]


def test_without_an_event_there_are_no_bins():
    with pytest.raises(ValueError, match="none of 2 patients has an event"):
        edges_of(np.array([[4.0, 0], [9, 0]]), 4)


def test_bin_of_an_event_is_that_of_its_time():
    times = np.array([0.1, 2, 2.1, 6, 6.5, 7, 7.1, 99])
    assert time_bins(np.stack([times, np.ones(8)], axis=1), EDGES).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_censored_patient_survived_the_bins_followed_for_half():
    times = np.array([0.9, 1, 2, 3.9, 4, 6.4, 6.5, 7, 99])
    assert time_bins(np.stack([times, np.zeros(9)], axis=1), EDGES).tolist() == [-1, 0, 0, 0, 1, 1, 2, 2, 2]


def likelihood_by_hand(logits: np.ndarray, last: int, event: bool) -> float:
    hazards = 1 / (1 + np.exp(-logits))
    if event and last < len(hazards):
        return hazards[last] * np.prod(1 - hazards[:last])
    return float(np.prod(1 - hazards[: last + 1]))


@pytest.mark.parametrize("bins", [1, 4])
def test_loss_is_the_negative_log_likelihood(bins):
    rng = np.random.default_rng(0)
    logits, last, events = rng.normal(size=(40, bins)), rng.integers(-1, bins + 1, size=40), rng.integers(2, size=40)
    last = np.where(events, np.maximum(last, 0), last)
    loss = hazard_loss(torch.tensor(logits), torch.tensor(last), torch.tensor(events))
    by_hand = [-np.log(likelihood_by_hand(*row)) for row in zip(logits, last, events == 1, strict=True)]
    assert loss.shape == (40,)
    assert loss.numpy() == pytest.approx(np.array(by_hand))


def test_likelihoods_of_all_outcomes_add_up_to_one():
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    events = [hazard_loss(logits, torch.tensor([last]), torch.tensor([1])) for last in range(6)]
    assert torch.exp(-torch.cat(events)).sum() == pytest.approx(1)


def test_loss_is_finite_at_extreme_logits():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [-1e4, -1e4]], requires_grad=True)
    loss = hazard_loss(logits, torch.tensor([1, 0, -1]), torch.tensor([1, 1, 0]))
    assert loss.tolist() == [2e4, 1e4, 0]
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1, -1], [-1, 0], [0, 0]]


def test_curves_are_the_product_of_survived_bins():
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    curves = curves_of(logits)
    assert curves == pytest.approx(np.cumprod(1 - 1 / (1 + np.exp(-logits)), axis=1), rel=1e-5)
    last = torch.arange(4).repeat(6)
    loss = hazard_loss(torch.tensor(logits).repeat_interleave(4, dim=0), last, torch.zeros(24))
    assert curves.ravel() == pytest.approx(torch.exp(-loss).numpy(), rel=1e-5)
    assert curves_of(np.array([[-1e4, 1e4, 0]])).tolist() == [[1, 0, 0]]


@given(st.integers(1, 6), st.integers(0, 10_000))
def test_survival_falls_from_one_through_the_curve(bins, seed):
    rng = np.random.default_rng(seed)
    curves = curves_of(rng.normal(size=(5, bins)) * 3)
    edges = np.concatenate([[0], np.cumsum(rng.uniform(0.1, 5, size=bins))])
    times = np.sort(np.concatenate([edges, rng.uniform(0, edges[-1] * 1.5, size=50)]))
    survival = survival_at(curves, edges, times)
    assert survival[:, 0] == pytest.approx(1)
    assert survival_at(curves, edges, edges[1:]) == pytest.approx(curves)
    assert (np.diff(survival, axis=1) <= 1e-12).all()
    assert survival_at(curves, edges, np.array([edges[-1] * 9]))[:, 0] == pytest.approx(curves[:, -1])
    grid = np.linspace(0, edges[-1], 20_001)
    assert -risks_of(curves, edges) == pytest.approx(np.trapezoid(survival_at(curves, edges, grid), grid), rel=1e-4)


def test_risk_rises_where_survival_falls():
    curves = np.array([[0.9, 0.5, 0.4], [0.8, 0.5, 0.4], [0.9, 0.5, 0.3], [1, 1, 1], [0, 0, 0]])
    risks = risks_of(curves, EDGES)
    assert risks[1] > risks[0]
    assert risks[2] > risks[0]
    assert risks[3:] == pytest.approx([-7, -1])  # within the first bin events are spread evenly


def test_one_bin():
    edges = edges_of(np.array([[3.0, 1], [8, 1]]), 1)
    assert edges.tolist() == [0, 8]
    assert survival_at(np.array([[0.5]]), edges, np.array([4.0])) == pytest.approx(0.75)


@pytest.mark.parametrize("follow_up", [10, 30])
def test_most_likely_hazards_are_the_kaplan_meier_curve(follow_up):
    rng = np.random.default_rng(0)
    times, ends = rng.exponential(20, size=4000), rng.uniform(0, follow_up, size=4000)
    targets = np.stack([np.minimum(times, ends), times <= ends], axis=1)
    edges = edges_of(targets, 4)
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    bins, events = torch.tensor(time_bins(targets, edges)), torch.tensor(targets[:, 1])
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = hazard_loss(logits.expand(4000, 4), bins, events).mean()
        loss.backward()
        return loss

    optimizer.step(step)
    curve = curves_of(logits.detach().numpy())[0]
    expected = [kaplan_meier(targets).at(edge)[0] for edge in edges[1:]]
    assert curve[:3] == pytest.approx(expected[:3], abs=0.01)
    assert curve == pytest.approx(np.exp(-edges[1:] / 20), abs=0.06)
