"""Whether attention matters: what a model says as patches are taken away or added in its order, and in random ones.

Deletion and insertion curves (Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421), and the map of the same model
with random weights (Adebayo et al. 2018, https://arxiv.org/abs/1810.03292). Models that merge see the slide once: its
patches are reduced group by group, and every curve comes from merging groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from MILS import build_mil
from MILS.bag_model import BagModel, evaluating
from MILS.ensemble import Ensemble
from MILS.mergeable import MergeableModel
from utils.bags.store import StoredFeatures
from utils.core.errors import FeatureFileError
from utils.core.runtime import derive_seed, progress
from utils.prediction.feeding import SlideFeed, blocks_of, mean_output, predict_features
from utils.tasks.task import Task

# The shares of the patches up to a half that are taken away or added; beyond it lie their complements.
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
# Random orders; a model that does not merge sees every part of the slide anew, and gets fewer.
_ORDERS, _FEW_ORDERS = 10, 3
_RANDOM_MODELS = 3
_BAR_DELAY_SECONDS = 5
_WHOLE = SlideFeed(None, "merge")


@dataclass(frozen=True)
class Curves:
    """The predicted class's probability along a way: `most_first (G,)` and `least_first (G,)` by attention, `random
    (R, G)` in random orders, at `fractions (G,)` of the patches taken away or added.
    """

    fractions: NDArray[np.float64]
    most_first: NDArray[np.float64]
    least_first: NDArray[np.float64]
    random: NDArray[np.float64]

    def area(self, curve: NDArray[np.float64]) -> Any:
        """The mean probability along `curve (..., G)`."""
        return np.trapezoid(curve, self.fractions, axis=-1) / np.ptp(self.fractions)

    def as_dict(self, sign: int) -> dict[str, Any]:
        """`gap`: by how much attention beats random orders, a positive number where it does; `sign` 1 where high
        probabilities are to come early, -1 where low ones are.
        """
        most, least, random = (self.area(curve) for curve in (self.most_first, self.least_first, self.random))
        return {
            "fractions": self.fractions.tolist(),
            "most_attended_first": self.most_first.tolist(),
            "least_attended_first": self.least_first.tolist(),
            "random_mean": self.random.mean(axis=0).tolist(),
            "random_std": self.random.std(axis=0, ddof=1).tolist(),
            "area_most_attended_first": float(most),
            "area_least_attended_first": float(least),
            "area_random": random.tolist(),
            "gap": float(sign * (most - random.mean())),
            "random_orders_beaten": int((sign * (most - random) > 0).sum()),
        }


@dataclass(frozen=True)
class Faithfulness:
    """`deletion` and `insertion` curves of the class `class_index`; `randomised (N,)`, the attention of the same model
    with random weights, and the rank correlation of the map with it and with other such ones (None where all patches of
    either have the same attention).
    """

    class_index: int
    deletion: Curves
    insertion: Curves
    randomised: NDArray[np.float64]
    rank_correlations: list[float | None]

    def as_dict(self) -> dict[str, Any]:
        return {
            "deletion": self.deletion.as_dict(-1),
            "insertion": self.insertion.as_dict(1),
            "random_orders": len(self.deletion.random),
            "rank_correlation_with_random_weights": self.rank_correlations,
        }


@torch.inference_mode()
def measure_faithfulness(
    task: Task,
    models: Sequence[BagModel],
    features: torch.Tensor | StoredFeatures,
    attention: NDArray,
    class_index: int,
    seed: int = 0,
) -> Faithfulness:
    """Measure the `attention (N,)` of `models`, which answer as their mean, for `features (N, D)` of a slide fed whole.

    Patches of equal attention are in random order. Raises FeatureFileError for a slide of fewer than two patches.
    """
    count = len(attention)
    if count < 2:
        raise FeatureFileError(f"--faithfulness: the slide has {count} patch, from which nothing can be taken away")
    members = [member for model in models for member in (model.models if isinstance(model, Ensemble) else [model])]
    merging = all(isinstance(member, MergeableModel) for member in members)
    if not merging and isinstance(features, StoredFeatures):
        features = features.whole()
    rng = np.random.default_rng(derive_seed(seed, "faithfulness"))
    edges = _edges(count)
    by_attention = np.lexsort((rng.random(count), -attention))
    orders = [by_attention, *(rng.permutation(count) for _ in range(_ORDERS if merging else _FEW_ORDERS))]
    group = torch.from_numpy(np.repeat(np.arange(len(edges) - 1, dtype=np.int8), np.diff(edges)))
    groups = torch.empty((len(orders), count), dtype=torch.int8)
    for row, order in zip(groups, orders, strict=True):
        row[torch.from_numpy(order)] = group
    answers = np.mean([_answers(task, member, features, groups)[..., class_index] for member in members], axis=0)
    first, rest = answers[:, 0], answers[:, 1]  # (O, G): the first groups alone, and all but they
    fractions = edges / count
    # What is left when the least attended go is the most attended, and the other way round.
    deletion = Curves(fractions[:-1], rest[0], first[0, ::-1], rest[1:])
    insertion = Curves(fractions[1:], first[0], rest[0, ::-1], first[1:])
    maps = [
        _randomised_attention(task, models, features, derive_seed(seed, "weights", one))
        for one in range(_RANDOM_MODELS)
    ]
    return Faithfulness(class_index, deletion, insertion, maps[0], [_rank_correlation(attention, one) for one in maps])


def _edges(count: int) -> NDArray[np.int64]:
    """How many patches are taken away or added, from 0 to all, the same from either end."""
    early = np.unique(np.rint(np.array(_SHARES) * count).astype(np.int64))
    return np.unique(np.concatenate([[0], early, count - early, [count]]))


def _answers(
    task: Task, model: BagModel, features: torch.Tensor | StoredFeatures, groups: torch.Tensor
) -> NDArray[np.float64]:
    """`(O, 2, G, C)` probabilities, per order, of the first 1, 2, ... G groups, and of all but the first 0, 1, ..."""
    if isinstance(model, MergeableModel):
        each = [
            _of_prefixes_and_suffixes(model, parts) for parts in model.summaries(blocks_of(features, model), groups)
        ]
        return task.activate(torch.stack(each))
    assert isinstance(features, torch.Tensor)  # noqa: S101 - for the type checker: read whole for such a model
    device, number = next(model.parameters()).device, int(groups.max()) + 1
    logits = []
    with evaluating(model):
        for row in progress(groups, "Taking patches away", unit="order", leave=False, delay=_BAR_DELAY_SECONDS):
            kept = [row <= last for last in range(number)] + [row >= begin for begin in range(number)]
            logits.append(torch.cat([model(features[mask].to(device)[None])[0] for mask in kept]))
    return task.activate(torch.stack(logits).unflatten(1, (2, number)))


def _of_prefixes_and_suffixes(model: MergeableModel, parts: list[Any]) -> torch.Tensor:
    """Logits `(2, G, C)`."""

    def merged(parts: Sequence[Any], join: Callable[[Any, Any], Any]) -> list[Any]:
        found = [parts[0]]
        for part in parts[1:]:
            found.append(join(found[-1], part))
        return found

    first = merged(parts, lambda known, part: known.merge(part))
    rest = merged(parts[::-1], lambda known, part: part.merge(known))[::-1]
    with evaluating(model):
        return torch.cat([model.classify(summary) for summary in [*first, *rest]]).unflatten(0, (2, len(parts)))


def _randomised_attention(
    task: Task, models: Sequence[BagModel], features: torch.Tensor | StoredFeatures, seed: int
) -> NDArray[np.float64]:
    """`(N,)` of the models with fresh weights."""
    outputs = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for model in models:
            for member in model.models if isinstance(model, Ensemble) else [model]:
                fresh = build_mil(**member.spec).to(next(member.parameters()).device)
                fresh.set_feature_scale(member.feature_mean, member.feature_std)  # of the features, not of the weights
                outputs.append(predict_features(task, fresh, features, _WHOLE, attention=True))
    attention = mean_output(outputs).attention
    assert attention is not None  # noqa: S101 - for the type checker: every model attends
    return attention.mean(axis=0).astype(np.float64)


def _rank_correlation(one: NDArray, other: NDArray) -> float | None:
    """Spearman's, None where either is constant."""
    from scipy.stats import rankdata  # slow to import, and not always needed

    ranks = [rankdata(values) for values in (one, other)]
    if any(np.ptp(values) == 0 for values in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])
