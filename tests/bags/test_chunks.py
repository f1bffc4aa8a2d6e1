"""Chunks hold every patch once; a batch is its chunks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.bags.chunks import Chunk, collate, cut_chunks, num_chunks, take

SIZES = st.one_of(st.none(), st.integers(1, 400))


@given(st.integers(1, 2000), SIZES, st.booleans(), st.one_of(st.none(), st.integers(0, 5)))
def test_chunks_hold_every_patch_exactly_once_in_order_and_are_balanced(num_instances, chunk_size, sequential, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    cuts = cut_chunks(num_instances, chunk_size, sequential=sequential, rng=rng)
    lengths = [len(cut) for cut in cuts]
    assert sorted(np.concatenate(cuts).tolist()) == list(range(num_instances))
    assert all((np.diff(np.asarray(list(cut))) > 0).all() for cut in cuts)
    assert max(lengths) <= (chunk_size or num_instances)
    assert max(lengths) - min(lengths) <= 1
    assert len(cuts) == num_chunks(num_instances, chunk_size)
    # No more chunks than the size demands.
    assert len(cuts) == 1 or (len(cuts) - 1) * (chunk_size or num_instances) < num_instances


@pytest.mark.parametrize(
    ("num_instances", "chunk_size", "lengths"),
    [(10, 1000, [10]), (1000, 1000, [1000]), (1001, 1000, [501, 500]), (5, 2, [2, 2, 1]), (1, 1, [1]), (7, None, [7])],
)
def test_short_slides_and_tails_are_neither_dropped_nor_left_small(num_instances, chunk_size, lengths):
    assert [len(cut) for cut in cut_chunks(num_instances, chunk_size)] == lengths


def test_without_a_generator_chunks_are_the_same_each_time_and_spread_over_the_slide():
    cuts = cut_chunks(1000, 300)
    assert all(np.array_equal(one, other) for one, other in zip(cuts, cut_chunks(1000, 300), strict=True))
    for cut in cuts:
        assert min(cut) < 10
        assert max(cut) > 990
        assert np.diff(cut).max() < 10


def test_sequential_chunks_are_runs_of_neighbours_whatever_the_generator():
    for rng in (None, np.random.default_rng(0)):
        assert cut_chunks(10, 4, sequential=True, rng=rng) == [range(3), range(3, 6), range(6, 10)]


def test_with_a_generator_the_cut_is_random_and_its_seeds_own():
    one, again, other = (cut_chunks(100, 30, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(left, right) for left, right in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], cut_chunks(100, 30)[0])


CUTS = [range(7), range(2, 5), range(1, 7, 3), torch.tensor([0, 3, 6])]


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_takes_its_patches_and_copies_only_scattered_ones(cut):
    features = torch.arange(14.0).view(7, 2)
    bag = take(features, cut)
    assert bag[:, 0].tolist() == [2 * place for place in cut]
    is_a_view = bag.untyped_storage().data_ptr() == features.untyped_storage().data_ptr()
    assert is_a_view == isinstance(cut, range)


@pytest.mark.parametrize("cut", CUTS)
def test_a_batch_may_be_changed_without_changing_the_slide(cut):
    features = torch.arange(14.0).view(7, 2)
    batch = collate([Chunk(features, cut, 0, 1.0, 0)])
    batch.bags[0].zero_()
    assert torch.equal(features, torch.arange(14.0).view(7, 2))


def chunk(length: int, slide: int = 0, dim: int = 3, dtype="f4") -> Chunk:
    features = 1 + slide + np.arange(length * dim, dtype=dtype).reshape(length, dim) / (length * dim)
    return Chunk(torch.from_numpy(features.astype(dtype)), range(length), slide % 2, 0.5 + slide, slide)


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["f2", "f4"])), min_size=1, max_size=6))
def test_a_batch_is_its_chunks_as_they_are(kinds):
    chunks = [chunk(length, slide, dtype=dtype) for slide, (length, dtype) in enumerate(kinds)]
    batch = collate(chunks)
    assert len(batch.bags) == len(chunks)
    for bag, one in zip(batch.bags, chunks, strict=True):
        assert bag.dtype == one.features.dtype
        assert torch.equal(bag, one.features)
    assert batch.labels.tolist() == [one.label for one in chunks]
    assert batch.weights.tolist() == [one.weight for one in chunks]
    assert batch.slides.tolist() == [one.slide for one in chunks]
    assert (batch.labels.dtype, batch.weights.dtype, batch.slides.dtype) == (torch.int64, torch.float32, torch.int64)


def test_a_batch_moves_as_a_whole():
    moved = collate([chunk(2), chunk(3)]).to(torch.device("meta"))
    tensors = [*moved.bags, moved.labels, moved.weights, moved.slides]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 5


@pytest.mark.gpu
def test_a_pinned_batch_arrives_as_it_was(card):
    chunks = [chunk(2), chunk(3, dtype="f2"), Chunk(torch.randn(9, 3), torch.tensor([0, 4, 8]), 1, 1.0, 1)]
    plain, pinned = collate(chunks), collate(chunks, pin_memory=True)
    assert all(bag.is_pinned() for bag in pinned.bags)
    moved = pinned.to(card)
    torch.cuda.synchronize()
    assert all(torch.equal(one.cpu(), other) for one, other in zip(moved.bags, plain.bags, strict=True))
    assert torch.equal(moved.weights.cpu(), plain.weights)
