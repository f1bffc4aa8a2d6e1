"""Which patches argue for each output of a slide's answer, and which against it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from MILS.bag_model import BagModel
from MILS.evidence import path_slopes
from MILS.mergeable import MergeableModel
from utils.tasks.task import Task

# By gradients, the contributions add up to this share of the signals: each point costs a pass over all patches.
_TOLERANCE, _MOST_POINTS = 1e-4, 128


@dataclass(frozen=True)
class Evidence:
    """Signed contributions of N patches to the C signals of a slide (`Task.signals`; of classes, their log-odds).

    Over the patches they add up to `signals (C,)` less `reference (C,)`, the signals of the reference slide: the mean
    of the training slides, in which classes weigh alike, or, if `is_own_mean`, the slide itself, all its patches
    weighted alike.
    """

    contributions: NDArray[np.float32]  # (C, N)
    signals: NDArray[np.float64]
    reference: NDArray[np.float64]
    is_own_mean: bool


@dataclass(frozen=True)
class ReadBag:
    """A bag of `size` patches that a model has read: `blocks` gives its features `(n, D)` again, the summary and the
    trace are those of `MergeableModel.read_blocks`.
    """

    blocks: Callable[[], Iterable[Tensor]]
    summary: Any
    trace: Tensor | None
    size: int

    @classmethod
    def read(
        cls, model: MergeableModel, blocks: Callable[[], Iterable[Tensor]], size: int, keep_trace: bool
    ) -> ReadBag:
        """Read a bag, once."""
        return cls(blocks, *model.read_blocks(blocks(), keep_trace), size)

    @property
    def traced(self) -> Tensor:
        """Return the trace, which was kept."""
        assert self.trace is not None  # noqa: S101 - for the type checker
        return self.trace


def merged(bags: Sequence[ReadBag]) -> ReadBag:
    """Return several bags as one, in their order."""
    if len(bags) == 1:
        return bags[0]
    summary = functools.reduce(lambda earlier, later: earlier.merge(later), [bag.summary for bag in bags])
    traces = [bag.trace for bag in bags if bag.trace is not None]
    return ReadBag(
        lambda: itertools.chain.from_iterable(bag.blocks() for bag in bags),
        summary,
        torch.cat(traces, dim=-1) if len(traces) == len(bags) else None,
        sum(bag.size for bag in bags),
    )


def evidence_of(task: Task, model: MergeableModel, bags: Sequence[ReadBag]) -> Evidence:
    """Return the evidence in the bags of one slide. The slide's values are the mean of the bags', weighted by size.

    The patches are in the order of the bags.
    """
    sizes = torch.tensor([bag.size for bag in bags], dtype=torch.float64)
    shares = (sizes / sizes.sum()).to(next(model.parameters()).device, model.dtype)
    pooled = torch.cat([model.pooled(bag.summary) for bag in bags])  # (K, R, d)
    training_mean = model.pooled_reference
    reference = _own_mean(model, bags, shares, pooled) if training_mean is None else training_mean.to(pooled)
    slopes = path_slopes(lambda z: task.signals(model.classify_pooled(z), shares), pooled, reference)
    contributions = [
        model.contributions(bag.blocks(), bag.summary, bag.traced, slopes.mean[:, index], reference)
        for index, bag in enumerate(bags)
    ]
    return Evidence(
        torch.cat(contributions, dim=1).float().cpu().numpy(),
        slopes.end.cpu().double().numpy(),
        slopes.start.cpu().double().numpy(),
        is_own_mean=training_mean is None,
    )


def gradient_evidence(task: Task, model: BagModel, bags: Sequence[Tensor]) -> Evidence:
    """Return the evidence in the bags `(n_k, D)` of one slide, by the gradients of a model that does not merge.

    All patches go from the reference, the mean training patch, straight to what they are: a patch contributes the sum
    of its features' changes, each times the mean slope of the signal on the way (integrated gradients). The reference
    slide has as many patches, all alike.
    """
    sizes = [len(bag) for bag in bags]
    shares = (torch.tensor(sizes, dtype=torch.float64) / sum(sizes)).to(bags[0].device, model.dtype)
    patches = torch.cat(list(bags)).to(model.dtype)
    training_mean = model.pooled_reference
    reference = (patches.mean(dim=0, keepdim=True) if training_mean is None else training_mean.to(patches)).expand_as(
        patches
    )

    def signals(x: Tensor) -> Tensor:
        logits = torch.cat([model(part.unsqueeze(0))[0] for part in x[0].split(sizes)])
        return task.signals(logits, shares)

    slopes = path_slopes(signals, patches.unsqueeze(0), reference, _TOLERANCE, _MOST_POINTS)
    return Evidence(
        (slopes.mean[:, 0] * (patches - reference)).sum(dim=-1).float().cpu().numpy(),
        slopes.end.cpu().double().numpy(),
        slopes.start.cpu().double().numpy(),
        is_own_mean=training_mean is None,
    )


def mean_pooled(model: MergeableModel, slides: Iterable[Sequence[ReadBag]], weights: Iterable[float]) -> Tensor:
    """Return the weighted mean pooled embedding (R, d) of slides, each read as chunks, which count by their sizes."""
    total, weight_sum = None, 0.0
    for bags, weight in zip(slides, weights, strict=False):
        sizes = torch.tensor([bag.size for bag in bags], dtype=torch.float64)
        pooled = torch.cat([model.pooled(bag.summary) for bag in bags]).cpu().double()  # mps has no float64
        mean = weight * torch.einsum("k,krd->rd", sizes / sizes.sum(), pooled)
        total, weight_sum = mean if total is None else total + mean, weight_sum + weight
    assert total is not None  # noqa: S101 - for the type checker: a training has slides
    return (total / weight_sum).to(next(model.parameters()))


def _own_mean(model: MergeableModel, bags: Sequence[ReadBag], shares: Tensor, pooled: Tensor) -> Tensor:
    """Return the mean embedding of a slide's patches, in each row of the pooled embedding."""
    means = torch.stack([model.mean_embedding(bag.blocks()) for bag in bags])
    return (shares.to(means) @ means).expand(pooled.shape[1:]).to(pooled)


def mean_evidence(each: Sequence[Evidence], counts: Sequence[int]) -> Evidence:
    """Return the mean of several models' evidence in the same patches, each counted so often."""

    def mean(values: Sequence[NDArray]) -> NDArray:
        return np.average(values, axis=0, weights=counts)

    return Evidence(
        mean([evidence.contributions for evidence in each]).astype(np.float32),
        mean([evidence.signals for evidence in each]),
        mean([evidence.reference for evidence in each]),
        any(evidence.is_own_mean for evidence in each),
    )
