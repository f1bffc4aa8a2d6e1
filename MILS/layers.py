"""Layers the models share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout with a draw of its own on a CPU, where drawing is what dropout costs: 64 random bits serve four
    elements, six times faster.

    There the probability to be kept is rounded to a multiple of 2**-16, and the scale is its inverse: the mean stays
    exact.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Dropout
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        kept = max(1, round((1 - self.p) * 2**16))
        words = torch.empty(math.ceil(input.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: input.numel()].view(input.shape)
        return input * (draws >= 2**15 - kept).to(input.dtype).mul_(2**16 / kept)


def embedding(input_dim: int, hidden_dim: int, dropout: float) -> nn.Sequential:
    """Linear, LayerNorm, ReLU, Dropout: (B, N, D) -> (B, N, d)."""
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU(inplace=True), Dropout(dropout)
    )


def mlp_head(hidden_dim: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Linear to half the width, GELU, Dropout, Linear: (B, d) -> (B, C)."""
    half = hidden_dim // 2
    return nn.Sequential(nn.Linear(hidden_dim, half), nn.GELU(), Dropout(dropout), nn.Linear(half, num_classes))


def at_least_single(x: Tensor) -> Tensor:
    """x, in single precision if it is in half."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(like: Tensor) -> torch.autocast:
    """Context without autocast on the device of `like`."""
    return torch.autocast(like.device.type, enabled=False)
