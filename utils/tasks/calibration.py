"""Temperature scaling: calibrate probabilities on slides that the model was not trained on.

One number sharpens or softens all probabilities and leaves the predicted classes unchanged (Guo et al. 2017,
https://arxiv.org/abs/1706.04599).
"""

import math

import numpy as np

from utils.tasks.metrics import auc_is_defined

_LEAST, _MOST = 0.05, 20.0
_TINY = 1e-12


def fitted_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Return the temperature that minimises the log-loss of `probabilities (n, C)` for the true classes `labels (n,)`.

    Targets are smoothed by the number of slides of each class as in Platt scaling (Platt 1999), because on a few slides
    that are all classified correctly the optimal temperature would be zero. None if a class is missing.
    """
    from scipy.optimize import minimize_scalar  # slow to import, and prediction does not fit a temperature

    num_classes = probabilities.shape[1]
    if not auc_is_defined(labels, num_classes):
        return None
    counts = np.bincount(labels, minlength=num_classes)
    target = ((counts + 1) / (counts + 2))[labels]
    targets = np.repeat(((1 - target) / (num_classes - 1))[:, None], num_classes, axis=1)
    targets[np.arange(len(labels)), labels] = target

    def loss(log_temperature: float) -> float:
        scaled = scale_probabilities(probabilities, math.exp(log_temperature))
        return float(-(targets * np.log(np.maximum(scaled, _TINY))).sum(axis=1).mean())

    return math.exp(minimize_scalar(loss, bounds=(math.log(_LEAST), math.log(_MOST)), method="bounded").x)


def scale_probabilities(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return `probabilities (..., C)` with their logarithms divided by the temperature."""
    logarithms = np.log(np.maximum(probabilities, _TINY)) / temperature
    powers = np.exp(logarithms - logarithms.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
