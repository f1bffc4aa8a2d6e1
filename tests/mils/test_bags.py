"""A batch of bags of different lengths equals the bags taken one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_helpers import MODELS, D, bag, gradients, relative_error, small

from MILS import ModelError
from MILS.bag_model import PADDED_ROWS, groups_to_pad, padded

walk = pytest.mark.parametrize("name", MODELS)
ROWS = PADDED_ROWS["cpu"]


def check_against_each(model, bags, tolerance=1e-12):
    model.zero_grad()
    logits, aux = model.forward_bags(bags)
    (torch.tanh(logits) * torch.arange(1, 4)).sum().backward()
    found = gradients(model)
    model.zero_grad()
    alone = [model(one.unsqueeze(0)) for one in bags]
    expected = torch.cat([one for one, _ in alone])
    (torch.tanh(expected) * torch.arange(1, 4)).sum().backward()
    assert relative_error(logits, expected) < tolerance
    for key, values in aux.items():
        assert len(values) == len(bags)
        for value, (_, one) in zip(values, alone, strict=True):
            assert value.shape == one[key][0].shape
            assert relative_error(value, one[key][0]) < tolerance
    for key, grad in gradients(model).items():
        assert (found[key] - grad).norm() < 100 * tolerance * max(1.0, grad.norm()), key


@walk
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7))
def test_equals_the_bags_one_by_one(name, lengths):
    check_against_each(small(name), [bag(n, seed=i)[0] for i, n in enumerate(lengths)])


@walk
def test_small_bags_among_large_ones(name):
    lengths = [ROWS + 30, 5, ROWS // 2, 2 * ROWS + 1, ROWS // 2 - 1, 5, 1]
    check_against_each(small(name), [bag(n, seed=i)[0] for i, n in enumerate(lengths)])


@walk
@pytest.mark.parametrize("first", [torch.float16, torch.float32])
def test_no_precision_is_lost_to_a_neighbour(name, first):
    model = small(name, dtype=torch.float32)
    bags = [bag(9)[0].to(first), bag(7, seed=1)[0].to(torch.float32), bag(8, seed=2)[0].to(torch.float16)]
    check_against_each(model, bags, 1e-4 if name == "TransMIL" else 2e-6)


@walk
def test_bad_batches_are_named(name):
    model = small(name)
    with pytest.raises(ModelError, match=f"{name}: no bag in the batch"):
        model.forward_bags([])
    with pytest.raises(ModelError, match=f"{name}: no instance"):
        model.forward_bags([bag(3)[0], torch.zeros(0, D, dtype=torch.float64)])
    with pytest.raises(ModelError, match=rf"{name}: x must be a float tensor \(B, N, 12\), got .*\(1, 3, 5\)"):
        model.forward_bags([bag(3)[0], torch.zeros(3, 5)])


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(1, 2048))
def test_groups_hold_each_bag_once_and_little_padding(lengths, most_rows):
    groups = list(groups_to_pad(lengths, most_rows))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert sizes == sorted(sizes, reverse=True)
        assert len(group) == 1 or len(group) * sizes[0] <= most_rows
        assert sizes[0] <= max(64, 1.5 * sizes[-1])
    # Two neighbours that would fit together are together.
    for one, other in itertools.pairwise(groups):
        longest, follower = lengths[one[0]], lengths[other[0]]
        assert (len(one) + 1) * longest > most_rows or longest > max(64, 1.5 * follower)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_padding_is_zeros_that_the_mask_tells(lengths):
    bags = [1 + bag(n, seed=i)[0].abs() for i, n in enumerate(sorted(lengths, reverse=True))]
    x, mask = padded(bags)
    assert (mask is None) == (len(set(lengths)) == 1)
    for i, one in enumerate(bags):
        assert torch.equal(x[i, : len(one)], one)
        assert (x[i, len(one) :] == 0).all()
        assert mask is None or mask[i].tolist() == [False] * len(one) + [True] * (len(bags[0]) - len(one))
