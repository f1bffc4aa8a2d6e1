"""A long bag, block by block, has the gradients of one pass, and memory has not grown with it."""

import pytest
import torch
from mil_helpers import MERGEABLE, D, bag, gradients, padded, relative_error, small
from torch.utils._python_dispatch import TorchDispatchMode

from MILS import mergeable
from MILS.mergeable import BLOCK_ROWS

walk = pytest.mark.parametrize("name", MERGEABLE)
KEPT_OR_NOT = pytest.mark.parametrize("saved_rows", [1000, 0], ids=["products kept", "recomputed"])


@pytest.fixture
def in_blocks(monkeypatch):
    """Run a function with blocks of a few instances."""

    def run(function, rows=7, saved_rows=1000):
        with monkeypatch.context() as patch:
            patch.setitem(BLOCK_ROWS, "cpu", rows)
            patch.setattr(mergeable, "SAVED_ROWS", saved_rows)
            return function()

    return run


def loss_of(logits, aux):
    """A loss that depends on logits and attention."""
    weights = torch.linspace(-1, 2, aux["attn"].numel(), dtype=aux["attn"].dtype).view_as(aux["attn"])
    return torch.tanh(logits).sum() + (aux["attn"] * weights).sum()


def answer(model, x, mask=None):
    """Logits, attention and gradients."""
    model.zero_grad()
    logits, aux = model(x, mask)
    loss_of(logits, aux).backward()
    return logits, aux["attn"], gradients(model)


def check_equal(found, expected, tolerance):
    (logits, attn, grads), (expected_logits, expected_attn, expected_grads) = found, expected
    assert relative_error(logits, expected_logits) < tolerance
    assert relative_error(attn, expected_attn) < tolerance
    for name, grad in expected_grads.items():
        # A parameter whose true gradient is zero (a constant added to every score) has rounding for a gradient.
        assert (grads[name] - grad).norm() < tolerance * max(1.0, grad.norm()), name


@walk
@KEPT_OR_NOT
@pytest.mark.parametrize("rows", [1, 7, 16, 29])
def test_gradients_equal_those_of_one_pass(name, rows, saved_rows, in_blocks):
    model, x = small(name), bag(30)
    check_equal(in_blocks(lambda: answer(model, x), rows, saved_rows), answer(model, x), 1e-12)


@walk
@KEPT_OR_NOT
def test_gradients_equal_those_of_one_pass_with_padding(name, saved_rows, in_blocks):
    """Blocks that are all padding among them, and padding that is no number."""
    model = small(name)
    x, mask = padded([bag(9)], 40)
    assert mask.split(4, dim=1)[0].shape == (1, 4)
    assert any(block.all() for block in mask.split(4, dim=1))
    check_equal(in_blocks(lambda: answer(model, x, mask), 4, saved_rows), answer(model, x, mask), 1e-12)


@walk
@KEPT_OR_NOT
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_in_single_precision(name, dtype, saved_rows, in_blocks):
    model, x = small(name, dtype=torch.float32), bag(30).to(dtype)
    check_equal(in_blocks(lambda: answer(model, x), 7, saved_rows), answer(model, x), 1e-4)


@walk
@KEPT_OR_NOT
def test_the_way_back_has_the_dropout_of_the_way_there(name, saved_rows, in_blocks):
    """The loss under one draw is a function of the weights: its slope must be what the gradient says."""
    model, x = small(name, train=True, dropout=0.4), bag(30)
    direction = {key: torch.randn_like(parameter) for key, parameter in model.named_parameters()}

    def move(step):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter += step * direction[key]

    def loss():
        torch.manual_seed(5)
        return torch.tanh(model(x)[0]).sum()

    def slopes():
        value = loss()
        torch.rand(1)  # what is drawn in between must not matter, nor be drawn again
        state = torch.get_rng_state()
        value.backward()
        assert torch.equal(torch.get_rng_state(), state)
        by_gradient = sum((p.grad * direction[key]).sum().item() for key, p in model.named_parameters())
        move(1e-6)
        above = loss().item()
        move(-2e-6)
        return by_gradient, (above - loss().item()) / 2e-6

    by_gradient, measured = in_blocks(slopes, 7, saved_rows)
    assert by_gradient == pytest.approx(measured, rel=1e-5)


@walk
@KEPT_OR_NOT
def test_frozen_layers_get_no_gradient_and_the_others_theirs(name, saved_rows, in_blocks):
    model, x = small(name), bag(30)
    expected = answer(model, x)[2]
    model.zero_grad()
    frozen = list(model.instance_layers()[0].parameters())
    for parameter in frozen:
        parameter.requires_grad_(False)
    in_blocks(lambda: loss_of(*model(x)).backward(), saved_rows=saved_rows)
    for key, parameter in model.named_parameters():
        if any(parameter is one for one in frozen):
            assert parameter.grad is None
        else:
            assert (parameter.grad - expected[key]).norm() < 1e-10, key


