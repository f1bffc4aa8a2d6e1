"""The product by oneDNN is PyTorch's own, wherever it takes its place, and never the slower one."""

import shutil
import time

import pytest
import torch
from mil_helpers import MODELS, bag, gradients, small
from torch.nn import functional

from MILS import build_mil, layers

with_onednn = pytest.mark.skipif(layers.ONEDNN_LINEAR is None, reason="this build of PyTorch has no product by oneDNN")


@pytest.fixture(params=[False, True], ids=["pytorch", "oneDNN"])
def by_onednn(request, monkeypatch):
    if request.param and layers.ONEDNN_LINEAR is None:
        pytest.skip("this build of PyTorch has no product by oneDNN")
    monkeypatch.setattr(layers, "ONEDNN_PAYS", request.param)
    return request.param


def bag_shapes():
    x = torch.randn(3, 70, 96)
    return {
        "batch": x,
        "one bag": x[:1],
        "rows of each bag": x[:, 10:30],
        "columns": x[..., :64],
        "expanded": x[:1, :1].expand(4, 5, -1),
        "no row": x[:, :0],
    }


@pytest.mark.parametrize("name", bag_shapes())
@pytest.mark.parametrize("bias", [False, True])
def test_equals_functional_linear(by_onednn, name, bias):
    torch.manual_seed(0)
    x = bag_shapes()[name].requires_grad_()
    layer = layers.Linear(x.shape[-1], 24, bias=bias)
    found, expected = (
        layer(x),
        functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None),
    )
    assert found.shape == expected.shape
    pull = torch.randn(expected.shape)
    wanted = [x, *layer.parameters()]
    grads = torch.autograd.grad(found, wanted, pull)
    expected_grads = torch.autograd.grad(expected, wanted, pull.double())
    for one, other in zip([found, *grads], [expected, *expected_grads], strict=True):
        assert torch.allclose(one, other.float(), rtol=1e-4, atol=1e-4)


def test_each_head_has_its_own_product(by_onednn):
    x, weight, bias = torch.randn(40, 3, 32).transpose(0, 1), torch.randn(3, 32, 20), torch.randn(3, 1, 20)
    assert torch.allclose(layers.linear_by_head(x, weight, bias), x @ weight + bias, rtol=1e-4, atol=1e-4)


def test_weight_gradient_of_strided_rows(by_onednn):
    grad, x = torch.randn(40, 50)[:, ::2], torch.randn(80, 32)[::2]
    assert torch.allclose(layers.weight_gradient(grad, x), grad.T @ x, rtol=1e-4, atol=1e-4)


@with_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_takes_single_precision_only(monkeypatch, dtype):
    monkeypatch.setattr(layers, "ONEDNN_PAYS", True)
    monkeypatch.setattr(layers, "ONEDNN_LINEAR", None)  # what would take another type fails
    x, weight = torch.ones(5, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype)
    assert torch.equal(layers.linear(x, weight), functional.linear(x, weight))


@with_onednn
def test_autocast_and_pytorch_s_own_switch_are_heeded(monkeypatch):
    monkeypatch.setattr(layers, "ONEDNN_PAYS", True)
    monkeypatch.setattr(layers, "ONEDNN_LINEAR", None)
    x, weight = torch.ones(5, 8), torch.ones(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layers.linear(x, weight).dtype is torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert layers.linear(x, weight).dtype is torch.float32


@with_onednn
@pytest.mark.parametrize("name", MODELS)
def test_every_model_computes_the_same_by_either(monkeypatch, name):
    model = small(name, dtype=torch.float32)
    bags = [bag(n, seed=n, dtype=torch.float32)[0] for n in (70, 40, 1, 1700)]
    answers = []
    for pays in (False, True):
        monkeypatch.setattr(layers, "ONEDNN_PAYS", pays)
        model.zero_grad()
        logits, _ = model.forward_bags(bags)
        logits.square().sum().backward()
        answers.append([logits.detach(), *gradients(model).values()])
    for one, other in zip(*answers, strict=True):
        assert (one - other).norm() < 1e-4 * max(1.0, other.norm())


@pytest.mark.parametrize("name", ["LiteMIL", "ABMIL", "ABMIL_Multihead"])
def test_no_product_falls_back_to_a_slow_one(monkeypatch, name):
    if not layers.ONEDNN_PAYS:
        pytest.skip("this processor's products are PyTorch's own")
    model = build_mil(name, input_dim=256, num_classes=2)
    bags = [torch.randn(900, 256), torch.randn(850, 256)]

    def step():
        began = time.perf_counter()
        model.forward_bags(bags)[0].sum().backward()
        return time.perf_counter() - began

    taken = {}
    for pays in (False, True):
        monkeypatch.setattr(layers, "ONEDNN_PAYS", pays)
        taken[pays] = min(step() for _ in range(4))
    assert taken[True] < 4 * taken[False]  # it takes half the time; what falls back, a hundredfold


@with_onednn
def test_a_compiled_model_goes_without_it(monkeypatch):
    monkeypatch.setattr(layers, "ONEDNN_PAYS", True)
    calls, product = [], layers.ONEDNN_LINEAR
    monkeypatch.setattr(layers, "ONEDNN_LINEAR", lambda *arguments: [calls.append(1), product(*arguments)][1])
    layer, x = layers.Linear(16, 4), torch.randn(2, 30, 16)
    expected = layer(x)
    assert calls
    calls.clear()
    compiled = torch.compile(layer, backend="eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    assert not calls


@pytest.mark.slow
@with_onednn
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_model_compiled_to_machine_code_goes_without_it(monkeypatch):
    monkeypatch.setattr(layers, "ONEDNN_PAYS", True)
    layer, x = layers.Linear(16, 4), torch.randn(2, 30, 16)
    compiled = torch.compile(layer, options={"compile_threads": 1})
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    compiled(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(dim=(0, 1)).expand(4, -1), atol=1e-4)
