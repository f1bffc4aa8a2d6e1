"""Discrete-time hazards: survival as the chance of an event in each of C bins of time, given that none came before.

The bins end at `edges (C + 1,)`, of which the first is 0; a time at an edge belongs to the bin below. A target is a
time above 0 and an event: 1 if it occurred at that time, 0 if the patient was censored then. PyTorch is imported only
for the loss and its bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils.tasks.quantiles import patient_quantiles

if TYPE_CHECKING:
    from torch import Tensor


def bin_edges(targets: np.ndarray, cases: Sequence[str], bins: int) -> np.ndarray:
    """Return the edges `(C + 1,)` of at most `bins` bins with about equally many events of the patients `cases (n,)`,
    whose slides have the `targets (n, 2)`.

    Each bin ends at the time of an event; ties leave fewer bins. Raise ValueError if there is no event.
    """
    has_event = targets[:, 1] == 1
    if not has_event.any():
        raise ValueError(f"none of {len(set(cases))} patients has an event: survival cannot be learned from them")
    times = targets[has_event, 0]
    ends = patient_quantiles(times, np.asarray(cases)[has_event].tolist(), bins)
    return np.concatenate([[0], np.unique([*ends, times.max()])])


def time_bins(targets: Tensor, edges: Tensor) -> Tensor:
    """Return the bin `(n,)` int of each of the `targets (n, 2)`, for `hazard_loss`, given `edges (C + 1,)`.

    An event has the bin of its time, or C after the last edge. A censored patient has the last bin that counts as
    survived, or -1 if none does: a bin counts if the patient was followed for at least half of it. Counting all of it,
    or nothing, would bias survival up or down (Gensheimer and Narasimhan 2019, https://doi.org/10.7717/peerj.6257).
    """
    import torch

    times, events = targets.unbind(dim=1)
    times, middles = times.contiguous(), (edges[1:] + edges[:-1]) / 2
    return torch.where(events == 1, torch.bucketize(times, edges[1:]), torch.bucketize(times, middles, right=True) - 1)


def hazard_loss(logits: Tensor, bins: Tensor, events: Tensor) -> Tensor:
    """Return the negative log-likelihood `(B,)` of each bag's target (Zadeh and Schmid 2021,
    https://doi.org/10.1109/TPAMI.2020.2979450).

    `logits (B, C)` are those of the hazards, `bins (B,)` from `time_bins`, `events (B,)` 1 or 0. The patient
    survives all bins before that of the target, and that bin too unless it holds the event.
    """
    import torch
    from torch.nn.functional import logsigmoid

    number = torch.arange(logits.shape[1], device=logits.device)
    is_event = (number == bins[:, None]) & (events[:, None] == 1)
    log_likelihood = logsigmoid(torch.where(is_event, logits, -logits))
    return -log_likelihood.where(number <= bins[:, None], 0).sum(dim=1)


def curves_of(logits: np.ndarray) -> np.ndarray:
    """Return the probability `(n, C)` that no event has occurred until each bin's end, for `logits (n, C)`."""
    return np.exp(-np.logaddexp(0, logits.astype(np.float64)).cumsum(axis=1))


def survival_at(curves: np.ndarray, edges: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the survival `(n, T)` at any `times (T,)` for `curves (n, C)` at the bins' ends.

    It is 1 at time 0 and linear within a bin, as if events were spread evenly there (Kvamme and Borgan 2021,
    https://doi.org/10.1007/s10985-021-09532-6); after the last edge it stays what it is there.
    """
    times = np.clip(times, 0, edges[-1])
    place = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, len(edges) - 2)
    share = (times - edges[place]) / (edges[place + 1] - edges[place])
    survival = _from_time_0(curves)
    return survival[:, place] * (1 - share) + survival[:, place + 1] * share


def risks_of(curves: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the risk `(n,)` for `curves (n, C)`: minus the restricted mean survival time, in the unit of the edges.

    The restricted mean is the mean time without event up to the last edge, the area under `survival_at` (Royston and
    Parmar 2013, https://doi.org/10.1186/1471-2288-13-152). The risk rises when survival falls at the end of any bin.
    """
    return -np.trapezoid(_from_time_0(curves), edges, axis=1)


def _from_time_0(curves: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(curves), 1)), curves], axis=1)