@walk
def test_the_features_own_gradient(name, in_blocks):
    """What an instance's features are worth, as saliency methods ask."""
    model, x = small(name), bag(30)

    def of_x():
        leaf = x.clone().requires_grad_()
        model(leaf)[0].square().sum().backward()
        return leaf.grad

    assert relative_error(in_blocks(of_x), of_x()) < 1e-12


@walk
def test_autocast_reaches_the_way_back(name, in_blocks):
    model, x = small(name, dtype=torch.float32), bag(40, dtype=torch.float32)

    def in_half():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, _ = model(x)
        logits.float().square().sum().backward()
        return gradients(model)

    expected = in_half()
    for saved_rows in (1000, 0):
        found = in_blocks(in_half, 7, saved_rows)
        for key, grad in expected.items():
            assert found[key].dtype == torch.float32
            if grad.norm() > 1e-2 and name != "maxPool":  # whose winners are decided by a hair
                assert relative_error(found[key], grad) < 0.1, key


class Products(TorchDispatchMode):
    """Counts how often instances are multiplied with the first layer's weights."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            known = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self.count += any(arg.data_ptr() == self.weight.data_ptr() for arg in known)
        return function(*args, **(kwargs or {}))


@walk
@pytest.mark.parametrize(("saved_rows", "times"), [(1000, 1), (0, 2)])
def test_a_bag_of_moderate_size_is_projected_once(name, saved_rows, times, in_blocks):
    model, x = small(name), bag(35)
    with Products(model.instance_layers()[0].weight) as products:
        in_blocks(lambda: answer(model, x), 7, saved_rows)
    assert products.count == 5 * times


class Largest(TorchDispatchMode):
    """The most elements in what one operation makes anew, views aside."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, t.numel())
        return result


@walk
def test_a_huge_bag_makes_nothing_that_grows_with_it_but_attention(name, in_blocks):
    sizes = []
    for instances in (300, 3000):
        model, x = small(name, **({"num_queries": 1} if name == "LiteMIL" else {})), bag(instances)
        with Largest() as largest:
            in_blocks(lambda model=model, x=x: model(x)[0].sum().backward(), 20, saved_rows=0)
        sizes.append(largest.numel)
    widest = max(4 * 3000, 2 * sizes[0])  # four heads' attention
    assert sizes[1] <= widest


@KEPT_OR_NOT
def test_a_switch_of_mode_before_the_way_back_is_refused(saved_rows, in_blocks):
    """The dropout of the way there could not be had again."""
    model, x = small("LiteMIL", train=True), bag(30)
    loss = in_blocks(lambda: model(x)[0].sum(), saved_rows=saved_rows)
    model.eval()
    with pytest.raises(RuntimeError, match="LiteMIL: was switched between training and evaluation"):
        loss.backward()


def test_nothing_is_kept_after_the_way_back(in_blocks):
    """A training loop holds the last loss while the next bag goes through."""
    model, x = small("LiteMIL"), bag(30)
    logits, _ = in_blocks(lambda: model(x))
    logits.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        logits.sum().backward()


def test_weights_computed_from_others_get_their_gradient(in_blocks):
    """The first layer's weight is then no parameter: such a bag goes through in one piece."""
    model, x = small("LiteMIL"), bag(30)
    torch.nn.utils.parametrizations.weight_norm(model.instance_layers()[0])
    check_equal(in_blocks(lambda: answer(model, x)), answer(model, x), 1e-12)


def test_a_long_bag_takes_no_gradient_from_a_short_one(in_blocks):
    """Under autocast: copies of weights in half precision are kept between calls."""
    model = small("ABMIL", dtype=torch.float32)
    bags = [bag(n, seed=n, dtype=torch.float32)[0] for n in (30, 5)]

    def of_the_short():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(bags[0].unsqueeze(0))
            logits, _ = model(bags[1].unsqueeze(0))
        logits.float().square().sum().backward()
        return gradients(model)

    expected = of_the_short()
    for key, grad in in_blocks(of_the_short).items():
        assert torch.equal(grad, expected[key]), key


def test_a_second_derivative_is_refused(in_blocks):
    model, x = small("LiteMIL"), bag(30)
    loss = in_blocks(lambda: model(x)[0].square().sum())
    (grad,) = torch.autograd.grad(loss, [model.stream.query], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        grad.sum().backward()


def test_bags_longer_than_a_block_are_streamed(monkeypatch):
    """The path above is the one a bag takes by its size alone."""
    called = []
    original = mergeable.stream
    monkeypatch.setattr(
        mergeable, "stream", lambda *args, **kwargs: called.append(kwargs["keep_products"]) or original(*args, **kwargs)
    )
    monkeypatch.setattr(mergeable, "SAVED_ROWS", 5000)
    model = small("meanPool", dtype=torch.float32)
    for instances in (BLOCK_ROWS["cpu"], BLOCK_ROWS["cpu"] + 1, 5001):
        model(torch.zeros(1, instances, D))
    with torch.no_grad():
        model(torch.zeros(1, 5001, D))
    assert called == [True, False]
