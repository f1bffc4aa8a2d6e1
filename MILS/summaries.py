"""Summaries of blocks of instances that can be merged: for softmax attention and for the maximum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from MILS.layers import at_least_single, full_precision


class AttentionSummary(NamedTuple):
    """A block under softmax attention, in a form in which blocks can be merged (online softmax).

    maximum (B, R): the largest score; normaliser (B, R): the sum of exp(score - maximum); after_dropout (B, R): the
    same sum after attention dropout; total (B, R, d): the sum of the values under the weights after dropout.
    """

    maximum: Tensor
    normaliser: Tensor
    after_dropout: Tensor
    total: Tensor

    def merge(self, other: AttentionSummary) -> AttentionSummary:
        maximum = torch.maximum(self.maximum, other.maximum)
        ours, theirs = torch.exp(self.maximum - maximum), torch.exp(other.maximum - maximum)
        return AttentionSummary(
            maximum,
            ours * self.normaliser + theirs * other.normaliser,
            ours * self.after_dropout + theirs * other.after_dropout,
            ours.unsqueeze(-1) * self.total + theirs.unsqueeze(-1) * other.total,
        )

    def pooled(self) -> Tensor:
        """Return the weighted sum (B, R, d) of the values."""
        return self.total / self.normaliser.unsqueeze(-1)

    def mass(self) -> Tensor:
        """Return the sum (B, R) of the weights: 1 except under attention dropout."""
        return self.after_dropout / self.normaliser

    def weights(self, scores: Tensor) -> Tensor:
        """Return the weights (B, R, N), before dropout, of instances with these scores."""
        return (scores - (self.maximum + self.normaliser.log()).unsqueeze(-1)).exp_()


def attend(
    scores: Tensor, values: Tensor, mask: Tensor | None, dropout: nn.Module | None = None
) -> tuple[AttentionSummary, Tensor]:
    """Reduce values (B, N, d) under the softmax over N of scores (B, R, N).

    Returns the summary, and the scores with the padding's set to the lowest finite number: padding then has weight
    exactly 0, and a block of padding alone does not change a merge. `dropout` acts on the weights (B, R, N).
    """
    # Unnormalised weights can sum to N, more than half precision can hold.
    scores = at_least_single(scores)
    if mask is not None:
        scores = scores.masked_fill(mask.unsqueeze(1), torch.finfo(scores.dtype).min)
    maximum = scores.detach().amax(dim=-1)
    weights = torch.exp(scores - maximum.unsqueeze(-1))
    normaliser = after_dropout = weights.sum(dim=-1)
    if dropout is not None and dropout.training:
        weights = dropout(weights)
        after_dropout = weights.sum(dim=-1)
    with full_precision(weights):
        total = weights @ values.to(weights.dtype)
    return AttentionSummary(maximum, normaliser, after_dropout, total), scores


class MaxSummary(NamedTuple):
    """A block under the maximum over instances.

    maximum (B, d); winner (B, d): the first instance that supplies it, counted from the block's start; length: the
    block's number of instances.
    """

    maximum: Tensor
    winner: Tensor
    length: Tensor

    def merge(self, other: MaxSummary) -> MaxSummary:
        later = other.maximum > self.maximum
        return MaxSummary(
            torch.where(later, other.maximum, self.maximum),
            torch.where(later, other.winner + self.length, self.winner),
            self.length + other.length,
        )
