"""The parts: summaries that merge, and what holds them together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_helpers import bag, relative_error, small
from torch import nn

from MILS import build_mil
from MILS.bag_model import evaluating
from MILS.summaries import MaxSummary, attend


def scored(n, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        scale * torch.randn(2, 3, n, generator=generator, dtype=torch.float64),
        torch.randn(2, n, 4, generator=generator, dtype=torch.float64),
    )


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), scale=st.sampled_from([1.0, 100.0, 1e5]))
def test_attention_blocks_merge_in_any_grouping(sizes, scale):
    scores, values = scored(sum(sizes), scale)
    expected = torch.softmax(scores, dim=-1) @ values
    blocks = zip(scores.split(sizes, dim=2), values.split(sizes, dim=1), strict=True)
    parts = [attend(s, v, None)[0] for s, v in blocks]
    left, right = parts[0], parts[-1]
    for part in parts[1:]:
        left = left.merge(part)
    for part in parts[-2::-1]:
        right = part.merge(right)
    for whole in (left, right, attend(scores, values, None)[0]):
        assert relative_error(whole.pooled(), expected) < 1e-12
        assert relative_error(whole.weights(scores), torch.softmax(scores, dim=-1)) < 1e-12
        assert torch.equal(whole.mass(), torch.ones(2, 3, dtype=torch.float64))


def test_a_block_of_padding_merges_as_nothing():
    scores, values = scored(5)
    real, _ = attend(scores, values, None)
    nothing, _ = attend(*scored(3, seed=1), torch.ones(2, 3, dtype=torch.bool))
    for whole in (real.merge(nothing), nothing.merge(real), nothing.merge(nothing).merge(real)):
        assert torch.equal(whole.pooled(), real.pooled())
        assert torch.equal(whole.normaliser, real.normaliser)


def test_dropout_scales_the_weights_and_their_mass():
    scores, values = scored(6)
    scale = torch.tensor([0.0, 2, 2, 0, 0, 2], dtype=torch.float64)

    class Keep(nn.Module):
        def forward(self, weights):
            return weights * scale

    halves = [attend(scores[..., s], values[:, s], None, None)[0] for s in (slice(0, 3), slice(3, 6))]
    summary, _ = attend(scores, values, None, Keep())
    weights = torch.softmax(scores, dim=-1)
    assert relative_error(summary.pooled(), (weights * scale) @ values) < 1e-12
    assert relative_error(summary.mass(), (weights * scale).sum(-1)) < 1e-12
    assert relative_error(summary.weights(scores), weights) < 1e-12
    assert relative_error(halves[0].merge(halves[1]).pooled(), weights @ values) < 1e-12


@pytest.mark.parametrize("autocast", [True, False])
def test_a_long_bag_in_half_precision_does_not_overflow(autocast):
    scores, values = torch.zeros(1, 1, 100_000), torch.full((1, 100_000, 2), 2.0)
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        summary, _ = attend(scores.half(), values.half(), None)
    torch.testing.assert_close(summary.pooled(), torch.full((1, 1, 2), 2.0))


def test_maxima_merge_with_the_first_of_equals():
    def summary(values):
        return MaxSummary(*torch.tensor([values]).max(dim=1), len(values))

    a, b, c = summary([[1.0, 5], [4, 5]]), summary([[4.0, 7]]), summary([[9.0, 7], [9, 7]])
    for whole in (a.merge(b).merge(c), a.merge(b.merge(c))):
        assert whole.maximum.tolist() == [[9, 7]]
        assert whole.winner.tolist() == [[3, 2]]
        assert whole.length == 5


def test_evaluating_leaves_each_module_as_it_was():
    model = small("LiteMIL", train=True)
    model.stream.project.eval()
    before = [module.training for module in model.modules()]

    def interrupted():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [module.training for module in model.modules()] == before


def test_blocks_stream_without_being_held():
    """Each block can be freed before the next is made."""
    import weakref

    seen = []

    def blocks():
        for seed in range(5):
            block = bag(8, seed=seed)[0]
            seen.append(weakref.ref(block))
            yield block
            del block
            assert sum(ref() is not None for ref in seen) <= 1

    small("ABMIL").forward_blocks(blocks())
    assert len(seen) == 5


@pytest.mark.parametrize("name", ["LiteMIL", "ABMIL", "ABMIL_Multihead", "meanPool", "maxPool"])
def test_groups_of_a_bag_merge_to_any_part_of_it(name, monkeypatch):
    torch.manual_seed(0)
    model = build_mil(name, input_dim=12, num_classes=3).eval()
    bag = torch.randn(50, 12)
    groups = torch.stack([torch.randint(4, (50,)), torch.arange(50) // 10]).to(torch.int8)
    monkeypatch.setattr("MILS.mergeable.GROUPED_ROWS", 16)
    found = model.summaries(bag.split(9), groups)
    assert [len(parts) for parts in found] == [4, 5]
    for row, parts in zip(groups, found, strict=True):
        for chosen in ([0], [1, 3], [3, 2, 1, 0]):
            merged = parts[chosen[0]]
            for group in chosen[1:]:
                merged = merged.merge(parts[group])
            alone, _ = model(bag[torch.isin(row, torch.tensor(chosen))][None])
            torch.testing.assert_close(model.classify(merged), alone, atol=1e-5, rtol=1e-5)
