"""What every model promises, by a walk over the registry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_helpers import MERGEABLE, MODELS, D, bag, gradients, padded, relative_error, small

from MILS import ModelError, build_mil

HEADS = {"LiteMIL": 4, "ABMIL": 1, "ABMIL_Multihead": 3, "TransMIL": 2, "meanPool": 1, "maxPool": 1}
walk = pytest.mark.parametrize("name", MODELS)
walk_mergeable = pytest.mark.parametrize("name", MERGEABLE)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@walk
@pytest.mark.parametrize("train", [False, True])
def test_shapes_and_attention(name, train):
    logits, aux = small(name, train=train)(bag(23, bags=2))
    assert logits.shape == (2, 3)
    assert aux["attn"].shape == (2, HEADS[name], 23)
    assert (aux["attn"] >= 0).all()
    close(aux["attn"].sum(-1), torch.ones(2, HEADS[name], dtype=torch.float64))


@walk
@pytest.mark.parametrize("fill", [0.0, 1e30, float("nan"), float("inf")])
def test_padding_and_neighbours_change_nothing(name, fill):
    model = small(name)
    bags = [bag(n, seed=n) for n in (1, 7, 16, 30)]
    x, mask = padded(bags, 41, fill)
    logits, aux = model(x, mask)
    for i, one in enumerate(bags):
        alone, alone_aux = model(one)
        close(logits[i], alone[0])
        for key in aux:
            close(aux[key][i, :, ~mask[i]], alone_aux[key][0])
            assert (aux[key][i, :, mask[i]] == 0).all()


@walk
def test_batch_without_mask_equals_bags_one_by_one(name):
    model = small(name)
    x = bag(21, bags=4) * torch.tensor([0.1, 1, 3, 10]).view(4, 1, 1)
    logits, aux = model(x)
    for i in range(4):
        alone, alone_aux = model(x[i : i + 1])
        close(logits[i], alone[0])
        close(aux["attn"][i], alone_aux["attn"][0])


@walk
def test_gradients_do_not_see_the_padding(name):
    model = small(name)
    one = bag(9)
    x, mask = padded([one], 15)
    model(one)[0].square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model(x, mask)[0].square().sum().backward()
    for key, found in gradients(model).items():
        close(found, expected[key], 1e-8)


@walk
def test_every_parameter_gets_a_gradient(name):
    model = small(name, train=True)
    logits, _ = model(bag(60, bags=3))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # A constant added to every score cancels in the softmax.
        if key != "gate.score_bias":
            assert parameter.grad.abs().max() > 1e-8, key


@walk
def test_only_transmil_heeds_the_order(name):
    model = small(name)
    x = bag(26)
    order = torch.randperm(26, generator=torch.Generator().manual_seed(3))
    logits, aux = model(x)
    shuffled, shuffled_aux = model(x[:, order])
    if name == "TransMIL":
        assert (logits - shuffled).abs().max() > 1e-3
    else:
        close(shuffled, logits)
        close(shuffled_aux["attn"], aux["attn"][:, :, order])


@walk
def test_one_instance_gets_all_the_attention(name):
    model = small(name)
    x = bag(1)
    x_padded, mask = padded([x], 5)
    for logits, aux in (model(x), model(x_padded, mask)):
        assert logits.isfinite().all()
        close(aux["attn"].sum(-1), torch.ones(1, HEADS[name], dtype=torch.float64))
    close(model(x)[1]["attn"], torch.ones(1, HEADS[name], 1, dtype=torch.float64))


@walk
def test_every_instance_counts(name):
    model = small(name)
    x = bag(20)
    before, aux = model(x)
    for i in (aux["attn"][0].amax(dim=0) > 0).nonzero().flatten():
        changed = x.clone()
        changed[0, i] *= -3
        assert (model(changed)[0] - before).abs().max() > 1e-9


@walk
@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(4, D), None, r"x must be a float tensor \(B, N, 12\), got torch.float32 \(4, 12\)"),
        (torch.zeros(1, 4, D + 1), None, r"got torch.float32 \(1, 4, 13\)"),
        (torch.zeros(1, 4, D, dtype=torch.long), None, "got torch.int64"),
        (torch.zeros(1, 0, D), None, "no instance"),
        (torch.zeros(0, 4, D), None, "no instance"),
        (torch.zeros(1, 4, D), torch.zeros(1, 4), r"mask must be a bool tensor \(1, 4\).* got torch.float32"),
        (torch.zeros(1, 4, D), torch.zeros(1, 5, dtype=torch.bool), r"got torch.bool \(1, 5\)"),
        (torch.zeros(2, 4, D), torch.tensor([[False] * 4, [True] * 4]), "all 4 instances are padding in bag 1"),
        (torch.zeros(1, 0, D), torch.zeros(1, 0, dtype=torch.bool), "no instance"),
    ],
)
def test_bad_bags_are_named(name, x, mask, message):
    with pytest.raises(ModelError, match=f"{name}: .*{message}"):
        small(name, dtype=torch.float32)(x, mask)


@walk
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_float_type(name, dtype):
    model = small(name, dtype=torch.float32)
    x = bag(11).to(dtype)
    logits, aux = model(x)
    assert logits.dtype == aux["attn"].dtype == torch.float32
    expected, expected_aux = model(x.float())
    assert torch.equal(logits, expected)
    assert torch.equal(aux["attn"], expected_aux["attn"])


@walk
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_stays_near(name, autocast):
    model, x = small(name, dtype=torch.float32), bag(40, dtype=torch.float32)
    x_padded, mask = padded([x], 50)
    expected, expected_aux = model(x)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, aux = model(x_padded, mask)
    else:
        logits, aux = model.bfloat16()(x_padded, mask)
    assert aux["attn"].dtype == torch.float32
    close(aux["attn"].sum(-1), torch.ones(1, HEADS[name]), 1e-5)
    assert relative_error(logits.float(), expected) < 0.03
    if name != "maxPool":  # whose winners are decided by a hair
        assert relative_error(aux["attn"][..., ~mask[0]], expected_aux["attn"]) < 0.03


@walk
def test_a_large_bag(name):
    model = small(name, dtype=torch.float32)
    with torch.no_grad():
        logits, aux = model(bag(100_000, dtype=torch.float32))
    assert logits.isfinite().all()
    close(aux["attn"].double().sum(-1), torch.ones(1, HEADS[name], dtype=torch.float64), 1e-4)


@walk
@pytest.mark.parametrize(("input_dim", "num_classes"), [(1, 2), (7, 3), (33, 5)])
def test_any_input_dim_and_classes(name, input_dim, num_classes):
    model = build_mil(name, input_dim=input_dim, num_classes=num_classes).eval()
    assert model(torch.randn(1, 4, input_dim))[0].shape == (1, num_classes)


@walk_mergeable
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=6), half=st.booleans(), train=st.booleans())
def test_blocks_of_any_sizes_equal_one_pass(name, cuts, half, train):
    x = bag(30, seed=5)
    x = x.half() if half else x
    model = small(name)
    expected, expected_aux = model(x)
    model.train(train)
    blocks = torch.tensor_split(x[0], sorted(cuts))
    logits, aux = model.forward_blocks(iter(blocks))
    assert model.training == train
    assert logits.shape == (1, 3)
    assert not logits.requires_grad
    close(logits, expected)
    close(aux["attn"], expected_aux["attn"])


@walk_mergeable
def test_blocks_without_attention(name):
    model, x = small(name), bag(30)
    logits, aux = model.forward_blocks(x[0].split(7), attention=False)
    assert aux["attn"] is None
    close(logits, model(x)[0])


@walk_mergeable
def test_bad_blocks_are_named(name):
    model = small(name)
    with pytest.raises(ModelError, match=f"{name}: no instance in any of the blocks"):
        model.forward_blocks([torch.zeros(0, D)])
    with pytest.raises(ModelError, match=rf"{name}: .*\(B, N, 12\), got torch.float64 \(1, 4, 5\)"):
        model.forward_blocks([torch.zeros(4, 5, dtype=torch.float64)])
    with pytest.raises(ModelError, match=name):
        model.forward_blocks([torch.zeros(1, 4, D)])
