"""The loss of several labels, of which some are unknown. PyTorch is imported only for the loss of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from utils.tasks.metrics import balanced_class_weights
from utils.tasks.multilabel_metrics import UNKNOWN

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_CHANCE = 1e-12  # of a label's truth


def label_weights(targets: np.ndarray) -> np.ndarray:
    """Return weights `(K, 2)` that give the slides without and with each label the same total."""
    return np.stack([balanced_class_weights(column[column != UNKNOWN], 2) for column in targets.T])


def label_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the binary cross-entropy `(B,)`, weighted, the mean over the known labels of each bag."""
    from torch.nn import functional

    known, truth = targets != UNKNOWN, targets.clamp(min=0)
    each = functional.binary_cross_entropy_with_logits(
        logits.float(), truth.float(), weight=_by_truth(weights, truth), reduction="none"
    )
    return (each * known).sum(dim=1) / known.sum(dim=1)


def label_log_loss(targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> float:
    """Return the mean of the same loss over slides with `probabilities (n, K)`."""
    known, truth = targets != UNKNOWN, np.clip(targets, 0, None)
    chance = np.clip(np.where(truth == 1, probabilities, 1 - probabilities), _LEAST_CHANCE, None)
    each = -np.log(chance) * _by_truth(weights, truth) * known
    return float((each.sum(axis=1) / known.sum(axis=1)).mean())


def _by_truth(weights: Any, truth: Any) -> Any:
    """Return the weight `(B, K)` of each label of each bag, of `weights (K, 2)`; arrays or tensors."""
    return weights[:, 0] + (weights[:, 1] - weights[:, 0]) * truth


def label_signals(logits: Tensor, shares: Tensor) -> Tensor:
    """Return each label's log-odds `(K,)`, given the logits `(P, K)` of parts of a slide with these `shares (P,)`."""
    from torch.nn.functional import logsigmoid

    counts = shares.log().to(logits).unsqueeze(-1)
    return (logsigmoid(logits) + counts).logsumexp(dim=0) - (logsigmoid(-logits) + counts).logsumexp(dim=0)
