"""Compute how much each instance of a bag argues for an answer: signed contributions that add up to it.

A model that merges pools a bag to z (R, d), and its head makes the answer of z alone. Between a reference z0 and z an
answer F changes by
    F(z) - F(z0) = sum over R and d of (z - z0) G,    G = integral over t from 0 to 1 of dF/dz at z0 + t (z - z0)
(integrated gradients: Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365). What is pooled is a sum over
instances, so each has its share of it: with attention sum_r a_ri (h_i - z0_r) . G_r, and with the maximum all of
(z - z0) G in the dimensions that it supplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Points of the quadrature: doubled from the fewest until the sum is right, or the most are reached.
_FEWEST_POINTS, _MOST_POINTS = 8, 512
# What the sum may be off by, as a multiple of the rounding of single numbers.
_ROUNDINGS = 64


class Slopes(NamedTuple):
    """The mean gradients G (A, K, R, d) of A answers between a reference and K pooled bags, and the answers there:
    `start (A,)` at the reference, `end (A,)` at the bags.
    """

    mean: Tensor
    start: Tensor
    end: Tensor


def path_slopes(
    answers: Callable[[Tensor], Tensor],
    pooled: Tensor,
    reference: Tensor,
    tolerance: float | None = None,
    most_points: int = _MOST_POINTS,
) -> Slopes:
    """Integrate the gradients of `answers`, from (K, R, d) to (A,), on the straight way from the reference to `pooled`.

    Arguments
        pooled: (K, R, d), the parts of a bag, whose answer is one.
        reference: (R, d), the same for all parts.
        tolerance: what the sum may be off by, in units of the answers; by default a few roundings.
        most_points: of the quadrature, if the tolerance is not reached.
    """
    with torch.inference_mode(False), torch.enable_grad():
        end = pooled.detach().clone()
        start = reference.detach().clone().to(end).expand_as(end)
        with torch.no_grad():
            values = answers(start), answers(end)
        points = _FEWEST_POINTS
        while True:
            mean = _mean_gradients(answers, start, end, points)
            reached = (mean * (end - start)).flatten(1).sum(dim=1)
            error = (reached - (values[1] - values[0])).abs().max()
            scale = 1 + torch.stack(values).abs().max()
            enough = _ROUNDINGS * torch.finfo(end.dtype).eps if tolerance is None else tolerance
            if error <= enough * scale or points >= most_points:
                return Slopes(mean, *values)
            points *= 2


def _mean_gradients(answers: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, points: int) -> Tensor:
    """Return the mean (A, K, R, d) of the gradients along the way."""
    total: Tensor | None = None
    for position, weight in _quadrature(points):
        between = (start + position * (end - start)).requires_grad_()
        values = answers(between)
        gradients = [torch.autograd.grad(value, between, retain_graph=True)[0] for value in values]
        weighted = weight * torch.stack(gradients)
        total = weighted if total is None else total + weighted
    assert total is not None  # noqa: S101 - for the type checker: there are points
    return total


def _quadrature(points: int) -> list[tuple[float, float]]:
    """Return the positions between 0 and 1, and their weights, of Gauss-Legendre quadrature: from the eigenvalues and
    eigenvectors of its Jacobi matrix (Golub and Welsch 1969, https://doi.org/10.1090/S0025-5718-69-99647-1).
    """
    order = torch.arange(1, points, dtype=torch.float64)
    beside = order / (4 * order**2 - 1).sqrt()
    positions, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return list(zip(((positions + 1) / 2).tolist(), (vectors[0] ** 2).tolist(), strict=True))
