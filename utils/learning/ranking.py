"""How epochs, settings and models are compared.

A validation is the dict that `training.validate` gives: `val_loss`, `val_auc` and so on.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from utils.core.errors import TrainingError

Validation = Mapping[str, float | None]


def rank(validation: Validation, monitor: str) -> tuple[float, ...]:
    """What epochs and models are compared by; greater is better, ties are decided by the slide loss."""
    loss = validation["val_loss"]
    assert loss is not None  # noqa: S101 - for the type checker: only the AUC can be undefined
    if monitor == "slide_loss":
        return (-loss,)
    score = validation[monitor.replace("slide_", "val_")]
    if score is None:
        raise TrainingError(f"{monitor} is undefined for the validation slides; choose by --monitor slide_loss")
    return (score, -loss)


def mean_rank(validations: Sequence[Validation], monitor: str) -> tuple[float, ...]:
    """What settings are compared by: the mean over the inner folds of what their models are compared by."""
    return tuple(
        math.fsum(part) / len(validations) for part in zip(*[rank(one, monitor) for one in validations], strict=True)
    )


def best_of(ranks: Sequence[tuple[float, ...]]) -> int:
    """The index of the greatest, the first among equals."""
    return max(range(len(ranks)), key=lambda index: ranks[index])


def refit_epochs(epochs: Sequence[int]) -> int:
    """The median of the inner models' best epochs, rounded up where it falls between two."""
    return math.ceil(float(np.median(epochs)))
