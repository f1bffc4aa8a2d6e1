"""How a slide is cut into chunks, and how chunks of different lengths become one batch."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Which patches of a slide a chunk holds: a range of places costs no copy, a tensor of places one.
Cut = range | Tensor
_MOST_IN_BATCH, _LEAST_STEPS = 128, 8  # of automatic batches


@dataclass(frozen=True)
class Chunk:
    """The part `cut` of the slide with `features (N, D)`; the class, the weight of its loss, the slide's index."""

    features: Tensor
    cut: Cut
    label: int
    weight: float
    slide: int


@dataclass(frozen=True)
class Batch:
    """`bags`: B tensors (n_i, D), float16 or float32 as stored; `labels (B,)` int64; `weights (B,)` float32; `slides
    (B,)` int64. Bags are not padded: a batch costs what its patches cost.
    """

    bags: tuple[Tensor, ...]
    labels: Tensor
    weights: Tensor
    slides: Tensor

    def to(self, device: torch.device) -> "Batch":
        bags = tuple(bag.to(device, non_blocking=True) for bag in self.bags)
        labels, weights, slides = (
            part.to(device, non_blocking=True) for part in (self.labels, self.weights, self.slides)
        )
        return Batch(bags, labels, weights, slides)


def chunks_per_step(chunks: int) -> int:
    """Return the size of automatic batches for an epoch of so many chunks."""
    return min(_MOST_IN_BATCH, -(-chunks // _LEAST_STEPS))


def num_chunks(num_instances: int, chunk_size: int | None) -> int:
    return 1 if chunk_size is None else math.ceil(num_instances / chunk_size)


def cut_chunks(
    num_instances: int, chunk_size: int | None, *, sequential: bool = False, rng: np.random.Generator | None = None
) -> list[Cut]:
    """Cuts that hold every instance exactly once, in ascending order, each at most `chunk_size` long (None: one cut).

    Lengths differ by at most one. `sequential` cuts are runs of neighbours. Otherwise a cut is spread over the whole
    slide: with `rng` at random; without it cut k of K takes every K-th instance from the k-th on, so that the same
    slide is always cut the same way.
    """
    count = num_chunks(num_instances, chunk_size)
    if count == 1:
        return [range(num_instances)]
    if sequential:
        edges = [part * num_instances // count for part in range(count + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(edges)]
    if rng is None:
        return [range(start, num_instances, count) for start in range(count)]
    order = rng.permutation(num_instances)
    return [torch.from_numpy(np.sort(order[start::count])) for start in range(count)]


def take(features: Tensor, cut: Cut) -> Tensor:
    """The instances `(n, D)` of `features (N, D)` that a cut holds; a view of them where the cut is a range."""
    return features[cut.start : cut.stop : cut.step] if isinstance(cut, range) else features.index_select(0, cut)


def collate(chunks: Sequence[Chunk], pin_memory: bool = False) -> Batch:
    """Chunks as one batch, in their order; their features are copied, so that a batch may be changed.

    `pin_memory` copies them into page-locked memory, from which a CUDA device fetches while the computation goes on.
    """
    return Batch(
        tuple(_copied(chunk, pin_memory) for chunk in chunks),
        torch.tensor([chunk.label for chunk in chunks], pin_memory=pin_memory),
        torch.tensor([chunk.weight for chunk in chunks], dtype=torch.float32, pin_memory=pin_memory),
        torch.tensor([chunk.slide for chunk in chunks], pin_memory=pin_memory),
    )


def _copied(chunk: Chunk, pin_memory: bool) -> Tensor:
    features, cut = chunk.features, chunk.cut
    bag = torch.empty((len(cut), features.shape[1]), dtype=features.dtype, pin_memory=pin_memory)
    if isinstance(cut, range):
        return bag.copy_(take(features, cut))
    return torch.index_select(features, 0, cut, out=bag)
