"""Dropout with a draw of its own is dropout."""

import pytest
import torch

from MILS.layers import Dropout


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_keeps_its_share_and_scales_it(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, dtype=torch.float64)
    found = Dropout(p)(x)
    kept = found != 0
    # Five standard deviations of a binomial share.
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert found.unique().numel() == 2
    assert found.max().item() == pytest.approx(1 / (1 - p), rel=2e-4)
    assert found.max().item() * round((1 - p) * 2**16) == 2**16, "the mean is not exact"


def test_draws_are_independent_along_each_axis():
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(400, 404)) != 0).double()
    for one, other in ((kept[:, :-1], kept[:, 1:]), (kept[:-1], kept[1:]), (kept[:, :-4], kept[:, 4:])):
        assert abs((one * other).mean().item() - 0.25) < 5 * (0.25 * 0.75 / one.numel()) ** 0.5


def test_each_draw_is_new_and_the_seed_s():
    dropout, x = Dropout(0.5), torch.ones(64)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (1, 7, 3), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_shape_and_type(shape, dtype):
    found = Dropout(0.25)(torch.ones(shape, dtype=dtype))
    assert found.shape == shape
    assert found.dtype == dtype


def test_the_gradient_is_the_scale_of_what_is_kept():
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    found = Dropout(0.3)(x)
    found.sum().backward()
    assert torch.equal(x.grad * x, found)
    assert set(x.grad.unique().tolist()) == {0.0, 2**16 / round(0.7 * 2**16)}


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_evaluation_and_a_rate_of_zero_change_nothing(p):
    x = torch.randn(9, 9)
    assert torch.equal(Dropout(p).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_rates_at_the_ends_are_finite():
    assert torch.equal(Dropout(1e-6)(torch.ones(1000)), torch.ones(1000))
    assert Dropout(1 - 1e-9)(torch.ones(1000)).isfinite().all()
