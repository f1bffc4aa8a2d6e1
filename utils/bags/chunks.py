"""How a slide is cut into chunks, and how chunks of different lengths become one batch."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.tasks.targets import Target

# The indices of a chunk's patches in its slide: a range costs no copy of the features, a tensor one.
Cut = range | Tensor
MOST_IN_BATCH, _LEAST_STEPS = 128, 8  # of automatic batches


@dataclass(frozen=True)
class Chunk:
    """The patches `cut` of a slide with `features (N, D)`; its target, the weight of its loss, the slide's index."""

    features: Tensor
    cut: Cut
    label: Target
    weight: float
    slide: int


@dataclass(frozen=True)
class Batch:
    """`bags`: B tensors (n_i, D), float16 or float32 as stored; `labels`: the targets, of classes (B,) int64; `weights
    (B,)` float32; `slides (B,)` int64. Bags are not padded, so the cost of a batch depends on its patches alone.
    """

    bags: tuple[Tensor, ...]
    labels: Tensor
    weights: Tensor
    slides: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.bags, self.labels, self.weights, self.slides)

    def to(self, device: torch.device) -> "Batch":
        bags = tuple(bag.to(device, non_blocking=True) for bag in self.bags)
        labels, weights, slides = (
            values.to(device, non_blocking=True) for values in (self.labels, self.weights, self.slides)
        )
        return Batch(bags, labels, weights, slides)


def chunks_per_step(chunks: int) -> int:
    """Return the size of automatic batches in an epoch of this many chunks."""
    return min(MOST_IN_BATCH, -(-chunks // _LEAST_STEPS))


def num_chunks(num_instances: int, chunk_size: int | None) -> int:
    return 1 if chunk_size is None else math.ceil(num_instances / chunk_size)


def cut_chunks(
    num_instances: int, chunk_size: int | None, *, sequential: bool = False, rng: np.random.Generator | None = None
) -> list[Cut]:
    """Cut a slide into chunks of at most `chunk_size` instances (None: one chunk), every instance in exactly one.

    Lengths differ by at most one; instances within a chunk are in ascending order. `sequential` chunks are runs of
    neighbours. Otherwise each is spread over the whole slide: at random with `rng`; without it chunk k of K takes every
    K-th instance from the k-th on, so that the same slide is always cut the same way.
    """
    count = num_chunks(num_instances, chunk_size)
    if count == 1:
        return [range(num_instances)]
    if sequential:
        edges = [number * num_instances // count for number in range(count + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(edges)]
    if rng is None:
        return [range(start, num_instances, count) for start in range(count)]
    order = rng.permutation(num_instances)
    return [torch.from_numpy(np.sort(order[start::count])) for start in range(count)]


def cuts_on(cuts: list[Cut], device: torch.device) -> list[Cut]:
    """Return a slide's cuts with their indices on a device, to which they are sent together."""
    indices = [cut for cut in cuts if isinstance(cut, Tensor)]
    if device.type == "cpu" or not indices:
        return cuts
    return list(torch.cat(indices).to(device).split([len(cut) for cut in indices]))


def take(features: Tensor, cut: Cut) -> Tensor:
    """Return the instances `(n, D)` of `features (N, D)` in a cut; a view of them if the cut is a range."""
    return features[cut.start : cut.stop : cut.step] if isinstance(cut, range) else features.index_select(0, cut)


def collate(chunks: Sequence[Chunk], pin_memory: bool = False) -> Batch:
    """Make one batch of the chunks, in their order; their features are copied, so that a batch may be changed.

    `pin_memory` copies them into page-locked memory, from which a CUDA device fetches during the computation; features
    that are on a device stay there.
    """
    return Batch(
        tuple(_copied(chunk, pin_memory) for chunk in chunks),
        torch.tensor([chunk.label for chunk in chunks], pin_memory=pin_memory),
        torch.tensor([chunk.weight for chunk in chunks], dtype=torch.float32, pin_memory=pin_memory),
        torch.tensor([chunk.slide for chunk in chunks], pin_memory=pin_memory),
    )


def _copied(chunk: Chunk, pin_memory: bool) -> Tensor:
    features, cut = chunk.features, chunk.cut
    shape, device = (len(cut), features.shape[1]), features.device
    bag = torch.empty(shape, dtype=features.dtype, device=device, pin_memory=pin_memory and device.type == "cpu")
    if isinstance(cut, range):
        return bag.copy_(take(features, cut))
    return torch.index_select(features, 0, cut, out=bag)


def windows(slides: np.ndarray, sizes: Sequence[int], patches: int) -> Iterator[list[int]]:
    """Yield runs of the slides that hold about so many patches together; `sizes` are those of all slides."""
    window: list[int] = []
    total = 0
    for slide in slides.tolist():
        window.append(slide)
        total += sizes[slide]
        if total >= patches:
            yield window
            window, total = [], 0
    if window:
        yield window


def shuffled_batches(
    runs: Iterable[Sequence[int]],
    chunks_of: Callable[[int], list[Chunk]],
    batch_size: int,
    rng: np.random.Generator,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield the chunks of all slides in batches, shuffled within each of the `runs` of slides."""
    waiting: list[Chunk] = []
    for run in runs:
        fresh = [chunk for slide in run for chunk in chunks_of(slide)]
        waiting += [fresh[position] for position in rng.permutation(len(fresh))]
        whole = len(waiting) // batch_size * batch_size
        for start in range(0, whole, batch_size):
            yield collate(waiting[start : start + batch_size], pin_memory)
        waiting = waiting[whole:]
    if waiting:
        yield collate(waiting, pin_memory)
