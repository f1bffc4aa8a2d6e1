"""The targets and answers of survival: times to an event, and predicted risks and survival, in tables and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from utils.core.errors import plural
from utils.tasks.answers import Answers, numbers_in
from utils.tasks.counts import range_text
from utils.tasks.quantiles import inner_quantiles, patient_quantiles, stratum_names, stratum_of
from utils.tasks.targets import Row

_STRATA = 4
_PARTS = 8  # of the events, between the times at which survival is predicted


@dataclass(frozen=True)
class SurvivalAnswers(Answers):
    """The time to an event; targets `(n, 2)` are times above 0 and events, 1 at that time or 0 if censored then.

    A slide's values are its risk and the probabilities that no event has occurred until each of the `times`. The risk
    is the time without event that is lost, on average, until the last of the times.

    Attributes
        time_column, event_column: the columns.
        bins: the number of time bins whose hazards models learn; they end at quantiles of the training events.
        times: until when survival is predicted; eighths of the cohort's events unless given.
        event_cuts, censored_cuts: where the times of both kinds of patients are cut into strata.
    """

    time_column: str
    event_column: str
    bins: int = 4
    times: tuple[float, ...] = ()
    event_cuts: tuple[float, ...] = ()
    censored_cuts: tuple[float, ...] = ()

    kind, flags = "survival", "--task survival --time_column --event_column"
    unit = "patient"
    decided_key = "risk_group"

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of time and event."""
        return self.time_column, self.event_column

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return `risk` and `survival_<time>` of each time."""
        return "risk", *(f"survival_{time:.6g}" for time in self.times)

    @property
    def signal_names(self) -> tuple[str, ...]:
        """Return the column of the event."""
        return (self.event_column,)

    @property
    def quantity(self) -> str:
        """Return that the signal is the logarithm of the cumulative hazard."""
        return "log cumulative hazard"

    @property
    def horizons(self) -> tuple[float, ...]:
        """Return the times at which the AUC is given: every second one of the times, from the second on."""
        return self.times[1::2] or self.times

    def of_cohort(self, targets: np.ndarray, cases: Sequence[str]) -> Self:
        """Return the task with the times and the strata of a cohort. Raise ValueError if it has no event."""
        times, events = targets.T
        if not events.any():
            raise ValueError(f"no row has an event (1 in {self.event_column}), so that survival cannot be learned")
        self._check_patients(targets, cases)
        patients = np.array(cases)
        cuts = [
            inner_quantiles(times[rows], patients[rows].tolist(), _STRATA) if rows.any() else ()
            for rows in (events == 1, events == 0)
        ]
        chosen = patient_quantiles(times[events == 1], patients[events == 1].tolist(), _PARTS)
        return replace(
            self,
            times=self.times or tuple(float(time) for time in np.unique(chosen)),
            event_cuts=cuts[0],
            censored_cuts=cuts[1],
        )

    def target(self, row: Row) -> tuple[float, float]:
        """Return time and event. Raise ValueError unless the time is above 0 and the event 0 or 1."""
        time, event = float(row[self.time_column]), float(row[self.event_column])
        if not (np.isfinite(time) and time > 0 and event in (0, 1)):
            raise ValueError(f"{time}, {event}")
        return time, event

    @property
    def no_target(self) -> str:
        """Return what time and event must be."""
        return (
            f"target that cannot be used ({self.time_column} must be a number above 0, {self.event_column} 1 for an "
            "event or 0)"
        )

    def target_text(self, targets: np.ndarray) -> np.ndarray:
        """Return "event at" or "censored at" with the times."""
        return np.array([f"{'event' if event else 'censored'} at {time:.4g}" for time, event in targets])

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Return the risks."""
        return values[..., :1]

    def prediction_text(self, values: np.ndarray) -> np.ndarray:
        """Return the risks with four digits."""
        return np.array([f"{risk:.4g}" for risk in values[:, 0]])

    def label_columns(self, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns of time and event."""
        return {self.time_column: targets[:, 0], self.event_column: targets[:, 1].astype(int)}

    def table_columns(
        self, targets: np.ndarray, values: np.ndarray, calibrated: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return time, event, risk and the survival at each of the times."""
        columns = self.label_columns(targets)
        return columns | {name: values[:, index] for index, name in enumerate(self.outputs)}

    def values_in(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return risk and survival."""
        values = numbers_in(rows, self.outputs)
        if not ((values[:, 1:] >= 0) & (values[:, 1:] <= 1)).all():
            raise ValueError("a survival that is no number from 0 to 1")
        return values, None

    def headline(self, predicted: str) -> str:
        """Return the risk and what it is."""
        return f"risk {predicted}: {self.time_column} lost on average until {self.times[-1]:.4g}"

    def shares(self, values: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Return the survival until each of the times."""
        times = dict(zip(self.outputs[1:], self.times, strict=True))
        return f"survival until {self.time_column}", {f"{time:.4g}": values[name] for name, time in times.items()}

    def counts_text(self, targets: np.ndarray, cases: Sequence[str]) -> str:
        """Return how many slides and patients have the event, and the range of the times."""
        with_event = targets[:, 1] == 1
        patients = {case for case, is_event in zip(cases, with_event.tolist(), strict=True) if is_event}
        return (
            f"{self.event_column} in {int(with_event.sum())} of {plural(len(targets), 'slide')}, {len(patients)} of "
            f"{plural(len(set(cases)), 'patient')}; {self.time_column} {range_text(targets[:, 0])}"
        )

    def _check_patients(self, targets: np.ndarray, cases: Sequence[str]) -> None:
        """Raise ValueError for a patient with two times or events."""
        first: dict[str, np.ndarray] = {}
        for case, target in zip(cases, targets, strict=True):
            if (first.setdefault(case, target) != target).any():
                texts = " and ".join(self.target_text(np.stack([first[case], target])))
                raise ValueError(
                    f"patient {case} has two outcomes ({texts}); a patient has one, so give all slides that"
                )

    @property
    def strata_names(self) -> tuple[str, ...]:
        """Return whether the event occurred, and the ranges of the times."""
        names = [("event", self.event_cuts), ("censored", self.censored_cuts)]
        return tuple(
            f"{kind}, {self.time_column} {part}" if cuts else kind
            for kind, cuts in names
            for part in stratum_names(cuts)
        )

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return the stratum of each target: those with an event come first, both kinds ordered by time."""
        times, events = targets.T
        after_events = len(self.event_cuts) + 1 + stratum_of(times, self.censored_cuts)
        return np.where(events == 1, stratum_of(times, self.event_cuts), after_events)

    def gallery(self, targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows of the highest and lowest risk, and the early events of low and late ones of high risk."""
        risk_rank, time_rank = (np.argsort(np.argsort(numbers)) for numbers in (values[:, 0], targets[:, 0]))
        # Those with an early event and a low risk have a low sum; the others' time may be later than is known.
        surprise = np.argsort(risk_rank + time_rank, kind="stable")
        events = targets[surprise, 1] == 1
        return {
            "highest risk": np.argsort(-values[:, 0], kind="stable"),
            "lowest risk": np.argsort(values[:, 0], kind="stable"),
            "early event at low risk": surprise[events],
            "late at high risk": surprise[::-1],
        }
