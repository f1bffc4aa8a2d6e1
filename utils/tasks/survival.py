"""Survival: when an event occurs, where some patients are censored before. Hazards in bins of time are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils.tasks.bases import Basis, Bounded
from utils.tasks.hazards import bin_edges, curves_of, hazard_loss, risks_of, survival_at, time_bins
from utils.tasks.survival_answers import SurvivalAnswers
from utils.tasks.survival_curves import kaplan_meier, log_rank
from utils.tasks.survival_metrics import (
    concordance,
    concordance_ipcw,
    constant_strata,
    dynamic_auc,
    integrated_brier,
    tied_share,
)
from utils.tasks.task import Figures, FittedFigures, Task

if TYPE_CHECKING:
    from torch import Tensor

RISK_GROUPS = ("low risk", "high risk")
_NO_CHANCE = 1e-6  # of an outcome, at least, in the validation loss


@dataclass(frozen=True)
class Survival(SurvivalAnswers, Task):
    """The time to an event (see `SurvivalAnswers`). `edges` are the ends of the bins, of which the first is 0; they are
    fitted to the training patients.
    """

    edges: tuple[float, ...] = ()

    figure_names = ("kaplan_meier", "survival_calibration")
    decision_figures = ("median_risk",)
    main_metrics = ("c_index", "c_index_ipcw", "integrated_brier")
    compared_metrics = main_metrics
    lower_is_better = ("integrated_brier",)
    fitted_fields = ("edges",)
    metric_titles = {"c_index": "C-index", "c_index_ipcw": "C-index (Uno)"}  # noqa: RUF012 - a constant of the class

    @property
    def num_logits(self) -> int:
        """Return the number of bins."""
        return self.bins

    @property
    def effects(self) -> np.ndarray:
        """Return that one sum raises the hazards of all bins alike."""
        return np.ones((1, self.bins))

    def fitted_to(self, targets: np.ndarray, cases: Sequence[str]) -> Self:
        """Return the task with bins that end at quantiles of the training patients' events."""
        return replace(self, edges=tuple(bin_edges(targets, cases, self.bins).tolist()))

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return the C-indices of Harrell and Uno, the integrated Brier score, and the AUC at each horizon."""
        return *self.main_metrics, *(f"auc_{time:.6g}" for time in self.horizons)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the negative log-likelihood `(B,)` of discrete hazards with censoring."""
        import torch

        edges = torch.tensor(self.edges, dtype=targets.dtype, device=targets.device)
        hazards = logits[:, : len(edges) - 1].float()
        return hazard_loss(hazards, time_bins(targets, edges), targets[:, 1]) * weights[0]

    @property
    def chance_loss(self) -> float:
        """Return the loss of equally likely bins."""
        return float(np.log(self.bins))

    @property
    def loss_titles(self) -> tuple[str, ...]:
        """Return that training counts bins of time, and validation the intervals between the `times`."""
        return f"Training loss, of {self.bins} bins of time", f"Validation loss, of {len(self.times) + 1} intervals"

    def activate(self, logits: Tensor) -> np.ndarray:
        """Return risk and survival in float64, between the bins' ends as if events were spread evenly."""
        rows = logits.cpu().double().numpy()
        curves = curves_of(rows.reshape(-1, self.bins)[:, : len(self.edges) - 1])
        survival = survival_at(curves, np.array(self.edges), np.array(self.times))
        values = np.concatenate([self._risks(survival)[:, None], survival], axis=1)
        return values.reshape(*rows.shape[:-1], len(self.outputs))

    def _risks(self, survival: np.ndarray) -> np.ndarray:
        """Return the mean time without event that is lost until the last of the times."""
        return self.times[-1] + risks_of(survival, np.array([0, *self.times]))

    def signals(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return the logarithm of the cumulative hazard at the end of the last bin."""
        from torch.nn.functional import softplus

        hazard = softplus(logits[:, : len(self.edges) - 1]).sum(dim=1)
        survival_log = (shares.log().to(logits) - hazard).logsumexp(dim=0, keepdim=True)
        return (-survival_log).log()

    def metrics(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric `(B,)`; NaN where it is undefined."""
        times, horizons = np.array(self.times), np.array(self.horizons)
        figures = {
            "c_index": concordance(targets, values[:, 0], weights),
            "c_index_ipcw": concordance_ipcw(targets, values[:, 0], weights, self.times[-1]),
            "integrated_brier": integrated_brier(targets, values[:, 1:], times, weights),
        }
        aucs = dynamic_auc(targets, values[:, 0], horizons, weights)
        return figures | {f"auc_{time:.6g}": aucs[:, index] for index, time in enumerate(self.horizons)}

    def metrics_within(
        self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray, strata: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return both C-indices."""
        return {
            "c_index": concordance(targets, values[:, 0], weights, strata),
            "c_index_ipcw": concordance_ipcw(targets, values[:, 0], weights, self.times[-1], strata),
        }

    def basis(self, metric: str, targets: np.ndarray, values: np.ndarray) -> Basis:
        """Return that all metrics are from 0 to 1 and rest on patients with an event; an AUC also on those who are
        followed beyond its time.
        """
        times, events = targets.T
        if not metric.startswith("auc_"):
            return Bounded(0, 1, (events == 1,), "with an event")
        horizon = self.horizons[self.metric_names.index(metric) - len(self.main_metrics)]
        kinds = (events == 1) & (times <= horizon), times > horizon
        return Bounded(0, 1, kinds, "with an event by then, or without one")

    def validation(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Figures:
        """Return the negative log-likelihood of the outcomes, and the main metrics.

        The outcome is the interval between two of the `times` that holds the event, or that no event had occurred when
        the patient was censored.
        """
        times, events = targets.T
        curves = np.concatenate([np.ones((len(values), 1)), values[:, 1:], np.zeros((len(values), 1))], axis=1)
        rows, place = np.arange(len(values)), np.searchsorted(self.times, times, side="left")
        in_interval = curves[rows, place] - curves[rows, place + 1]
        survived = survival_at(values[:, 1:], np.array([0, *self.times]), times)[rows, rows]
        chance = np.where(events == 1, in_interval, survived)
        metrics = self.unweighted_metrics(targets, values)
        loss = float(-np.log(np.clip(chance, _NO_CHANCE, None)).mean())
        return {"loss": loss} | {name: metrics[name] for name in self.main_metrics}

    def why_undefined(self, metric: str, targets: np.ndarray) -> str:
        """Return that no slide has an event, without which ranks are undefined."""
        return "has no event" if metric != "loss" and not targets[:, 1].any() else ""

    def fit_on_validation(
        self, targets: np.ndarray, values: np.ndarray, cases: Sequence[str], operating_point: str, is_balanced: bool
    ) -> FittedFigures:
        """Return the median of the patients' mean risks, above which a risk is high."""
        patient = np.unique(np.asarray(cases), return_inverse=True)[1]
        return {"median_risk": float(np.median(np.bincount(patient, values[:, 0]) / np.bincount(patient)))}

    def fitted_figures(self, fitted: FittedFigures, targets: np.ndarray, values: np.ndarray) -> dict[str, Any]:
        """Return the median risk."""
        return {"median_risk": fitted.get("median_risk"), "thresholded": None}

    def decide_by(self, fitted: FittedFigures, values: np.ndarray) -> np.ndarray | None:
        """Return 1 where the mean risk of the models is above the median risk of validation, else 0."""
        median = fitted.get("median_risk")
        return None if median is None else (values[..., 0].mean(axis=0) > median).astype(int)

    def decision_text(self, fitted: FittedFigures, values: np.ndarray) -> str | None:
        """Return "high risk" or "low risk"."""
        decisions = self.decide_by(fitted, values[:, None])
        return None if decisions is None else RISK_GROUPS[int(decisions[0])]

    @property
    def decision_column(self) -> str | None:
        """Return `high_risk`."""
        return "high_risk"

    def further_figures(
        self, targets: np.ndarray, values: np.ndarray, folds: np.ndarray | None, decisions: np.ndarray | None
    ) -> dict[str, Any]:
        """Return the folds whose model gives all the same risk, the share of compared pairs with equal risks, and both
        risk groups with the log-rank test.
        """
        tied = tied_share(targets, values[:, 0], folds)
        ranking = {
            "constant_folds": [] if folds is None else constant_strata(values[:, 0], folds).tolist(),
            "tied_pairs": None if np.isnan(tied) else tied,
        }
        if decisions is None:
            return ranking | {"risk_groups": None}
        groups: dict[str, Any] = {}
        for number, name in enumerate(RISK_GROUPS):
            rows = targets[decisions == number]
            median = kaplan_meier(rows).median if len(rows) else None
            groups[name] = {"n": len(rows), "events": int(rows[:, 1].sum()), "median_survival": median}
        p = log_rank(targets, decisions)
        return ranking | {
            "risk_groups": groups | {"log_rank_p": None if np.isnan(p) else p, "cut_at": "median risk of validation"},
        }

    def table(self, pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]) -> str:
        """Return the AUC at each horizon with its interval."""
        from utils.core.text import aligned, figure_text, interval_text

        rows = [
            [f"{time:.4g}", figure_text(pooled[name]), interval_text(intervals[name])]
            for time, name in zip(self.horizons, self.metric_names[len(self.main_metrics) :], strict=True)
        ]
        return aligned([[[self.time_column, "AUC", "95% CI"]], rows])

    def closing_sentences(self, results: Mapping[str, Any]) -> list[str]:
        """Return what the figures mean, and whether the model ranks nothing."""
        sentences = [
            "The C-index is the share of pairs in which the earlier event has the higher risk (0.5: by "
            "chance); c_index_ipcw is Uno's, which censoring does not shift. The integrated Brier score is an error.",
        ]
        within = results.get("within_folds") or {}
        if within.get("c_index") is not None:
            sentences.append("Within folds, each model's own risks are compared; that C-index is the one to report.")
        if results.get("constant_folds"):
            folds = ", ".join(map(str, results["constant_folds"]))
            sentences.append(f"The model of fold {folds} gives all slides the same risk: it ranks nothing.")
        groups = results.get("risk_groups")
        if groups and groups["log_rank_p"] is not None:
            sentences.append(
                f"High against low risk, cut at the median of inner validation: log-rank p {groups['log_rank_p']:.2g}."
            )
        return sentences
