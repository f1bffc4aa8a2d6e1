"""What a metric rests on, which decides how its interval is computed (see `evaluation.intervals`).

Rows are slides, in each repeat of a cross-validation once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Proportion:
    """The share of the rows `(n,)` bool that are right."""

    rows: np.ndarray


@dataclass(frozen=True)
class MeanOfProportions:
    """The mean of the metrics named, each of them a proportion."""

    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PairRanking:
    """The share of pairs in which the positive row scores higher: the mean over C kinds of `positives` and `negatives`,
    each `(C, n)` bool. A row that is neither does not count.
    """

    positives: np.ndarray
    negatives: np.ndarray


@dataclass(frozen=True, eq=False)
class Precision:
    """The average precision: the mean over C kinds of `positives` among `positives` and `negatives`, each `(C, n)`
    bool.
    """

    positives: np.ndarray
    negatives: np.ndarray


@dataclass(frozen=True, eq=False)
class Share:
    """A figure from 0 to 1 that is no proportion, such as macro F1, of rows of several `kinds (C, n)` bool."""

    kinds: np.ndarray


@dataclass(frozen=True, eq=False)
class MeanLoss:
    """The mean of the losses `(n,)`, from 0 to `most`, which may be infinite."""

    losses: np.ndarray
    most: float


@dataclass(frozen=True, eq=False)
class Bounded:
    """A figure between two limits, such as a correlation; the lower one may be minus infinity. It may rest on several
    `kinds (C, n)` bool of rows, all of which must have patients enough; `words` name them, such as "with an event".
    """

    low: float
    high: float
    kinds: Sequence[np.ndarray] = ()
    words: str = ""


@dataclass(frozen=True)
class NoInterval:
    """A metric without an interval, and why."""

    reason: str


Basis = Proportion | MeanOfProportions | PairRanking | Precision | Share | MeanLoss | Bounded | NoInterval


def greatest_difference(basis: Basis) -> float:
    """Return how far two values of a metric can be apart; it may be infinite."""
    match basis:
        case MeanLoss():
            return basis.most
        case Bounded():
            return basis.high - basis.low
        case _:
            return 1.0
