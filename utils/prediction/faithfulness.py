"""Measure whether attention matters: predict while patches are removed or added in its order, and in random orders.

Deletion and insertion curves (Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421), and the map of the same model
with random weights (Adebayo et al. 2018, https://arxiv.org/abs/1810.03292). A mergeable model reads the slide once: it
summarises groups of patches, and every point of a curve merges summaries.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from MILS import build_mil
from MILS.bag_model import BagModel, evaluating
from MILS.ensemble import members_of
from MILS.mergeable import MergeableModel
from utils.bags.store import StoredFeatures
from utils.core.errors import FeatureFileError
from utils.core.runtime import derive_seed, progress
from utils.pictures.attention_map import UNIFORM_REASON, is_uniform
from utils.prediction.forward_pass import SlideFeed, blocks_of, mean_output, predict_features
from utils.tasks.task import Task

# The fractions of the patches that are removed or added, up to a half; their complements complete the curve.
_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
# Random orders; fewer for a model that cannot merge, which reads the patches anew for every point of a curve.
_ORDERS, _FEW_ORDERS = 10, 3
_RANDOM_MODELS = 3
_BAR_DELAY_SECONDS = 5
_WHOLE = SlideFeed(None, "merge")
_NO_EVIDENCE = "uniform: every patch has the same evidence"


@dataclass(frozen=True)
class Curves:
    """The predicted class's probability with `fractions (G,)` of the patches removed or added: by attention in
    `most_first (G,)` and `least_first (G,)`, in random orders in `random (R, G)`. `reason` says why the map orders no
    patches, "" if it does.
    """

    fractions: NDArray[np.float64]
    most_first: NDArray[np.float64]
    least_first: NDArray[np.float64]
    random: NDArray[np.float64]
    reason: str = ""

    def area(self, curve: NDArray[np.float64]) -> Any:
        """Return the mean probability along `curve (..., G)`."""
        return np.trapezoid(curve, self.fractions, axis=-1) / np.ptp(self.fractions)

    def as_dict(self, sign: int) -> dict[str, Any]:
        """Return the entries of a record. `gap` is positive if attention beats random orders; `sign` is 1 if the
        probability should rise early, -1 if it should fall early. What needs an order is None if there is a `reason`.
        """
        most, least, random = (self.area(curve) for curve in (self.most_first, self.least_first, self.random))
        ordered = {
            "most_attended_first": self.most_first.tolist(),
            "least_attended_first": self.least_first.tolist(),
            "area_most_attended_first": float(most),
            "area_least_attended_first": float(least),
            "gap": float(sign * (most - random.mean())),
            "random_orders_beaten": int((sign * (most - random) > 0).sum()),
        }
        return {
            "fractions": self.fractions.tolist(),
            "random_mean": self.random.mean(axis=0).tolist(),
            "random_std": self.random.std(axis=0, ddof=1).tolist(),
            "area_random": random.tolist(),
            **(dict.fromkeys(ordered) | {"reason": self.reason} if self.reason else ordered),
        }


@dataclass(frozen=True)
class Faithfulness:
    """`deletion` and `insertion` curves of the class `class_index`; `randomised (N,)`, the attention of the same model
    with random weights; and the rank correlations of the attention with this and other random ones (None if either is
    the same for all patches). `evidence`: deletion and insertion curves in the order of the evidence for the class.
    """

    class_index: int
    deletion: Curves
    insertion: Curves
    randomised: NDArray[np.float64]
    rank_correlations: list[float | None]
    evidence: tuple[Curves, Curves] | None = None

    def as_dict(self) -> dict[str, Any]:
        curves: dict[str, Any] = {"deletion": self.deletion.as_dict(-1), "insertion": self.insertion.as_dict(1)}
        if self.evidence is not None:
            deletion, insertion = (curve.as_dict(sign) for curve, sign in zip(self.evidence, (-1, 1), strict=True))
            curves["evidence"] = {"deletion": _of_evidence(deletion), "insertion": _of_evidence(insertion)}
            curves["borne_out_more"] = _borne_out_more(curves["deletion"]["gap"], deletion["gap"])
        return curves | {
            "random_orders": len(self.deletion.random),
            "rank_correlation_with_random_weights": self.rank_correlations,
        }


def _borne_out_more(attention_gap: float | None, evidence_gap: float | None) -> str | None:
    """Return which map has the larger deletion gap, "attention" or "evidence"; None unless both beat random orders."""
    if attention_gap is None or evidence_gap is None or min(attention_gap, evidence_gap) <= 0:
        return None
    if attention_gap == evidence_gap:
        return None
    return "evidence" if evidence_gap > attention_gap else "attention"


def _of_evidence(curves: Mapping[str, Any]) -> dict[str, Any]:
    """Return a curve's entries under the names of an order by evidence."""
    return {name.replace("_attended_first", "_for_first"): value for name, value in curves.items()}


