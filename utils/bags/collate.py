"""How a slide is cut into chunks, and how chunks of different lengths become one batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Chunk:
    """A part of one slide: `features (n, D)`, the class, the weight of its loss, the slide's index."""

    features: np.ndarray
    label: int
    weight: float
    slide: int


@dataclass(frozen=True)
class Batch:
    """`bags`: B tensors (n_i, D), float16 or float32 as stored; `labels (B,)` int64; `weights (B,)` float32; `slides
    (B,)` int64. Bags are not padded: a batch costs what its patches cost.
    """

    bags: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    weights: torch.Tensor
    slides: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        bags = tuple(bag.to(device) for bag in self.bags)
        return Batch(bags, self.labels.to(device), self.weights.to(device), self.slides.to(device))


def num_chunks(num_instances: int, chunk_size: int | None) -> int:
    return 1 if chunk_size is None else math.ceil(num_instances / chunk_size)


def cut_chunks(num_instances: int, chunk_size: int | None, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Index arrays that hold every instance exactly once, each at most `chunk_size` long (None: one chunk).

    Lengths differ by at most one. With `rng` the cut is random; without it chunk k of K takes every K-th instance from
    the k-th on, so that each chunk is spread over the whole slide and the same slide is always cut the same way.
    """
    count = num_chunks(num_instances, chunk_size)
    order = np.arange(num_instances) if rng is None else rng.permutation(num_instances)
    return [order[start::count] for start in range(count)]


def collate(chunks: Sequence[Chunk]) -> Batch:
    """Chunks as one batch, in their order; the features are not copied."""
    return Batch(
        tuple(torch.from_numpy(chunk.features) for chunk in chunks),
        torch.tensor([chunk.label for chunk in chunks]),
        torch.tensor([chunk.weight for chunk in chunks], dtype=torch.float32),
        torch.tensor([chunk.slide for chunk in chunks]),
    )