@torch.inference_mode()
def measure_faithfulness(
    task: Task,
    models: Sequence[BagModel],
    features: torch.Tensor | StoredFeatures,
    attention: NDArray,
    class_index: int,
    seed: int = 0,
    *,
    evidence: NDArray | None = None,
) -> Faithfulness:
    """Measure the `attention (N,)` of `models`, whose predictions are averaged, for `features (N, D)` of a whole slide;
    also their `evidence (N,)` for the class, if it is given.

    Patches of equal attention, or evidence, are in random order; a map in which all are equal has no curves (see
    `Curves.reason`). Raises FeatureFileError for a slide of fewer than two patches.
    """
    count = len(attention)
    if count < 2:
        raise FeatureFileError(f"--faithfulness: the slide has {count} patch, from which nothing can be taken away")
    members = [member for model in models for member in members_of(model)]
    merging = all(isinstance(member, MergeableModel) for member in members)
    if not merging and isinstance(features, StoredFeatures):
        features = features.whole()
    rng = np.random.default_rng(derive_seed(seed, "faithfulness"))
    edges = _edges(count)
    by_attention = np.lexsort((rng.random(count), -attention))
    orders = [by_attention, *(rng.permutation(count) for _ in range(_ORDERS if merging else _FEW_ORDERS))]
    number = len(orders)
    if evidence is not None:
        orders.append(np.lexsort((rng.random(count), -evidence)))
    groups = _groups(orders, edges)
    averages = np.mean([_probabilities(task, member, features, groups)[..., class_index] for member in members], axis=0)
    by_attention_curves = _curves(averages, edges / count, 0, number, UNIFORM_REASON if is_uniform(attention) else "")
    by_evidence_curves = evidence if evidence is None else _curves(
        averages, edges / count, number, number, _NO_EVIDENCE if is_uniform(evidence) else ""
    )  # fmt: skip
    seeds = [derive_seed(seed, "weights", number) for number in range(_RANDOM_MODELS)]
    randomised = [_randomised_attention(task, models, features, model_seed) for model_seed in seeds]
    correlations = [_rank_correlation(attention, weights) for weights in randomised]
    return Faithfulness(class_index, *by_attention_curves, randomised[0], correlations, by_evidence_curves)


def _groups(orders: Sequence[NDArray[np.int64]], edges: NDArray[np.int64]) -> torch.Tensor:
    """Return the group `(O, N)` int8 of each patch in each order; a group ends at each of the `edges`."""
    group = torch.from_numpy(np.repeat(np.arange(len(edges) - 1, dtype=np.int8), np.diff(edges)))
    groups = torch.empty((len(orders), int(edges[-1])), dtype=torch.int8)
    for row, order in zip(groups, orders, strict=True):
        row[torch.from_numpy(order)] = group
    return groups


def _curves(averages: NDArray, fractions: NDArray, order: int, number: int, reason: str) -> tuple[Curves, Curves]:
    """Return the deletion and insertion curves of an `order`; the random orders are those from 1 to `number`. `reason`
    says why the order is no map's, "" if it is.

    `averages (O, 2, G)` are the class's probabilities of the first groups alone, and of all but the first ones.
    """
    prefixes, suffixes = averages[:, 0], averages[:, 1]
    # Without the least attended patches, the most attended remain, and the other way round.
    deletion = Curves(fractions[:-1], suffixes[order], prefixes[order, ::-1], suffixes[1:number], reason)
    return deletion, Curves(fractions[1:], prefixes[order], suffixes[order, ::-1], prefixes[1:number], reason)


def _edges(count: int) -> NDArray[np.int64]:
    """Return the numbers of patches that are removed or added, from 0 to all, the same from either end."""
    counts = np.unique(np.rint(np.array(_FRACTIONS) * count).astype(np.int64))
    return np.unique(np.concatenate([[0], counts, count - counts, [count]]))


def _probabilities(
    task: Task, model: BagModel, features: torch.Tensor | StoredFeatures, groups: torch.Tensor
) -> NDArray[np.float64]:
    """Return `(O, 2, G, C)`: for each order, the probabilities of the first 1, 2, ... G groups, and of all but the
    first 0, 1, ...
    """
    if isinstance(model, MergeableModel):
        orders = model.summaries(blocks_of(features, model), groups)
        return task.activate(torch.stack([_prefix_and_suffix_logits(model, summaries) for summaries in orders]))
    assert isinstance(features, torch.Tensor)  # noqa: S101 - for the type checker: read whole for such a model
    device, number = next(model.parameters()).device, int(groups.max()) + 1
    logits = []
    with evaluating(model):
        for row in progress(groups, "Taking patches away", unit="order", leave=False, delay=_BAR_DELAY_SECONDS):
            masks = [row <= last for last in range(number)] + [row >= first for first in range(number)]
            logits.append(torch.cat([model(features[mask].to(device)[None])[0] for mask in masks]))
    return task.activate(torch.stack(logits).unflatten(1, (2, number)))


def _prefix_and_suffix_logits(model: MergeableModel, summaries: list[Any]) -> torch.Tensor:
    """Return the logits `(2, G, C)` of the first 1, 2, ... G groups, and of the last G, ... 2, 1."""
    prefixes = list(itertools.accumulate(summaries, lambda merged, summary: merged.merge(summary)))
    suffixes = list(itertools.accumulate(summaries[::-1], lambda merged, summary: summary.merge(merged)))[::-1]
    with evaluating(model):
        logits = [model.classify(summary) for summary in [*prefixes, *suffixes]]
        return torch.cat(logits).unflatten(0, (2, len(summaries)))


def _randomised_attention(
    task: Task, models: Sequence[BagModel], features: torch.Tensor | StoredFeatures, seed: int
) -> NDArray[np.float64]:
    """Return the attention `(N,)` of the models with random weights."""
    outputs = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for model in models:
            for member in members_of(model):
                fresh = build_mil(**member.spec).to(next(member.parameters()).device)
                fresh.set_feature_scale(member.feature_mean, member.feature_std)  # the features' scale stays
                outputs.append(predict_features(task, fresh, features, _WHOLE, attention=True))
    attention = mean_output(outputs).attention
    assert attention is not None  # noqa: S101 - for the type checker: every model attends
    return attention.mean(axis=0).astype(np.float64)


def _rank_correlation(first: NDArray, second: NDArray) -> float | None:
    """Return Spearman's rank correlation, None if either is constant."""
    from scipy.stats import rankdata  # slow to import, and not always needed

    ranks = [rankdata(values) for values in (first, second)]
    if any(np.ptp(values) == 0 for values in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])
